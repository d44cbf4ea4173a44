"""What fails on one rank fails on all: none waits for one that is gone, and each says which it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from fourfold.errors import CheckpointError, TrainingError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the machine's, was too small."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def together(otherwise: str) -> Iterator[None]:
    """A part of a job that every rank does; at its end each learns whether all have.

    Nothing within may wait for other ranks. Without a process group an error is what it was.

    Args:
        otherwise: what is not done if it fails, as a message begins: ``no checkpoint was written``.

    Raises:
        TrainingError: a rank ran out of memory, on every rank and with its number; or a rank is gone.
        CheckpointError: another rank failed, with its number and reason. (That rank raises what it was.)
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    mine = None if failure is None else (_said(failure), is_out_of_memory(failure))
    if mine is not None and mine[1] and torch.cuda.is_available():
        torch.cuda.empty_cache()  # (room to say so)
    said: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(said, mine)
    except RuntimeError as gone:
        if failure is not None:
            raise failure from gone
        raise TrainingError(
            f"{otherwise}: another rank ended or does not answer, as rank {dist.get_rank()} noticed ({gone})."
            " Its own output says why; a kill without a word is the system's, for want of memory mostly"
        ) from gone
    failed = [(rank, *found) for rank, found in enumerate(said) if found is not None]
    short = [(rank, text) for rank, text, memory in failed if memory]
    if short:
        raise TrainingError(
            f"{otherwise}: rank {short[0][0]} ran out of memory ({short[0][1]}). More ranks hold less each; "
            "`fourfold plan --gpus N` says how much"
        ) from failure
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"{otherwise}: rank {failed[0][0]} failed with {failed[0][1]}")


def from_first(value: Any) -> Any:
    """The first rank's value."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


__all__ = ["from_first", "is_out_of_memory", "together"]
