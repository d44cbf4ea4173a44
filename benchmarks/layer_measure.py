"""Milliseconds, peak memory and synchronisations of a call."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # more than any cache: a layer of a model finds the caches full of other layers


def _milliseconds(call: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def time_call(
    call: Callable[[], Any], device: torch.device, budget: float, least: int = 5, most: int = 50
) -> tuple[float, int]:
    """Median milliseconds and how many calls it is the median of; about ``budget`` seconds of calls.

    Two calls come first: compilation, allocation. The second says how many repeats there is time for.
    """
    _milliseconds(call, 1, device)
    (once,) = _milliseconds(call, 1, device)
    repeats = max(least, min(most, int(budget * 1e3 / max(once, 1e-3))))
    return statistics.median(_milliseconds(call, repeats, device)), repeats


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """What a call allocates beyond what lay there before (0 where nothing is counted, on a CPU)."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronisations(call: Callable[[], Any], device: torch.device) -> int:
    """How often a call makes the host wait for the device."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any] | str:
    """The call as one CUDA graph, which leaves out what the host takes to launch it; or why it is none.

    Calls that wait for the device cannot be captured.
    """
    if device.type != "cuda":
        return "no CUDA device"
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is allocated or compiled at first use
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        torch.cuda.synchronize(device)
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return graph.replay
