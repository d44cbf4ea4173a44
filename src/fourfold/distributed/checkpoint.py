"""Checkpoints of a sharded run by PyTorch's distributed checkpointing: every rank writes and reads its part.

What is trained and the state of its optimizer; the frozen base comes from its own checkpoint again. Parts are
cut anew where the number of ranks is another one, one process without sharding included. What it looks like
on disk is `storage`'s: nothing in it is a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fourfold.distributed.blocks import bare
from fourfold.distributed.plain_values import wholes
from fourfold.distributed.storage import PlainLoadPlanner, PlainReader, PlainSavePlanner, PlainWriter
from fourfold.distributed.together import is_out_of_memory, together
from fourfold.errors import CheckpointError, FourfoldError, TrainingError
from fourfold.experts.part import refuse_spread

_TRAINED = StateDictOptions(ignore_frozen_params=True)
_PARTLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def _states(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    refuse_spread(
        model,
        "a checkpoint would hold those of one rank",
        "Save adapters by model.save_pretrained on every rank, and optimizers by torch.save, a file for each",
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # (torch leaves out frozen parameters, but neither buffers nor the scales of 4-bit Linears)
    state = get_model_state_dict(model, options=_TRAINED)
    states: dict[str, Any] = {"model": {name: tensor for name, tensor in state.items() if name in trained}}
    if not states["model"]:
        raise CheckpointError("nothing in the model is trained, so there is nothing to save or to resume")
    if optimizer is not None:
        states["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_TRAINED)
        # (whole: a scheduler adds to them, and may come before or after loading)
        states["optimizer"]["param_groups"] = wholes(states["optimizer"]["param_groups"])
    return states


def save_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **others: Any
) -> None:
    """Write what is trained, and its optimizer, to ``folder``; every rank calls it, and writes its part.

    Args:
        folder: on a file system that all ranks share.
        model: sharded, or in one process.
        optimizer: of the trained parameters.
        others: anything else to keep, with a ``state_dict`` and ``load_state_dict`` of its own (a scheduler),
            or tensors and plain values; the same on every rank, of which one writes it.

    Raises:
        CheckpointError: nothing is trained, ``others`` holds what is neither tensor nor plain value, or a
            rank could not write (on every rank, with its number).
        TrainingError: a rank ran out of memory.
    """
    with together("no checkpoint was written"):
        states = _states(bare(model), optimizer) | _others(others)
    place = Path(folder).expanduser()
    try:
        dcp.save(
            states,
            storage_writer=PlainWriter(place),
            planner=PlainSavePlanner(),
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as failed:
        raise _named(failed, f"{place} was not written") from failed


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **others: Any
) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote into ``model`` and ``optimizer``; every rank calls it.

    Args:
        folder: as it was saved, on any number of ranks.
        model: with the same adapters.
        optimizer: new, or stepped.
        others: as they were given when saving; objects are loaded in place.

    Returns:
        ``others`` as stored.

    Raises:
        CheckpointError: the folder holds no checkpoint, a damaged one, or one of other adapters, in other
            dtypes, or of another optimizer.
        TrainingError: a rank ran out of memory.
    """
    root = bare(model)
    place = Path(folder).expanduser()
    reader = PlainReader(place)
    states: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with together(f"{place} was not loaded"):
        states = _states(root, optimizer) | _others(others)
        stored = reader.read_metadata().state_dict_metadata
        known = {f"model.{name}" for name in states["model"]}
        more = sorted(name for name in stored if name.startswith("model.") and name not in known)
        if more:
            raise CheckpointError(
                f"{place} is of other adapters: it holds {more[0]}"
                + (f" and {len(more) - 1} more" if len(more) > 1 else "")
                + ", which the model has not. Give the model the adapters that were saved"
            )
    try:
        dcp.load(states, storage_reader=reader, planner=PlainLoadPlanner(), no_dist=not dist.is_initialized())
    except CheckpointException as failed:
        raise _named(failed, f"{place} is of another model, other adapters or another optimizer") from failed
    set_model_state_dict(root, states["model"], options=_PARTLY)
    if optimizer is not None:
        set_optimizer_state_dict(root, optimizer, states["optimizer"], options=_TRAINED)
    for name, other in others.items():
        found[name] = states[name]
        if _has_state(other):
            other.load_state_dict(found[name])
            found[name] = other
    return found


def _has_state(other: Any) -> bool:
    return hasattr(other, "state_dict") and hasattr(other, "load_state_dict")


def _others(others: dict[str, Any]) -> dict[str, Any]:
    """What is saved of each."""
    return {name: wholes(o.state_dict() if _has_state(o) else o) for name, o in others.items()}


def _named(failed: CheckpointException, otherwise: str) -> FourfoldError:
    """What failed on some rank, as an error with the rank's number."""
    rank, (error, _) = min(failed.failures.items())
    where = f"rank {rank}: " if dist.is_initialized() else ""
    if is_out_of_memory(error):
        return TrainingError(f"{otherwise}: {where}ran out of memory ({error})")
    if isinstance(error, CheckpointError):
        return CheckpointError(f"{where}{error}")
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return CheckpointError(f"{otherwise}: {where}{reason}")
