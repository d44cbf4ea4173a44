"""A packed checkpoint written from shards: every rank writes its rows into the same files.

A tensor lies in a safetensors file as one run of bytes, row after row, and a shard is a run of rows: so the
first rank makes each file with its header and at its length, and all ranks write their runs into it. Nothing
is gathered anywhere. What comes out is what `save_pretrained` writes of the whole model.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold.distributed.cut import Part
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.loading.headers import INDEX, SINGLE
from fourfold.loading.quantize import DEFAULT_SHARD_SIZE, save_configuration
from fourfold.loading.shards import parse_size
from fourfold.loading.workplace import check_target, workplace

_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_PIECE = 64 * 2**20


@dataclass(frozen=True)
class _Entry:
    """One tensor of the checkpoint, whole or this rank's rows of it."""

    key: str
    tensor: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

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
        data = torch.Tensor(tensor.detach()).contiguous().view(-1).view(torch.uint8)
        for at in range(0, data.numel(), _PIECE):
            yield start + at, data[at : at + _PIECE].cpu()


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
    if getattr(model, "peft_config", None):
        raise ConfigurationError(
            "save_packed writes the base model; save adapters with `save_pretrained`, or take them off first "
            "(`model.unload()`)"
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    target = Path(folder).expanduser().absolute()
    size = parse_size(max_shard_size)
    files = _files(_entries(model), size)
    with contextlib.ExitStack() as stack:
        place = ""
        with _together("no checkpoint was written"):
            if rank == 0:
                source = Path(model.name_or_path)
                check_target(target, source, force)
                place = str(stack.enter_context(workplace(target, source, force, "saving")))
        place = _from_first(place)
        with _together("no checkpoint was written"):
            if rank == 0:
                for name, entries in files.items():
                    _begin(Path(place) / name, entries)
        with _together("no checkpoint was written"):
            for name, entries in files.items():
                _write(Path(place) / name, entries, rank)
        with _together("no checkpoint was written"):
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
                found.append(_Entry(f"{key}.{suffix}", value, value.dtype, tuple(value.shape)))
        found.append(_Entry(key, tensor, dtype, shape))
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
    # (large elements first, as safetensors lays them out: every tensor is aligned then)
    return {
        name: sorted(group, key=lambda e: (-e.dtype.itemsize, e.key))
        for name, group in zip(names, groups, strict=True)
    }


def _header(entries: list[_Entry]) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a file, where each tensor begins in it, and how long it is."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    at = 0
    for entry in entries:
        begins[entry.key] = at
        described[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: len(head) + begin for key, begin in begins.items()}, len(head) + at


def _begin(file: Path, entries: list[_Entry]) -> None:
    head, _, length = _header(entries)
    with file.open("wb") as handle:
        handle.write(head)
        handle.truncate(length)


def _write(file: Path, entries: list[_Entry], rank: int) -> None:
    """This rank's bytes of a file."""
    _, begins, _ = _header(entries)
    handle = os.open(file, os.O_WRONLY)
    try:
        for entry in entries:
            for at, piece in entry.pieces(rank):
                data = memoryview(piece.numpy())
                while data:
                    written = os.pwrite(handle, data, begins[entry.key] + at)
                    data, at = data[written:], at + written
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish(place: Path, files: dict[str, list[_Entry]], model: PreTrainedModel) -> None:
    if len(files) > 1:
        weight_map = {entry.key: name for name, entries in files.items() for entry in entries}
        total = sum(entry.nbytes for entries in files.values() for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (place / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    save_configuration(model, place)  # last of all, since nothing loads without it


def _from_first(value: str) -> str:
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


@contextlib.contextmanager
def _together(otherwise: str) -> Iterator[None]:
    """What fails on one rank fails on all: none waits for one that is gone."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [(rank, text) for rank, text in enumerate(said) if text is not None]
    if failed:
        raise CheckpointError(f"{otherwise}: rank {failed[0][0]} failed with {failed[0][1]}")
