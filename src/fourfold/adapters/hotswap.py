"""Another adapter's numbers in the place of one on experts.

PEFT puts a smaller factor into the first rows of a larger one and zeros behind it. Flat factors of experts
have the experts' rows one after the other, so that would give experts each other's rows: they are widened
here, each expert by itself, before PEFT compares shapes. It also looks patterns of rank and alpha up by the
wrapper's name, where adding an adapter takes the parameter's; the scaling is set by the latter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.utils import hotswap
from peft.utils.other import get_pattern_key
from torch import nn

from fourfold.adapters import plain_wrapper, wrapper
from fourfold.experts.layout import clean_name

_OURS = (wrapper.ParamWrapper, plain_wrapper.ParamWrapper)


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, _OURS) and adapter_name in module.lora_A:
            yield name, module


def widened(
    model: nn.Module, state: Mapping[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    """``state`` with factors of experts of the rank that the model has, where theirs is smaller.

    Args:
        model: with the adapter.
        state: of the other one, under the model's own names.
        adapter_name: whose place it takes.

    Returns:
        A new mapping; A ``[E*R, K]`` and B ``[N, R*E]`` filled with zeros behind each expert's own ranks.
    """
    result = dict(state)
    for name, layer in _layers(model, adapter_name):
        keys = [f"{name}.lora_{half}.{adapter_name}.weight" for half in "AB"]
        if not all(key in state for key in keys):
            continue
        E, (a, b) = layer.num_experts, (state[key] for key in keys)
        missing = layer.lora_A[adapter_name].weight.shape[0] // E - a.shape[0] // E
        if missing <= 0 or a.shape[0] % E or a.shape[0] != b.shape[1]:
            continue
        a_ERK, b_NRE = a.view(E, -1, a.shape[1]), b.view(b.shape[0], -1, E)
        a_ERK = torch.cat([a_ERK, a.new_zeros(E, missing, a.shape[1])], dim=1)
        b_NRE = torch.cat([b_NRE, b.new_zeros(b.shape[0], missing, E)], dim=1)
        result[keys[0]], result[keys[1]] = a_ERK.flatten(0, 1), b_NRE.flatten(1)
    return result


def set_scaling(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Alpha over rank of every expert parameter, as adding an adapter of this ``LoraConfig`` sets it."""
    for name, layer in _layers(model, adapter_name):
        full = f"{clean_name(name)}.{layer.parameter_name}"
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), full), config.r)
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern.keys(), full), config.lora_alpha
        )
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        hotswap._update_scaling(layer, adapter_name=adapter_name, scaling=scaling)
