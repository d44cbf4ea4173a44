"""Packed experts of a checkpoint straight into their places on a GPU, through pinned memory.

transformers hands each stored tensor to a pool of threads that copies it from the mapped file to the device,
which goes through a small buffer of the driver. Packed experts are few and large, and are stored as they are
kept; so the pool's order is taken back (a `Future` that has not begun can be cancelled, one that has is
used), and a few threads copy pieces of the file into pinned memory, from where asynchronous transfers fill
the final tensors. Nothing beside those and a few pieces is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import expand_device_map

from fourfold.loading.converters import copy_of
from fourfold.loading.headers import DTYPE_NAMES
from fourfold.loading.staging import staging_memory
from fourfold.loading.stored import StoredTensors, Unchanged

PIECE_BYTES = 8 * 2**20
THREADS = 4
_DEVICES = ("cuda",)


@torch.no_grad()  # (threads have a mode of their own)
def _copy_piece(source: torch.Tensor, place: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
    if stream is None:
        place.copy_(source)
        return
    host = staging_memory(source.shape, source.dtype, pinned=True).copy_(source)
    with torch.cuda.stream(stream):
        place.copy_(host, non_blocking=True)


class AheadReader:
    """Reads whole tensors, all that were asked for, from the moment when the first is taken.

    Args:
        stored: the checkpoint's files.
        wanted: name of a parameter to its shape, dtype and device.
    """

    def __init__(
        self,
        stored: StoredTensors,
        wanted: Mapping[str, tuple[torch.Size, torch.dtype, torch.device]],
    ) -> None:
        self.stored = stored
        self._wanted = wanted
        self._asked: list[tuple[str, str]] = []
        self._reading: dict[str, tuple[torch.Tensor, list[Future[None]]]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> AheadReader:
        return self  # the loader copies converters for every key

    def ask(self, name: str, key: str) -> bool:
        """Whether ``key`` will be read here as parameter ``name``."""
        wanted = self._wanted.get(name)
        if wanted is None or key not in self.stored.headers or self._pool is not None:
            return False
        shape, dtype, device = wanted
        header = self.stored.headers[key]
        if device.type not in _DEVICES or (header.shape, header.dtype) != (tuple(shape), DTYPE_NAMES[dtype]):
            return False
        self._asked.append((name, key))
        return True

    def withdraw(self) -> None:
        """The last `ask` is not needed after all."""
        self._asked.pop()

    def take(self, name: str) -> torch.Tensor:
        """The tensor, on its device; waits for it."""
        if self._pool is None:
            self._start()
        place, pieces = self._reading.pop(name)
        for piece in pieces:
            piece.result()
        return place

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fourfold-read")
        for name, key in self._asked:
            shape, dtype, device = self._wanted[name]
            with torch.device("cpu"):  # models are made under another default
                source = self.stored.slice(key)[...]
            place = torch.empty(shape, dtype=dtype, device=device)
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            source_b, place_b = (t.contiguous().view(-1).view(torch.uint8) for t in (source, place))
            pieces = zip(source_b.split(PIECE_BYTES), place_b.split(PIECE_BYTES), strict=True)
            running = [self._pool.submit(_copy_piece, a, b, stream) for a, b in pieces]
            self._reading[name] = (place, running)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()
        self.stored.close()


class AheadConverter(WeightConverter):
    """Takes one stored tensor as it is, by way of an `AheadReader` where that reads it."""

    __slots__ = ("reader",)

    @classmethod
    def of(cls, leaf: str, reader: AheadReader) -> AheadConverter:
        """For parameters called ``leaf`` (whole components of a name)."""
        made = cls([rf"(?<=\.){re.escape(leaf)}$"], [leaf], [Unchanged(reader)])
        made.reader = reader
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> AheadConverter:
        return copy_of(self)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        reader: AheadReader | None = getattr(self, "reader", None)
        if reader is not None and isinstance(future, Future) and reader.ask(target_key, source_key):
            if future.cancel():
                future = _Ahead(reader, target_key)
            else:
                reader.withdraw()
        super().add_tensor(target_key, source_key, source_pattern, future)


class _Ahead:
    """A tensor that is waited for when called."""

    def __init__(self, reader: AheadReader, name: str) -> None:
        self.reader, self.name = reader, name

    def __call__(self) -> torch.Tensor:
        return self.reader.take(self.name)


def packed_places(
    model: Any, names: Iterable[str], device_map: Mapping[str, Any] | None
) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    """Shape, dtype and device of every packed tensor of the modules called ``names``."""
    tensors = {
        f"{name}.{leaf}": tensor
        for name in names
        for leaf, tensor in model.get_submodule(name).named_parameters(recurse=False)
        if not tensor.is_floating_point()  # else not packed, and the loader may want it in another dtype
    }
    devices = expand_device_map(device_map, list(tensors))
    return {name: (t.shape, t.dtype, torch.device(devices[name])) for name, t in tensors.items()}
