"""What has to be the same on every rank, made so or checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fourfold.distributed.digests import digest
from fourfold.errors import ConfigurationError


def _whole_here(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter.data, DTensor) and not parameter.is_meta


@torch.no_grad()
def make_trained_alike(model: nn.Module, group: dist.ProcessGroup, device: torch.device | str) -> None:
    """Trained parameters as the first rank of ``group`` has them: each rank drew its own random numbers."""
    source = dist.get_global_rank(group, 0)
    for parameter in model.parameters():
        if parameter.requires_grad and _whole_here(parameter):
            moved = parameter.data.to(device)
            dist.broadcast(moved, source, group=group)
            parameter.data.copy_(moved)


@torch.no_grad()
def check_frozen_alike(model: nn.Module, group: dist.ProcessGroup, device: torch.device | str) -> None:
    """Frozen parameters are never sent; ranks that loaded different ones would each train another model.

    Compared are digests (`digests`) of what each rank holds whole: parameters, the scales of 4-bit and 8-bit
    Linears, buffers that are saved.

    Raises:
        ConfigurationError: naming the first that differs, or saying that they are of other names.
    """
    found = dict(_frozen(model))
    names = hashlib.sha256("\n".join(found).encode()).digest()
    said = torch.tensor([int.from_bytes(names[:7], "little"), len(found)], device=device)
    if _differs(said, group).any():
        raise ConfigurationError(
            "the frozen parameters of the ranks have other names, or there are more of them on some; all of "
            f"them have to load the same checkpoint in the same way (rank {dist.get_rank()} has {len(found)})"
        )
    if not found:
        return
    wrong = _differs(torch.stack([digest(tensor).to(device) for tensor in found.values()]), group)
    places = wrong.nonzero().flatten().tolist()
    if places:
        raise ConfigurationError(
            f"{list(found)[places[0]]} and {len(places) - 1} more frozen parameters differ between the ranks;"
            " all of them have to load the same checkpoint in the same way"
        )


def _differs(numbers: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    low, high = numbers.clone(), numbers.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    return low != high


def _frozen(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What is not trained and lies whole on this rank, by name."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or not _whole_here(parameter):
                continue
            yield prefix + leaf, parameter.data
            if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):
                yield f"{prefix}{leaf}.SCB", scales
        state: Any = getattr(module, "quant_state", None) or getattr(
            module._parameters.get("weight"), "quant_state", None
        )
        while state is not None:
            yield f"{prefix}weight.absmax{state.blocksize}", state.absmax
            if state.nested:
                yield f"{prefix}weight.offset", state.offset
            state = state.state2 if state.nested else None
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set and not buffer.is_meta:
                yield prefix + leaf, buffer


__all__ = ["check_frozen_alike", "make_trained_alike"]
