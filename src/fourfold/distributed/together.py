"""What fails on one rank fails on all: none waits for one that is gone, and each says which it was."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fourfold.errors import CheckpointError, TrainingError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the machine's, was too small."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def together(otherwise: str, groups: Sequence[dist.ProcessGroup] | None = None) -> Iterator[None]:
    """A part of a job that every rank does; at its end each learns whether all have.

    Nothing within may wait for other ranks. Without a process group an error is what it was.

    Args:
        otherwise: what is not done if it fails, as a message begins: ``no checkpoint was written``.
        groups: of the ranks that do it, one for each axis of their mesh; None takes all ranks.

    Raises:
        TrainingError: a rank ran out of memory, on every rank and with its number; or a rank is gone.
        CheckpointError: a rank could not read or write, or another one failed, with its number and reason.
            (That one raises what it was.)
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not dist.is_initialized():
        if isinstance(failure, OSError):
            raise CheckpointError(f"{otherwise}: {failure}") from failure
        if failure is not None:
            raise failure
        return
    failed: dict[int, tuple[str, bool]] = {}
    if failure is not None:
        failed[dist.get_rank()] = (f"{type(failure).__name__}: {failure}", is_out_of_memory(failure))
        if is_out_of_memory(failure) and torch.cuda.is_available():
            torch.cuda.empty_cache()  # (room to say so)
    try:
        for group in [None] if groups is None else groups:  # (along each axis what is known so far)
            said: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(said, failed, group=group)
            failed = {rank: text for found in said for rank, text in found.items()}
    except RuntimeError as gone:
        if failure is not None:
            raise failure from gone
        raise TrainingError(
            f"{otherwise}: another rank ended or does not answer, as rank {dist.get_rank()} noticed ({gone})."
            " Its own output says why; a kill without a word is the system's, for want of memory mostly"
        ) from gone
    for rank, (text, memory) in sorted(failed.items()):
        if memory:
            raise TrainingError(
                f"{otherwise}: rank {rank} ran out of memory ({text}). More ranks hold less each; "
                "`fourfold plan --gpus N` says how much"
            ) from failure
    if failure is not None and not isinstance(failure, OSError):
        raise failure
    if failed:
        rank, (text, _) = min(failed.items())
        raise CheckpointError(f"{otherwise}: rank {rank} failed with {text}") from failure


def from_first(value: Any) -> Any:
    """The first rank's value."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


__all__ = ["from_first", "is_out_of_memory", "together"]
