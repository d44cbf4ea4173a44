"""The one patch: how PEFT chooses the class of a parameter wrapper.

`LoraModel._create_new_module` tries a fixed list of dispatchers and has no registry (`LoraConfig.
_register_custom_module` is not saved with the adapter, so reloading would not know it). On a packed parameter
stock raises nothing and builds factors for the width of the packed bytes, half of the real one. The wrapper
below answers for packed experts only and passes everything else on. To be dropped when PEFT can register
wrappers: https://github.com/huggingface/peft/issues (custom modules that survive saving), not there up to
0.21.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.lora.model import LoraModel

_MARK = "_fourfold"


def install() -> None:
    """Install the dispatch; once, whoever calls first."""
    from fourfold.adapters.wrapper import ParamWrapper
    from fourfold.errors import AdapterError
    from fourfold.experts import PackedExperts

    stock = LoraModel._create_new_module
    if getattr(stock, _MARK, False):
        return

    @functools.wraps(stock)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, PackedExperts) and kwargs.get("parameter_name") is not None:
            if not base.fourfold_layout.routed:
                raise AdapterError(
                    f"target_parameters: LoRA on {kwargs['parameter_name']} of {type(base).__name__} is not "
                    "supported, for these experts run through their own forward; target its Linears "
                    "(target_modules), such as attention, instead"
                )
            return ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
        return stock(lora_config, adapter_name, target, **kwargs)

    setattr(create_new_module, _MARK, True)
    LoraModel._create_new_module = staticmethod(create_new_module)
