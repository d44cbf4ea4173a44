"""Faults of bitsandbytes' Linears (seen in 0.50.2), kept from changing results.

Those of the 4-bit ones are in its code for CPUs with AVX512. Its decoder is wrong where a row is no multiple
of the block size (relative error 0.2 where 0.09 is right; the packed bytes are fine). Whether that is so is
found by trying, so the refusal ends by itself with the release that mends it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fourfold.errors import ConfigurationError
from fourfold.experts.layout import name_suffix
from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack


@functools.cache
def decodes_rows_of(columns: int, blocksize: int, quant_type: str) -> bool:
    """Whether bitsandbytes decodes a matrix of that width rightly on this CPU."""
    import bitsandbytes.functional as bnb

    with torch.device("cpu"):  # models are made under another default
        w_NK = torch.randn(blocksize, columns, generator=torch.Generator().manual_seed(0))
        data, state = bnb.quantize_4bit(w_NK, blocksize=blocksize, quant_type=quant_type)
        shape = StackShape(1, columns, blocksize)  # blocks run through rows: here a block is a row
        stored = {"": data.view(1, columns, -1), "_absmax": state.absmax.view(torch.int32).view(1, -1, 1)}
        stack = PackedStack.from_tensors(PackFormat(quant_type, blocksize), shape, stored)
        return torch.equal(
            bnb.dequantize_4bit(data, state).flatten(), decode_stack(stack, w_NK.dtype).flatten()
        )


def refuse_wrong_widths(model: nn.Module, device_map: Any) -> None:
    """Refuse 4-bit Linears that this CPU would compute wrongly.

    Args:
        model: with its Linears replaced by bitsandbytes' ones, on the meta device.
        device_map: where its parts go; None is the CPU.

    Raises:
        ConfigurationError: naming the layers.
    """
    from bitsandbytes.nn import Linear4bit

    places = device_map.items() if isinstance(device_map, dict) else [("", device_map or "cpu")]
    on_cpu = [prefix for prefix, place in places if str(place).startswith("cpu")]
    wrong: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit) or not any(_inside(name, prefix) for prefix in on_cpu):
            continue
        weight: Any = module.weight
        block = weight.blocksize or 64
        if module.in_features % block and not decodes_rows_of(module.in_features, block, weight.quant_type):
            wrong[name_suffix(name)] = module.in_features
    if wrong:
        shown = ", ".join(f"{name} ({width})" for name, width in list(wrong.items())[:4])
        raise ConfigurationError(
            "on this CPU bitsandbytes computes 4-bit Linears wrongly whose width is no multiple of the block "
            f"size: {shown}. Load the model on a GPU, or leave them in high precision with "
            f"llm_int8_skip_modules={list(wrong)}"
        )


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit Linears on CPUs with AVX512-BF16.

    Its evaluation there rewrites the weight in another layout with bf16 scales, after which the layer has no
    backward (training after an evaluation learns nothing below it, without an error) and dequantizes to
    garbage. The layer asks an attribute of its own, so no code is patched.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@functools.cache
def _flattening_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.ndim <= 3:
            return cls.forward(self, x)
        return cls.forward(self, x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def flatten_inputs(model: nn.Module) -> None:
    """bitsandbytes' 8-bit product takes inputs of two or three dimensions; latent attention feeds it four."""
    from bitsandbytes.nn import Linear8bitLt

    for module in model.modules():
        if type(module) is Linear8bitLt:
            own: Any = Linear8bitLt
            module.__class__ = _flattening_class(own)
