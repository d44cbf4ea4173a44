"""Checkpoints of a sharded run by PyTorch's distributed checkpointing: every rank writes and reads its part.

What is trained and the state of its optimizer; the frozen base comes from its own checkpoint again. Parts are
cut anew where the number of ranks is another one, one process without sharding included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fourfold.distributed.blocks import bare
from fourfold.errors import CheckpointError

_TRAINED = StateDictOptions(ignore_frozen_params=True)
_PARTLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def _states(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # (torch leaves out frozen parameters, but neither buffers nor the scales of 4-bit Linears)
    state = get_model_state_dict(model, options=_TRAINED)
    states: dict[str, Any] = {"model": {name: tensor for name, tensor in state.items() if name in trained}}
    if not states["model"]:
        raise CheckpointError("nothing in the model is trained, so there is nothing to save or to resume")
    if optimizer is not None:
        states["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_TRAINED)
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
            or plain values.

    Raises:
        CheckpointError: nothing is trained.
    """
    dcp.save(_states(bare(model), optimizer) | others, checkpoint_id=str(folder))


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
        CheckpointError: the folder holds no checkpoint, or one of other adapters.
    """
    root = bare(model)
    states = _states(root, optimizer) | others
    if not (Path(folder) / ".metadata").is_file():
        raise CheckpointError(f"{folder} holds no checkpoint that fourfold.distributed.save_checkpoint wrote")
    try:
        stored = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # (a pickle of torch's own: anything may be wrong with it)
        raise CheckpointError(f"{folder} is damaged: {error}. Take an earlier checkpoint") from error
    known = {f"model.{name}" for name in states["model"]}
    more = sorted(name for name in stored if name.startswith("model.") and name not in known)
    if more:
        raise CheckpointError(
            f"{folder} is of other adapters: it holds {more[0]}"
            + (f" and {len(more) - 1} more" if len(more) > 1 else "")
            + ", which the model has not. Give the model the adapters that were saved"
        )
    try:
        dcp.load(states, checkpoint_id=str(folder))
    except (RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"{folder} is of another model, other adapters or another optimizer: {reason}"
        ) from error
    set_model_state_dict(root, states["model"], options=_PARTLY)
    if optimizer is not None:
        set_optimizer_state_dict(root, optimizer, states["optimizer"], options=_TRAINED)
    return {name: states[name] for name in others}
