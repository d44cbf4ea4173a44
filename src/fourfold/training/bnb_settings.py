"""``bnb_config_kwargs``: known names, values of their kind, and an effect.

Imports neither torch nor bitsandbytes: what `MoeBitsAndBytesConfig` would refuse later is refused here, with
its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from fourfold.loading.arguments import BNB_4BIT, BNB_8BIT, BNB_BOTH
from fourfold.training.yaml_file import Problem, nearest, short

if TYPE_CHECKING:
    from fourfold.training.schema import TrainConfig

DOUBLE_QUANT = "bnb_4bit_use_double_quant"
_COMPUTE = ("bfloat16", "float16", "float32")
_STORAGE = ("uint8", *_COMPUTE)
CHOICES: dict[str, tuple[str, ...]] = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": _COMPUTE,
    "bnb_4bit_quant_storage": _STORAGE,
    "experts_quant_type": ("nf4", "fp4", "int8", "none"),
}
SWITCHES = (DOUBLE_QUANT, "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload")


def _is_pattern(text: str) -> bool:
    """Names of modules are read as regular expressions by the libraries underneath."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return bool(text)


def _wrong_value(name: str, value: Any) -> tuple[str, str] | None:
    """What is wrong with a setting's value, and what to give; None where nothing is, or for a null."""
    shown = short(brief(value))
    if value is None:
        return None
    if name in CHOICES:
        known = isinstance(value, str) and value.removeprefix("torch.") in CHOICES[name]
        return None if known else (f"{shown} is none of its values", f"Give {' or '.join(CHOICES[name])}.")
    if name in SWITCHES:
        return None if isinstance(value, bool) else (f"{shown} is neither true nor false", "Give either.")
    if name == "llm_int8_threshold":
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6
        return None if fits else (f"{shown} is no threshold", "Give a number such as 6.0.")
    if name == "experts_blocksize":
        # (which sizes there are is known to formats/, beside torch)
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 4096
        return None if fits else (f"{shown} is no block size", "Give a number such as 64.")
    names = isinstance(value, list) and all(isinstance(each, str) and _is_pattern(each) for each in value)
    return None if names else (f"{shown} is no list of names", "Give a list such as [lm_head].")


def bnb_contradictions(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Settings that are unknown, without effect, or of a wrong value."""
    keys: tuple[str, ...] = ("bnb_config_kwargs", "load_in_4bit", "load_in_8bit")
    known = (*BNB_4BIT, *BNB_8BIT, *BNB_BOTH)
    # With the Linears in 8 bit, experts may still be packed to 4.
    experts_in_4bit = config.bnb_config_kwargs.get("experts_quant_type") in ("nf4", "fp4")
    for name in config.bnb_config_kwargs:
        key = f"bnb_config_kwargs.{name}"
        if name not in known:
            remedy = nearest(name, known)
            if name in type(config).model_fields:
                remedy = f"`{name}` is a key of its own: write it at the top level."
            yield (keys[0],), Problem(key, "unknown setting", remedy)
        elif (wrong := _wrong_value(name, config.bnb_config_kwargs[name])) is not None:
            yield (keys[0],), Problem(key, *wrong)
        elif not config.quantized:
            yield (
                keys,
                Problem(key, "the model is not quantized", "Set load_in_4bit or load_in_8bit, or drop it."),
            )
        elif name in BNB_8BIT and not config.load_in_8bit:
            yield (
                keys,
                Problem(
                    key, "has no effect in 4 bit", "Drop it, or use load_in_8bit: true with adapter: lora."
                ),
            )
        elif name in BNB_4BIT and not (config.load_in_4bit or (name == DOUBLE_QUANT and experts_in_4bit)):
            yield (
                keys,
                Problem(
                    key, "has no effect in 8 bit", "Drop it, or use load_in_4bit: true with adapter: qlora."
                ),
            )
    experts = config.bnb_config_kwargs.get("experts_quant_type")
    wanted = config.quantize_moe_experts
    if experts is not None and wanted is not None and wanted is (experts == "none"):
        what = f"contradicts bnb_config_kwargs.experts_quant_type: {experts}"
        keys = ("quantize_moe_experts", "bnb_config_kwargs")
        yield keys, Problem(keys[0], what, "Keep one of the two.")
