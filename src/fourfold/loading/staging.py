"""From the page cache to a GPU through pinned memory, several slices by one transfer.

A slice of a checkpoint is a view of a mapped file. Copying such memory to a GPU goes through a small buffer
of the driver, one copy after the other; experts are slices of a few megabytes, 18,000 of them in
Qwen3-30B-A3B. Here several threads copy slices side by side into pinned memory, from where one asynchronous
transfer brings a group of them to the device. (Stock loading in bf16 takes the driver's way.)

transformers hands a slice to a converter as a function without arguments. What it closes over (the slice, its
device and dtype) is read off that function; where another version writes it otherwise, nothing is recognised,
and slices are read by calling it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

# With what packing takes beside, what is under way stays below 64 MiB: a group that is packed as it arrives
# (INT8 takes once and a half as much again), or slices that a batch is put together from first.
GROUP_BYTES = 12 * 2**20
SLICES_GROUP_BYTES = 6 * 2**20
GROUPS_AHEAD = 3
_CLOSES_OVER = {"tensor", "tensor_idx", "device", "dtype", "sharding_op"}


@dataclass(frozen=True)
class Deferred:
    """A slice that was not read yet: where it lies, and as what it is wanted."""

    tensor: Any  # safetensors' slice of a file, or a tensor on a CPU
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def deferred(source: Any) -> Deferred | None:
    """What a loader's function would read; None where it is not known to do that and nothing else."""
    code = getattr(source, "__code__", None)
    if code is None or getattr(source, "__module__", None) != "transformers.core_model_loading":
        return None
    try:
        values = {
            name: cell.cell_contents
            for name, cell in zip(code.co_freevars, source.__closure__ or (), strict=True)
        }
    except ValueError:  # a cell that is empty
        return None
    if values.keys() != _CLOSES_OVER or values["sharding_op"] is not None:
        return None
    tensor, dtype = values["tensor"], values["dtype"]
    if isinstance(tensor, torch.Tensor):
        shape, on_cpu = tuple(tensor.shape), tensor.device.type == "cpu"
    elif hasattr(tensor, "get_shape"):
        shape, on_cpu = tuple(tensor.get_shape()), True
    else:
        return None
    if not on_cpu or not isinstance(dtype, torch.dtype) or values["device"] is None:
        return None
    return Deferred(tensor, torch.device(values["device"]), dtype, shape)


def groups_of(slices: Sequence[Deferred], group_bytes: int) -> Iterator[Sequence[Deferred]]:
    """Neighbours of one shape, dtype and device, up to ``group_bytes`` together, in order."""
    start = 0
    for i, item in enumerate(slices):
        first = slices[start]
        alike = (item.shape, item.dtype, item.device) == (first.shape, first.dtype, first.device)
        if i > start and (not alike or (i - start + 1) * first.nbytes > group_bytes):
            yield slices[start:i]
            start = i
    if slices:
        yield slices[start:]


def staging_memory(size: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Host memory to transfer from; pageable where the host lends no (more) pinned memory: slower, as good.

    torch keeps pinned blocks for the next caller, and gives one out again only when its transfer is done.
    """
    try:
        return torch.empty(size, dtype=dtype, pin_memory=pinned)
    except RuntimeError:
        return torch.empty(size, dtype=dtype)


@torch.no_grad()  # each thread has a mode of its own, and a state dict may hold parameters
def read_group(group: Sequence[Deferred], stream: torch.cuda.Stream | None) -> torch.Tensor:
    """The slices of a group ``[G, ...]`` on their device, in their dtype; ``stream``: where they are used."""
    first = group[0]
    host = staging_memory((len(group), *first.shape), first.dtype, pinned=stream is not None)
    for place, item in zip(host, group, strict=True):
        place.copy_(item.tensor[...])
    if stream is None:
        return host
    with torch.cuda.stream(stream):
        return host.to(first.device, non_blocking=True)


def read_groups(
    slices: Sequence[Deferred], threads: int, group_bytes: int = GROUP_BYTES
) -> Iterator[torch.Tensor]:
    """Groups ``[G, ...]`` in order, `GROUPS_AHEAD` of them under way, the one that is handed out among them.

    (See `groups_of`. Whoever takes them lets go of each before asking for the next.)
    """
    waiting = deque(groups_of(slices, group_bytes))
    running: deque[Future[torch.Tensor]] = deque()
    devices = {item.device for item in slices if item.device.type == "cuda"}
    streams = {device: torch.cuda.current_stream(device) for device in devices}
    with ThreadPoolExecutor(threads, thread_name_prefix="fourfold-read") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < GROUPS_AHEAD:
                    group = waiting.popleft()
                    running.append(pool.submit(read_group, group, streams.get(group[0].device)))
                    del group
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_staged(slices: Sequence[Deferred], threads: int) -> Iterator[torch.Tensor]:
    """Slices in order, one by one; see `read_groups`."""
    for group in read_groups(slices, threads, SLICES_GROUP_BYTES):
        yield from group.unbind()
