"""A packed checkpoint written from shards: every rank writes its rows into the same files.

A tensor lies in a safetensors file as one run of bytes, row after row, and a shard is a run of rows: so the
first rank makes each file with its header and at its length, and all ranks write their runs into it. Nothing
is gathered anywhere. What comes out is what `save_pretrained` writes of the whole model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold.distributed.tensor_file import Entry, Writing, begin, in_order, pieces
from fourfold.distributed.together import from_first, together
from fourfold.errors import ConfigurationError
from fourfold.experts.part import Part
from fourfold.loading.headers import INDEX, SINGLE
from fourfold.loading.quantize import DEFAULT_SHARD_SIZE, save_configuration
from fourfold.loading.shards import parse_size
from fourfold.loading.workplace import check_target, workplace


@dataclass(frozen=True)
class _Entry(Entry):
    """One tensor of the checkpoint, whole or this rank's rows of it."""

    tensor: torch.Tensor

    def pieces(self, rank: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Where in the tensor bytes of this rank lie, and they; nothing where another rank has them too."""
        tensor, start = self.tensor, 0
        if isinstance(tensor, DTensor):
            coordinate = tensor.device_mesh.get_coordinate()
            assert coordinate is not None
            if any(coordinate[:-1]):  # another replica writes them
                return
            row = tensor.numel() // max(tensor.shape[0], 1) * tensor.element_size()
            part = Part(coordinate[-1], tensor.device_mesh.size(tensor.device_mesh.ndim - 1))
            start = part.of(tensor.shape[0])[0] * row
            tensor = tensor.to_local()
        elif rank:
            return
        for at, piece in pieces(tensor):
            yield start + at, piece


def save_packed(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    force: bool = False,
) -> list[str]:
    """Write a model that is in shards as a packed checkpoint; every rank calls it.

    Args:
        model: from `load_sharded`, before or after `shard`; without adapters.
        folder: to make, on a file system that all ranks share; nothing is there until all of it is.
        max_shard_size: of a file.
        force: replace the checkpoint that lies there.

    Returns:
        Names of the files.

    Raises:
        ConfigurationError: ``folder`` exists, or adapters are on the model.
        CheckpointError: a rank could not write.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    target = Path(folder).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        place = ""
        files: dict[str, list[_Entry]] = {}
        with together("no checkpoint was written"):
            if getattr(model, "peft_config", None):
                raise ConfigurationError(
                    "save_packed writes the base model; save adapters with `save_pretrained`, or take them "
                    "off first (`model.unload()`)"
                )
            files = _files(_entries(model), parse_size(max_shard_size))
            if rank == 0:
                source = Path(model.name_or_path)
                check_target(target, source, force)
                place = str(stack.enter_context(workplace(target, source, force, "saving")))
        place = from_first(place)
        with together("no checkpoint was written"):
            if rank == 0:
                for name, entries in files.items():
                    begin(Path(place) / name, entries)
        with together("no checkpoint was written"):
            for name, entries in files.items():
                _write(Path(place) / name, entries, rank)
        with together("no checkpoint was written"):
            if rank == 0:
                _finish(Path(place), files, model)
                stack.close()
    return list(files)


def _entries(model: PreTrainedModel) -> list[_Entry]:
    """What `save_pretrained` writes of a packed model, by key."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    skipped = {*ties, *(model._keys_to_ignore_on_save or ())}
    linears: dict[str, Any] = {}
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        if state is not None and type(module._parameters["weight"]).__name__ != "Params4bit":
            linears[f"{name}.weight"] = module
    found: list[_Entry] = []
    for key, tensor in model.state_dict().items():
        if key in skipped or not isinstance(tensor, torch.Tensor):
            continue
        dtype, shape = tensor.dtype, tuple(tensor.shape)
        if key in linears:  # its bytes alone are the parameter here
            dtype = linears[key].quant_storage
            shape = (tensor.numel() // dtype.itemsize, 1)
            for suffix, value in linears[key].quant_state.as_dict(packed=True).items():
                found.append(_Entry(f"{key}.{suffix}", value.dtype, tuple(value.shape), value))
        found.append(_Entry(key, dtype, shape, tensor))
    return found


def _files(entries: list[_Entry], size: int) -> dict[str, list[_Entry]]:
    """Which file holds what, the same on every rank."""
    groups: list[list[_Entry]] = [[]]
    held = 0
    for entry in entries:
        if groups[-1] and held + entry.nbytes > size:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.nbytes
    names = [SINGLE]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return {name: in_order(group) for name, group in zip(names, groups, strict=True)}


def _write(file: Path, entries: list[_Entry], rank: int) -> None:
    """This rank's bytes of a file."""
    with Writing(file, entries) as writing:
        for entry in entries:
            for at, piece in entry.pieces(rank):
                writing.write(entry.key, at, piece)


def _finish(place: Path, files: dict[str, list[_Entry]], model: PreTrainedModel) -> None:
    if len(files) > 1:
        weight_map = {entry.key: name for name, entries in files.items() for entry in entries}
        total = sum(entry.nbytes for entries in files.values() for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (place / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    save_configuration(model, place)  # last of all, since nothing loads without it
