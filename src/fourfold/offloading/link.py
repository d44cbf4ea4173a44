"""How fast experts come: from host memory to a GPU, and from disk."""

from __future__ import annotations

import time

import torch

from fourfold.offloading.host import HostMemory

PIECE_BYTES = 300 * 2**20  # about a layer's experts
REPEATS = 10


def measure_link(device: torch.device, nbytes: int = PIECE_BYTES, repeats: int = REPEATS) -> float:
    """Bytes a second from host memory (pinned, where that can be had) to ``device``; waits for it."""
    source = HostMemory().empty((nbytes,), torch.uint8).fill_(1)
    place = torch.empty(nbytes, dtype=torch.uint8, device=device)
    place.copy_(source, non_blocking=True)
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        place.copy_(source, non_blocking=True)
    _wait(device)
    return repeats * nbytes / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
