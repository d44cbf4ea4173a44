"""Fourfold: QLoRA of Mixture-of-Experts models, with nothing silently wrong.

Importing it imports nothing heavy. What transformers and PEFT have to know is put into their registries when
(and only when) those libraries are imported; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from fourfold import errors
from fourfold.version import __version__

if TYPE_CHECKING:
    from fourfold.adapters.export import export
    from fourfold.adapters.loftq import loftq_init
    from fourfold.adapters.merge import merge
    from fourfold.adapters.merge_report import MergedCheckpoint
    from fourfold.experts.layout import expert_targets
    from fourfold.loading.config import MoeBitsAndBytesConfig
    from fourfold.loading.enable import disable, enable
    from fourfold.loading.prepare import dequantize, prepare
    from fourfold.offloading.api import OffloadReport, offload, onload
    from fourfold.planning.plan import Plan, plan
    from fourfold.planning.report import Report, verify

__all__ = [
    "MergedCheckpoint",
    "MoeBitsAndBytesConfig",
    "OffloadReport",
    "Plan",
    "Report",
    "__version__",
    "dequantize",
    "disable",
    "enable",
    "errors",
    "expert_targets",
    "export",
    "loftq_init",
    "merge",
    "offload",
    "onload",
    "plan",
    "prepare",
    "verify",
]

_WHERE = {
    "MergedCheckpoint": "fourfold.adapters.merge_report",
    "MoeBitsAndBytesConfig": "fourfold.loading.config",
    "OffloadReport": "fourfold.offloading.api",
    "Plan": "fourfold.planning.plan",
    "Report": "fourfold.planning.report",
    "dequantize": "fourfold.loading.prepare",
    "disable": "fourfold.loading.enable",
    "enable": "fourfold.loading.enable",
    "expert_targets": "fourfold.experts.layout",
    "export": "fourfold.adapters.export",
    "loftq_init": "fourfold.adapters.loftq",
    "merge": "fourfold.adapters.merge",
    "offload": "fourfold.offloading.api",
    "onload": "fourfold.offloading.api",
    "plan": "fourfold.planning.plan",
    "prepare": "fourfold.loading.prepare",
    "verify": "fourfold.planning.report",
}


# (not `transformers.quantizers.auto`: that is imported half-way through `modeling_utils`, which the quantizer
# needs)
@wrapt.when_imported("transformers.modeling_utils")
def _register_with_transformers(_: Any) -> None:
    from fourfold.loading.register import register

    register()


@wrapt.when_imported("peft.tuners.lora.model")
def _register_with_peft(_: Any) -> None:
    from fourfold.adapters.patch import install

    install()


@wrapt.when_imported("peft.peft_model")
def _register_with_peft_models(_: Any) -> None:
    from fourfold.adapters.patch import install_provenance

    install_provenance()


@wrapt.when_imported("peft.utils.hotswap")
def _register_with_hotswap(_: Any) -> None:
    from fourfold.adapters.patch import install_hotswap

    install_hotswap()


@wrapt.when_imported("accelerate.accelerator")
def _register_with_accelerate(_: Any) -> None:
    from fourfold.distributed.accelerated import install

    install()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(
            f"module 'fourfold' has no attribute {name!r}; it has {', '.join(sorted(__all__))}"
        )
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
