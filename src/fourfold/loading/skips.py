"""What stays in high precision.

transformers' default keeps the output head and tied weights out of quantization, but drops that default as
soon as somebody passes ``llm_int8_skip_modules`` and so quantizes ``lm_head``; routers that are ``nn.Linear``
it quantizes always, although they are tiny and everything depends on them. So are the gates of shared
experts, one row each. Here all of them stay in high precision in every case.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fourfold.experts import FoundExperts


def router_names(model: nn.Module, experts: list[FoundExperts]) -> list[str]:
    """Names of the Linears that choose experts.

    A router is a Linear in the block that holds an experts module (but not inside the experts), with one
    output per expert, or with a single output (how much a shared expert counts). That is a matter of shapes,
    so it needs no names.
    """
    routers: list[str] = []
    for found in experts:
        if found.layout is None:
            continue
        block_name = found.block
        block = model.get_submodule(block_name) if block_name else model
        for name, module in block.named_modules():
            full = f"{block_name}.{name}" if block_name else name
            if full == found.name or full.startswith(found.name + "."):
                continue
            if isinstance(module, nn.Linear) and module.out_features in (1, found.layout.num_experts):
                routers.append(full)
    return routers


def modules_to_skip(
    model: PreTrainedModel, requested: list[str] | None, experts: list[FoundExperts]
) -> list[str]:
    """Patterns of modules that are not quantized: transformers' defaults, routers, and what the user asked
    for.
    """
    kept_in_fp32 = getattr(model, "_keep_in_fp32_modules", None)
    defaults = HfQuantizer.get_modules_to_not_convert(model, None, kept_in_fp32)
    return sorted({*defaults, *router_names(model, experts), *(requested or [])})


def is_skipped(name: str, requested: list[str] | None) -> bool:
    """Whether the user asked that this experts module be left alone."""
    return bool(requested) and not should_convert_module(name, requested)


def model_dtype(model: PreTrainedModel) -> torch.dtype:
    """dtype that the model's weights are loaded in (fp32 where it has no floating point parameter)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
