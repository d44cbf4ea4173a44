"""Reading the slices of a checkpoint, a bounded number of them ahead.

transformers reads with four threads unless it quantizes on the fly: threads that run ahead of the quantizer
would fill the device with bf16 weights. Here the number of bytes that may lie ahead is bounded instead, so
that the disk and the bus work while the device packs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from transformers.utils import is_env_variable_true

from fourfold.loading import staging
from fourfold.loading.staging import Deferred, deferred, read_staged

Slice: TypeAlias = "torch.Tensor | Future[torch.Tensor] | Callable[[], torch.Tensor]"
AHEAD_BYTES = 12 * 2**20
# A single slice may be read ahead up to this size: with what packing it takes (twice and a half, INT8), the
# peak stays below one matrix and 64 MiB.
AHEAD_SINGLE_BYTES = 24 * 2**20
THREADS = 4


def read_slice(source: Slice) -> torch.Tensor | None:
    """Materialise one slice: from disk to its device, in the loading dtype."""
    if isinstance(source, Future):
        return source.result()
    return source if isinstance(source, torch.Tensor) else source()


def slices_ahead(nbytes: int) -> int:
    """How many slices of ``nbytes`` may be in memory beside the one that is being packed."""
    return AHEAD_BYTES // nbytes or int(nbytes <= AHEAD_SINGLE_BYTES)


def staged(sources: Sequence[Slice], group_bytes: int = staging.GROUP_BYTES) -> list[Deferred] | None:
    """The sources as `loading.staging` reads them; None where one is no small slice on its way to a GPU."""
    if is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD"):
        return None
    found: list[Deferred] = []
    for source in sources:
        known = deferred(source)
        if known is None or known.device.type != "cuda" or known.nbytes > group_bytes:
            return None
        found.append(known)
    return found or None


def read_slices(sources: Iterable[Slice]) -> Iterator[torch.Tensor | None]:
    """Materialise slices in order; on a GPU, later ones are read meanwhile by other threads.

    Small slices of files go to a GPU in groups (`loading.staging`, which holds its sources until the last one
    is read). Other sources are let go of as soon as they are read. (Slices that are views of a mapped file
    cost nothing to read on a CPU, so nothing is read ahead there.)
    """
    waiting: deque[Slice] = deque(sources)
    if not waiting:
        return
    known = staged(waiting, staging.SLICES_GROUP_BYTES)
    if known is not None:
        waiting.clear()
        yield from read_staged(known, THREADS)
        return
    first = read_slice(waiting.popleft())
    yield first
    ahead = 0 if first is None or first.device.type == "cpu" else slices_ahead(max(1, first.nbytes))
    del first
    if not ahead or is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD"):
        while waiting:
            yield read_slice(waiting.popleft())
        return
    running: deque[Future[torch.Tensor | None]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fourfold-read") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < ahead:
                    running.append(pool.submit(read_slice, waiting.popleft()))
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
