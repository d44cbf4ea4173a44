"""The processes of a run: one for each card, started by ``torchrun`` or ``accelerate launch``.

Each holds the whole packed model, and torch's DDP averages the adapters' gradients; or each holds a share of
model, adapters and optimizer, by FSDP2 (`fsdp_keys`). What is written and shown is
the first one's business. What they tell each other: `collective`. Nothing here knows torch.
"""

from __future__ import annotations

import os


def count() -> int:
    """How many processes the run has."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0 on."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Which of those on this machine this one is; its card has that number."""
    return _number("LOCAL_RANK", 0)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and text.isascii() else default
