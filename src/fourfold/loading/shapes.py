"""Shapes of what was loaded, against what the configuration asks for.

transformers does not compare the shape of a tensor that is quantized on the way, and up to 5.21 of no tensor
at all once there is a quantizer. A wrong one would show as an error from the inside of a kernel, or not at
all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fourfold.errors import CheckpointError
from fourfold.experts import PackedExperts

Shapes = Mapping[str, tuple[int, ...]]


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every parameter and buffer of a model on the meta device, before loading."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(module: nn.Module, prefix: str, expected: Shapes) -> None:
    """Compare the tensors that a module itself holds.

    Args:
        module: loaded; packed weights of experts are left to their own check.
        prefix: full name of the module with a dot behind, or empty.
        expected: what `expected_shapes` gave.

    Raises:
        CheckpointError: naming the tensor and both shapes.
    """
    packed = [p.name for p in module.fourfold_layout.projections] if isinstance(module, PackedExperts) else []
    for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
        wanted = expected.get(prefix + leaf)
        if tensor is None or wanted is None or leaf.split("_absmax")[0] in packed:
            continue
        found = _logical_shape(tensor)
        if leaf == "weight" and hasattr(module, "source_cls"):  # a Linear of bitsandbytes
            linear: Any = module
            wanted = (linear.out_features, linear.in_features)
        if found != wanted:
            raise CheckpointError(
                f"{prefix}{leaf} is {list(found)} in the checkpoint, where the configuration asks for "
                f"{list(wanted)}; they are not of the same model"
            )
        _check_scales(prefix + leaf, tensor)


def _check_scales(name: str, weight: torch.Tensor) -> None:
    """A quantized weight must have all of its scales: bitsandbytes takes 8-bit scales whose own are missing
    for the scales themselves.
    """
    scales = getattr(weight, "SCB", None)
    if isinstance(scales, torch.Tensor) and scales.numel() != weight.shape[0]:
        raise CheckpointError(
            f"the scales (SCB) of {name} are {scales.numel()} in the checkpoint, one for each of its "
            f"{weight.shape[0]} rows is expected; save or download it again"
        )
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return
    count = -(-math.prod(state.shape) // state.blocksize)
    complete = 2 * weight.nbytes == math.prod(state.shape) + math.prod(state.shape) % 2
    complete = complete and state.absmax.numel() == count
    if state.nested:
        groups = -(-count // state.state2.blocksize)
        complete = complete and state.state2.absmax.numel() == groups
    elif state.absmax.dtype != torch.float32:
        complete = False
    if not complete:
        raise CheckpointError(
            f"the 4-bit weight {name} lacks bytes or scales (absmax, nested_absmax) in the checkpoint; save "
            "or download it again"
        )


def _logical_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of a 4-bit weight the shape that it had before it was packed."""
    state: Any = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)
