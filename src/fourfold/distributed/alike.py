"""What has to be the same on every rank, made so or checked."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fourfold.errors import ConfigurationError

_PRIME = 2_147_483_629  # keeps a sum of sums inside int64


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

    Raises:
        ConfigurationError: naming the first that differs. Bytes are compared by their sums.
    """
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and _whole_here(parameter)
    }
    if not found:
        return
    sums = torch.stack([_digest(parameter).to(device) for parameter in found.values()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    wrong = (low != high).nonzero().flatten().tolist()
    if wrong:
        raise ConfigurationError(
            f"{list(found)[wrong[0]]} and {len(wrong) - 1} more frozen parameters differ between the ranks; "
            "all of them have to load the same checkpoint in the same way"
        )


def _digest(parameter: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bytes, and how many there are, as one number."""
    data = torch.Tensor(parameter.data).contiguous().view(-1).view(torch.uint8)
    return data.sum(dtype=torch.int64) * 31 % _PRIME + data.numel() % _PRIME


__all__ = ["check_frozen_alike", "make_trained_alike"]
