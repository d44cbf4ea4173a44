"""The one patch of transformers: a `MoeBitsAndBytesConfig` may be given for a quantized checkpoint.

transformers compares the class of the configuration in config.json with that of the one passed to
`from_pretrained` and raises where they differ, before any registered class is asked
(`AutoHfQuantizer.merge_quantization_configs`); so gpt-oss (MXFP4), DeepSeek-V3 (block-FP8) and per-expert
bitsandbytes checkpoints cannot be loaded with another quantization, and there is no registry that says
otherwise. The method is wrapped: where the given configuration is ours and the stored format is one that
`loading.foreign` reads, ours holds; everything else goes to the original.

No issue of transformers asks for such a door yet (up to 5.23); with one, this file ends.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from fourfold.loading.config import MoeBitsAndBytesConfig

READABLE = ("mxfp4", "fp8", "bitsandbytes")
_MARK = "_fourfold"


def stored_method(stored: dict[str, Any]) -> str | None:
    """``quant_method`` of a stored configuration; old bitsandbytes ones may lack the key."""
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    method = stored.get("quant_method")
    return str(getattr(method, "value", method)) if method is not None else None


def install() -> None:
    """Wrap the method; once, whoever calls first."""
    original = AutoHfQuantizer.merge_quantization_configs
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original.__func__)
    def merge(
        cls: Any, quantization_config: Any, quantization_config_from_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        given, stored = quantization_config_from_args, quantization_config
        if isinstance(given, MoeBitsAndBytesConfig):
            settings = stored if isinstance(stored, dict) else stored.to_dict()
            if stored_method(settings) in READABLE:
                return given.reading(settings)
        merged = original(stored, given, *args, **kwargs)
        if isinstance(given, MoeBitsAndBytesConfig) and isinstance(merged, MoeBitsAndBytesConfig):
            # (of this machine, and not in the checkpoint)
            merged.experts_device, merged.or_disk = given.experts_device, given.or_disk
        return merged

    setattr(merge, _MARK, True)
    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)
