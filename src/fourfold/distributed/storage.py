"""Where PyTorch's distributed checkpointing (DCP) keeps a checkpoint: safetensors and JSON, nothing pickled.

DCP's own storage writes its index (``.metadata``) and everything that is no tensor as pickles, and a pickle
runs what whoever wrote it wants, when it is opened. Here each rank writes its parts of tensors into one
safetensors file, and the first rank an index in JSON, last of all: without one there is no checkpoint.
Cutting tensors anew for another number of ranks is DCP's, as ever.

    checkpoint.json                format, tensors with their parts, plain values
    0c4f2a91-00000.safetensors     of rank 0
    0c4f2a91-00001.safetensors     of rank 1

Names of files are new in each save: the checkpoint that was there is one until all of the new one is there.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from fourfold.distributed.plain_values import Whole, decoded, encoded
from fourfold.distributed.tensor_file import DTYPES, Entry, Writing, begin, dtype_name, in_order, pieces
from fourfold.errors import CheckpointError

INDEX = "checkpoint.json"
FORMAT = "fourfold.sharded"
VERSION = 1
_SUFFIX = ".safetensors"
_OWN = re.compile(r"[0-9a-f]{8}-\d{5,}\.safetensors")


@dataclass(frozen=True)
class _Stored:
    """Where one part of a tensor lies."""

    file: str
    key: str


class PlainSavePlanner(DefaultSavePlanner):
    """DCP's planner; what is no tensor becomes JSON."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            name = write_item.index.fqn
            value = object.value if isinstance(object, Whole) else object
            return io.BytesIO(json.dumps(encoded(value, name)).encode())
        return object


class PlainLoadPlanner(DefaultLoadPlanner):
    """DCP's planner; what is no tensor comes from JSON."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        target, *path = self.mappings[name]
        place: Any = self.original_state_dict
        for step in path:
            place, target = place[target], step
        place[target] = decoded(json.loads(value.getvalue()))


class PlainWriter(StorageWriter):
    """Writes the parts of this rank; on the first one, the index."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        save = secrets.token_hex(4)
        return [replace(plan, storage_data=f"{save}-{rank:05d}{_SUFFIX}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name: str = plan.storage_data
        results: list[WriteResult] = []
        tensors: dict[str, tuple[WriteItem, Entry]] = {}
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                data: Any = planner.resolve_data(item)
                text = data.getvalue().decode()
                results.append(WriteResult(item.index, len(text), text))
                continue
            described: Any = item.tensor_data
            if not described.chunk.sizes.numel():
                results.append(WriteResult(item.index, 0, None))
                continue
            key = f"{item.index.fqn}@{','.join(map(str, described.chunk.offsets))}"
            tensors[key] = (item, Entry(key, described.properties.dtype, tuple(described.chunk.sizes)))
        entries = in_order(entry for _, entry in tensors.values())
        if entries:
            file = self.folder / name
            begin(file, entries)
            with Writing(file, entries) as writing:
                for entry in entries:
                    item = tensors[entry.key][0]
                    tensor: Any = planner.resolve_data(item)  # (one at a time on the CPU)
                    for at, piece in pieces(tensor):
                        writing.write(entry.key, at, piece)
                    results.append(WriteResult(item.index, entry.nbytes, _Stored(name, entry.key)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {
            r.index: r.storage_data for of_rank in results for r in of_rank if r.storage_data is not None
        }
        tensors: dict[str, Any] = {}
        for name, found in metadata.state_dict_metadata.items():
            if not isinstance(found, TensorStorageMetadata):
                continue
            chunks = [chunk for chunk in found.chunks if chunk.sizes.numel()]  # (a rank may have no rows)
            parts = [(chunk, stored[MetadataIndex(name, chunk.offsets)]) for chunk in chunks]
            tensors[name] = {
                "dtype": dtype_name(name, found.properties.dtype),
                "shape": list(found.size),
                "parts": [
                    {"offsets": list(c.offsets), "sizes": list(c.sizes), "file": at.file, "key": at.key}
                    for c, at in parts
                ],
            }
        used = {at.file for at in stored.values() if isinstance(at, _Stored)}
        missing = sorted(file for file in used if not (self.folder / file).is_file())
        if missing:
            raise CheckpointError(
                f"{self.folder / missing[0]} was written by another rank and is not here: checkpoints must "
                "lie in a folder that the machines of all ranks share. Name one"
            )
        plain = {index.fqn: json.loads(text) for index, text in stored.items() if isinstance(text, str)}
        index = {"format": FORMAT, "version": VERSION, "tensors": tensors, "values": plain}
        part = self.folder / f".{INDEX}.part"
        with part.open("w", encoding="utf-8") as handle:
            json.dump(index, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(self.folder / INDEX)
        for file in self.folder.glob(f"*{_SUFFIX}"):  # of the checkpoint that was there
            if _OWN.fullmatch(file.name) and file.name not in used:
                file.unlink(missing_ok=True)


class PlainReader(StorageReader):
    """Reads the parts that this rank needs.

    Raises:
        CheckpointError: the folder holds no checkpoint of this kind, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None and Path(checkpoint_id) != self.folder:
            self.folder, self.metadata = Path(checkpoint_id), None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return PlainWriter.validate_checkpoint_id(checkpoint_id)

    def read_metadata(self) -> Metadata:
        if self.metadata is None:
            try:
                self.metadata = _metadata(self._index())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.folder / INDEX} is damaged ({type(error).__name__}: {error}). Take an earlier "
                    "checkpoint"
                ) from error
        return self.metadata

    def _index(self) -> Any:
        file = self.folder / INDEX
        if not file.is_file():
            if (self.folder / ".metadata").is_file():
                raise CheckpointError(
                    f"{self.folder} holds a checkpoint that torch.distributed.checkpoint wrote with a pickle "
                    "as its index; opening one executes what is in it, so it is not opened. Save anew with "
                    "fourfold.distributed.save_checkpoint in the program that wrote it"
                )
            raise CheckpointError(
                f"{self.folder} holds no checkpoint that fourfold.distributed.save_checkpoint wrote, or one "
                "that was not finished"
            )
        index = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise CheckpointError(
                f"{file} is of format {index['format']} {index['version']}, and this Fourfold reads {FORMAT} "
                f"{VERSION}; use the release that wrote it"
            )
        return index

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        self.metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self.metadata is not None
        stored: dict[MetadataIndex, Any] = self.metadata.storage_data
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(stored[item.storage_index].encode()))
            else:
                by_file[stored[item.storage_index].file].append(item)
        for name, items in by_file.items():
            try:
                with safe_open(self.folder / name, framework="pt") as file:
                    for item in items:
                        self._read(file, item, planner)
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.folder / name} is missing or damaged ({error}). Take an earlier checkpoint"
                ) from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        """Read what one item wants of one part."""
        assert self.metadata is not None
        name = item.storage_index.fqn
        key: str = self.metadata.storage_data[item.storage_index].key
        rows = file.get_slice(key)
        wanted: Any = self.metadata.state_dict_metadata[name]
        offsets = item.storage_index.offset or torch.Size()
        sizes = next(list(c.sizes) for c in wanted.chunks if c.offsets == offsets)
        if rows.get_shape() != sizes or DTYPES.get(rows.get_dtype()) != wanted.properties.dtype:
            raise ValueError(f"{name} is {rows.get_dtype()} {rows.get_shape()} in it, not as {INDEX} says")
        target = planner.resolve_tensor(item)
        if target.dtype != wanted.properties.dtype:
            raise CheckpointError(
                f"{name} is {wanted.properties.dtype} in {self.folder}, and {target.dtype} in this run, "
                "where it would be rounded. Make the adapters in the dtype they were saved in"
            )
        cut = tuple(
            slice(start, start + length)
            for start, length in zip(item.storage_offsets, item.lengths, strict=True)
        )
        target.detach().copy_(rows[cut] if cut else file.get_tensor(key))
        planner.commit_tensor(item, target)


def _metadata(index: Any) -> Metadata:
    """DCP's description of what an index lists.

    Raises:
        ValueError: parts do not make up their tensor, or lie elsewhere than in the folder.
        KeyError, TypeError, AttributeError: something is missing, or of another kind.
    """
    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, Any] = {}
    for name, found in index["tensors"].items():
        shape = _sizes(found["shape"])
        chunks = []
        for part in found["parts"]:
            offsets, sizes = _sizes(part["offsets"]), _sizes(part["sizes"])
            fits = len(offsets) == len(sizes) == len(shape)
            if not fits or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"a part of {name} lies outside of it")
            if Path(part["file"]).name != part["file"] or not part["file"].endswith(_SUFFIX):
                raise ValueError(f"{name} is said to lie in {part['file']!r}")
            chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            stored[MetadataIndex(name, offsets)] = _Stored(part["file"], str(part["key"]))
        complete = sum(c.sizes.numel() for c in chunks) == shape.numel()
        if not complete or len({c.offsets for c in chunks}) < len(chunks):
            raise ValueError(f"the parts of {name} do not make up {list(shape)}")
        described[name] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[found["dtype"]]), shape, chunks)
    for name, value in index["values"].items():
        decoded(value)
        described[name] = BytesStorageMetadata()
        stored[MetadataIndex(name)] = json.dumps(value)
    return Metadata(state_dict_metadata=described, storage_data=stored)


def _sizes(values: Any) -> torch.Size:
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"{values!r:.80} is no shape")
    return torch.Size(values)
