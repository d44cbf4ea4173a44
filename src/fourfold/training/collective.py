"""What the processes of a run tell each other (`processes`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from fourfold.training import processes


def join() -> None:
    """Meet the others, where there are any, and take the card that is this process's own."""
    if processes.count() == 1:
        return
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
