"""What the processes of a run tell each other (`processes`)."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from fourfold.errors import ConfigurationError
from fourfold.training import processes

_ASKED = "ACCELERATE_USE_FSDP"


def join(sharded: bool = False) -> None:
    """Meet the others, where there are any, and take the card that is this process's own.

    Args:
        sharded: whether the run's model is sharded over them, by its own keys.

    Raises:
        ConfigurationError: a file for ``accelerate launch`` shards the model, and the run's does not.
    """
    if os.environ.get(_ASKED, "").lower() == "true":
        if not sharded:
            raise ConfigurationError(
                "accelerate's file has distributed_type: FSDP, and this file does not say so. Write "
                "fsdp_version: 2 (and fsdp_config) here, or launch with distributed_type: MULTI_GPU."
            )
        os.environ[_ASKED] = "false"  # the run's file says how: the model would be prepared twice
    if processes.count() == 1:
        return
    if sharded and torch.cuda.is_available() and not dist.is_initialized():
        # (norms of gradients that lie in CPU memory are added up there, and checkpoints are agreed on)
        torch.cuda.set_device(processes.local_rank())
        dist.init_process_group("cuda:nccl,cpu:gloo")
    PartialState(cpu=not torch.cuda.is_available())


def wait() -> None:
    """Until all are here."""
    if processes.count() > 1:
        dist.barrier()


def sum_of(values: list[float], device: Any) -> list[float]:
    """Element by element over all processes."""
    if processes.count() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    result: list[float] = total.tolist()
    return result


def most(value: int, device: Any) -> int:
    """The largest of all processes' values."""
    if processes.count() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, unless it is sharded."""
    to_local: Any = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    local: torch.Tensor = to_local()
    return local


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the model, and so have to compute with it together."""
    return any(hasattr(parameter.data, "to_local") for parameter in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; its shards may lie in CPU memory."""
    first = next(model.parameters())
    mesh: Any = getattr(first.data, "device_mesh", None)
    if mesh is not None and mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return first.device
