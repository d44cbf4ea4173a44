"""Serving plain `BitsAndBytesConfig` too, for programs that cannot be edited.

transformers finds its quantizers in a dictionary; `enable` puts Fourfold's in the two places of bitsandbytes,
`disable` puts back what was there. The whole process is affected, so it is never on by default. What is saved
says ``fourfold``: as a plain bitsandbytes checkpoint its packed experts would be read as something else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from fourfold.errors import ConfigurationError
from fourfold.experts import find_experts
from fourfold.experts.layout import name_suffix
from fourfold.loading.arguments import BNB_4BIT, PLAIN
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.headers import read_headers
from fourfold.loading.quantizer import FourfoldQuantizer
from fourfold.loading.register import register
from fourfold.loading.skips import is_skipped

logger = logging.getLogger("fourfold")
_ENTRIES = ("bitsandbytes_4bit", "bitsandbytes_8bit")
# What was in the registry before, and what was put there.
_before: dict[str, Any] = {}
_ours: dict[str, Any] = {}


def enable() -> bool:
    """Make `from_pretrained` pack experts for a plain `BitsAndBytesConfig` as well, in the whole process.

    Settings keep their meaning: Linears are quantized as before, experts in the same format. Unlike in
    `MoeBitsAndBytesConfig`, a ``bnb_4bit_compute_dtype`` left unset is fp32, since a plain configuration does
    not tell whether it was set; set it to bf16 for speed. Plain 4-bit checkpoints are read as well: experts
    that are quantized one by one are taken over, those in high precision are packed. Calling it twice does
    nothing more.

    Returns:
        Whether Fourfold serves plain configurations now. False where this transformers quantizes fused
        experts with bitsandbytes by itself: then nothing is changed, and a log line says so.
    """
    register()
    for entry in _ENTRIES:
        stock = AUTO_QUANTIZER_MAPPING[entry]
        if stock is _ours.get(entry):
            continue
        if _packs_experts(stock, entry.removeprefix("bitsandbytes_")):
            disable()
            logger.warning(
                "fourfold.enable(): this transformers quantizes experts with bitsandbytes by itself; plain "
                "BitsAndBytesConfig is left to it, and MoeBitsAndBytesConfig works as before"
            )
            return False
        _before[entry] = stock
        _ours[entry] = AUTO_QUANTIZER_MAPPING[entry] = _serving(stock)
    return True


def disable() -> None:
    """Undo `enable`; models that were loaded meanwhile stay as they are.

    An entry that somebody else has replaced since is left alone.
    """
    for entry, stock in _before.items():
        if AUTO_QUANTIZER_MAPPING.get(entry) is _ours[entry]:
            AUTO_QUANTIZER_MAPPING[entry] = stock
    _before.clear()
    _ours.clear()


def _serving(stock: Any) -> Callable[..., HfQuantizer]:
    """What transformers calls with a plain configuration, in the place of ``stock`` (it only calls it)."""
    refusing = _refusing_unpacked_experts(stock)

    def make(quantization_config: BitsAndBytesConfig, **kwargs: Any) -> HfQuantizer:
        if not kwargs.get("pre_quantized", True):
            return FourfoldQuantizer(for_experts_too(quantization_config), **kwargs)
        if quantization_config.load_in_4bit:
            return _StoredPlainQuantizer(quantization_config, **kwargs)
        made: HfQuantizer = refusing(quantization_config, **kwargs)
        return made

    return make


def _refusing_unpacked_experts(stock: Any) -> Any:
    """Stock's quantizer for 8-bit checkpoints; refuses one whose experts are not packed unasked."""

    class Stock(stock):
        def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
            skipped, files = self.quantization_config.llm_int8_skip_modules, kwargs.get("checkpoint_files")
            _refuse_experts_beside_8_bit(model, skipped, files)
            return super()._process_model_before_weight_loading(model, **kwargs)

    Stock.__name__ = Stock.__qualname__ = stock.__name__
    return Stock


class _StoredPlainQuantizer(FourfoldQuantizer):
    """Reads plain 4-bit checkpoints: experts that lie there one by one are taken over as they are, experts
    in high precision are packed, and a model without experts is stock's, as it was.
    """

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        stored = quantization_config.to_dict()
        super().__init__(for_experts_too(quantization_config).reading(stored), **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not _experts_to_pack(model, self.config.llm_int8_skip_modules):
            self.config.read_from, self.pre_quantized = None, True
            assert self.linears is not None
            self.linears.pre_quantized = True
        super()._process_model_before_weight_loading(model, **kwargs)


def _experts_to_pack(model: PreTrainedModel, skipped: list[str] | None) -> list[str]:
    return [found.name for found in find_experts(model) if not is_skipped(found.name, skipped)]


def _refuse_experts_beside_8_bit(
    model: PreTrainedModel, skipped: list[str] | None, files: list[str] | None
) -> None:
    left = _experts_to_pack(model, skipped)
    if not left:
        return
    safetensors = [Path(file) for file in files or () if str(file).endswith(".safetensors")]
    where = f"its experts ({left[0]} and {len(left) - 1} more)"
    if any(".experts." in key and key.endswith(".SCB") for key in read_headers(safetensors)):
        raise ConfigurationError(
            f"this checkpoint was quantized by plain bitsandbytes in INT8, {where} one by one, which cannot "
            "be read; load the model in high precision"
        )
    patterns = sorted({name_suffix(name) for name in left})
    raise ConfigurationError(
        f"this checkpoint was quantized by plain bitsandbytes in INT8, which left {where} in high precision. "
        "fourfold.enable() is on, so load the original checkpoint; or call fourfold.disable(), or add "
        f"{patterns} to llm_int8_skip_modules in its config.json to load it as it is"
    )


def for_experts_too(plain: BitsAndBytesConfig) -> MoeBitsAndBytesConfig:
    """The same settings, for experts as for Linears.

    Raises:
        ConfigurationError: it asks for neither 4 nor 8 bit.
    """
    # With 8 bit, those of 4 bit mean nothing in stock transformers, and programs set them all the same.
    names = [name for name in PLAIN if plain.load_in_4bit or name not in BNB_4BIT]
    return MoeBitsAndBytesConfig(**{name: getattr(plain, name) for name in names})


@use_experts_implementation
class _ProbeExperts(nn.Module):
    """Fused experts as transformers' own models have them."""

    def __init__(self, _config: PretrainedConfig) -> None:
        super().__init__()
        self.num_experts = 2
        self.gate_up_proj = nn.Parameter(torch.empty(2, 128, 64))
        self.down_proj = nn.Parameter(torch.empty(2, 64, 64))

    def forward(self, hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return hidden_states


class _ProbeModel(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.experts = _ProbeExperts(config)
        self.proj = nn.Linear(64, 64)
        self.post_init()


def _packs_experts(stock: Any, bits: str) -> bool:
    """Whether a quantizer of transformers' does anything with fused experts: found out by letting it prepare
    a model.
    """
    config = BitsAndBytesConfig(**{f"load_in_{bits}": True})
    quantizer = stock(config, pre_quantized=False)
    with torch.device("meta"):
        model = _ProbeModel(PretrainedConfig())
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
    experts: Any = model.experts
    weight: Any = getattr(experts, "gate_up_proj", None)
    changed = type(experts) is not _ProbeExperts or not isinstance(weight, nn.Parameter)
    return (
        changed
        or not weight.is_floating_point()
        or bool(quantizer.param_needs_quantization(model, "experts.gate_up_proj"))
    )
