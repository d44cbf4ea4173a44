"""Packed experts of a checkpoint straight into their places on a GPU, through pinned memory.

transformers hands each stored tensor to a pool of threads that copies it from the mapped file to the device,
which goes through a small buffer of the driver. Packed experts are few and large, and are stored as they are
kept; so the pool's order is taken back (a `Future` that has not begun can be cancelled, one that has is
used), and a few threads copy pieces of the file into pinned memory, from where asynchronous transfers fill
the final tensors. Nothing beside those and a few pieces is allocated.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import expand_device_map

from fourfold.loading.converters import copy_of
from fourfold.loading.headers import DTYPE_NAMES
from fourfold.loading.staging import staging_memory
from fourfold.loading.stored import StoredTensors, Unchanged
from fourfold.offloading.host import HostMemory

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
    """Reads whole tensors from the moment when each is begun, in that order.

    Nothing waits for the loader to come to the first of them: it goes through the tensors by name, and would
    first sit out the output layer and the embeddings, a quarter of a 12-layer Qwen3-30B-A3B in NF4.

    Args:
        stored: the checkpoint's files.
        wanted: name of a parameter to its shape and dtype.
        device_map: of parameters or of the modules that hold them.
        host: host memory where the tensors stay; None reads to their devices.

    Attributes:
        device_map: as above; an automatic one is known only after the converters are made, and set then.
        nbytes: of all tensors begun.
    """

    def __init__(
        self,
        stored: StoredTensors,
        wanted: Mapping[str, tuple[torch.Size, torch.dtype]],
        device_map: Mapping[str, Any] | None,
        host: HostMemory | None = None,
    ) -> None:
        self.stored, self.host = stored, host
        self.device_map = device_map
        self.nbytes = 0
        self._wanted = wanted
        self._reading: dict[str, tuple[torch.Tensor, list[Future[None]]]] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fourfold-read")
        # A load that raises elsewhere never closes its reader; what is queued would go on being read into
        # memory that nobody has.
        self._abandon = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> AheadReader:
        return self  # the loader copies converters for every key

    def converters(self) -> list[AheadConverter]:
        return converters_of(self._wanted, self, on_host=self.host is not None)

    def _device(self, name: str) -> torch.device:
        return torch.device(expand_device_map(self.device_map, [name])[name])

    def reads(self, name: str, key: str) -> bool:
        """Whether stored tensor ``key`` can be read here as parameter ``name``: nothing to convert."""
        wanted, header = self._wanted.get(name), self.stored.headers.get(key)
        if wanted is None or header is None:
            return False
        if self.host is None and self._device(name).type not in _DEVICES:
            return False
        return (header.shape, header.dtype) == (tuple(wanted[0]), DTYPE_NAMES[wanted[1]])

    def takes_over(self, future: Any) -> bool:
        """Whether what the loader handed in has not begun, and is read here instead.

        (For host memory nothing is lost where it has: see `converters_of`.)
        """
        begun = not isinstance(future, Future) or not future.cancel()
        return self.host is not None or not begun

    def begin(self, name: str, key: str) -> None:
        """Start reading ``key`` as parameter ``name``."""
        shape, dtype = self._wanted[name]
        with torch.device("cpu"):  # models are made under another default
            source = self.stored.slice(key)[...]
        if self.host is not None:
            place, stream = self.host.empty(shape, dtype), None
        else:
            device = self._device(name)
            place = torch.empty(shape, dtype=dtype, device=device)
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        source_b, place_b = (t.contiguous().view(-1).view(torch.uint8) for t in (source, place))
        pieces = zip(source_b.split(PIECE_BYTES), place_b.split(PIECE_BYTES), strict=True)
        self._reading[name] = (place, [self._pool.submit(_copy_piece, a, b, stream) for a, b in pieces])
        self.nbytes += place.nbytes

    def take(self, name: str) -> torch.Tensor:
        """The tensor, on its device; waits for it. What a piece raised is raised, and ends all reading."""
        place, pieces = self._reading.pop(name)
        try:
            for piece in pieces:
                piece.result()
        except BaseException:
            self.close()
            raise
        return place

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()
        self.stored.close()


class Reader(Protocol):
    """What reads stored tensors in the loader's place: see `AheadReader`."""

    def reads(self, name: str, key: str) -> bool: ...

    def takes_over(self, future: Any) -> bool: ...

    def begin(self, name: str, key: str) -> None: ...

    def take(self, name: str) -> torch.Tensor: ...


class AheadConverter(WeightConverter):
    """Takes one stored tensor as it is, by way of a `Reader` where that reads it."""

    __slots__ = ("reader",)

    @classmethod
    def of(cls, leaf: str, reader: Reader) -> AheadConverter:
        """For parameters called ``leaf`` (whole components of a name)."""
        made = cls([rf"(?<=\.){re.escape(leaf)}$"], [leaf], [Unchanged(reader)])
        made.reader = reader
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> AheadConverter:
        return copy_of(self)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        reader: Reader | None = getattr(self, "reader", None)
        if reader is not None and reader.reads(target_key, source_key) and reader.takes_over(future):
            _force_cpu(self, False)  # (what the reader gives out is not brought anywhere)
            reader.begin(target_key, source_key)
            future = _Ahead(reader, target_key)
        super().add_tensor(target_key, source_key, source_pattern, future)


def converters_of(wanted: Iterable[str], reader: Reader, *, on_host: bool) -> list[AheadConverter]:
    """One for every last component of a name.

    Args:
        wanted: names of parameters.
        reader: reads them.
        on_host: whether they do not go to their devices. The loader's threads, which may begin to read a
            tensor before it is taken over, then make a view of the file of it instead of a copy on the device
            (in versions of transformers whose converters can say so).
    """
    made = [AheadConverter.of(leaf, reader) for leaf in {name.rpartition(".")[2]: None for name in wanted}]
    for converter in made:
        _force_cpu(converter, on_host)
    return made


def _force_cpu(converter: Any, value: bool) -> None:
    if hasattr(converter, "force_cpu"):
        converter.force_cpu = value


class _Ahead:
    """A tensor that is waited for when called."""

    def __init__(self, reader: Reader, name: str) -> None:
        self.reader, self.name = reader, name

    def __call__(self) -> torch.Tensor:
        return self.reader.take(self.name)


def packed_tensors(model: Any, modules: Iterable[str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every packed tensor of the modules called ``modules``, by full name.

    (What is floating point is not packed, and the loader may want it in another dtype.)
    """
    return {
        f"{name}.{leaf}": (tensor.shape, tensor.dtype)
        for name in modules
        for leaf, tensor in model.get_submodule(name).named_parameters(recurse=False)
        if not tensor.is_floating_point()
    }
