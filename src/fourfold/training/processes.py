"""The processes of a run: one for each card, started by ``torchrun`` or ``accelerate launch``.

Each holds the whole packed model; torch's DDP averages the adapters' gradients. What is written and shown is
the first one's business. Importing this imports no torch.
"""

from __future__ import annotations

import os
from typing import Any


def count() -> int:
    """How many processes the run has."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0 on."""
    return _number("RANK", 0)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and text.isascii() else default


def join() -> None:
    """Meet the others, where there are any, and take the card that is this process's own."""
    if count() == 1:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def sum_of(values: list[float], device: Any) -> list[float]:
    """Element by element over all processes."""
    if count() == 1:
        return values
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    result: list[float] = total.tolist()
    return result
