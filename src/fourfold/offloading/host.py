"""Host memory for packed experts: pinned where that is to be had, and how much there is.

A copy from pinned memory runs beside what the host and the device do; one from pageable memory goes through
a small buffer of the driver and holds up the host. torch's own pinned allocator rounds sizes up to powers of
two (17 GB of experts would take 22), so pages are asked for from the system and registered with the driver as
they are.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import ConfigurationError
from fourfold.offloading.mapped import region_of

_MEMINFO = Path("/proc/meminfo")
# Of the memory group of this process, version 2 and version 1: its folder, limit, use, and what of the use is
# files that the system would drop.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


class _Pages(mmap.mmap):
    """Pages of the system that take their registration back before they go."""

    registered_at: int | None = None

    def __del__(self) -> None:
        if self.registered_at is not None:
            try:
                torch.cuda.cudart().cudaHostUnregister(self.registered_at)
            except Exception:  # the process is ending, and the driver may be gone already
                pass


def _new_pages(nbytes: int) -> _Pages:
    private = getattr(mmap, "MAP_PRIVATE", None)  # (a system without it knows no other kind)
    if private is None:
        return _Pages(-1, nbytes)
    return _Pages(-1, nbytes, flags=private | mmap.MAP_ANONYMOUS)


def _register(address: int, nbytes: int) -> str | None:
    """Pin pages; returns why not."""
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(address, nbytes, 0))
    if status == 0:
        return None
    _take_error()
    return f"cudaHostRegister returned {status} ({torch.cuda.CudaError(status)})"


def _take_error() -> None:
    """The runtime keeps an error for whoever asks next, which would be torch after some later kernel."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _pinned_by_torch(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """From torch's own allocator, where the system registers no pages; None where that has none either, or
    its rounding up might not leave room.
    """
    free = available_bytes()
    if free is not None and free < 2 * torch.Size(shape).numel() * dtype.itemsize:
        return None
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return None


class HostMemory:
    """Gives out host memory, and knows whether it is pinned.

    Args:
        pin: True refuses memory that is not, False asks for none; None takes what there is.

    Attributes:
        unpinned: why memory is not pinned; None while all of it is.

    Raises:
        ConfigurationError: pinned memory was asked for, and there is no CUDA.
    """

    def __init__(self, pin: bool | None = None) -> None:
        self._pin, self.unpinned = pin, self._cannot() if pin is None or pin else "it was not asked for"
        if pin and self.unpinned is not None:
            raise ConfigurationError(f"pin=True: {self.unpinned}; leave it None to take pageable memory")

    @staticmethod
    def _cannot() -> str | None:
        return None if torch.cuda.is_available() else "there is no CUDA device to pin memory for"

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of whole pages.

        Raises:
            ConfigurationError: it has to be pinned and cannot be.
        """
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        with torch.device("cpu"), torch.inference_mode(False):  # (models are made under another default)
            if not nbytes:
                return torch.empty(shape, dtype=dtype)
            pages = _new_pages(nbytes)
            tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
        if self.unpinned is None:
            reason = _register(tensor.data_ptr(), nbytes)
            if reason is None:
                pages.registered_at = tensor.data_ptr()
                return tensor
            with torch.device("cpu"), torch.inference_mode(False):
                pinned = _pinned_by_torch(shape, dtype)
            if pinned is not None:
                return pinned
            if self._pin:
                raise ConfigurationError(
                    f"pin=True: {nbytes / 2**20:.0f} MiB of host memory could not be pinned, {reason}. Raise "
                    "the limit of locked memory (`ulimit -l`), or leave pin None to take pageable memory"
                )
            self.unpinned = reason  # (and nothing more is tried: what is left would be refused as well)
        return tensor

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in such memory already (one that is mapped from a file does not)."""
        if tensor.device.type != "cpu" or region_of(tensor) is not None:
            return False
        return self.unpinned is not None or tensor.is_pinned()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` here; the tensor itself where it already is what is wanted."""
        if self.has(tensor):
            return tensor
        with torch.no_grad():
            return self.empty(tensor.shape, tensor.dtype).copy_(tensor.detach())


def available_bytes() -> int | None:
    """Host memory that can still be had, as the system and this process's group say; None if neither does."""
    found = []
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    for folder, limit, use, files in _GROUPS:
        try:
            left = int((folder / limit).read_text()) - int((folder / use).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found.append(left + sum(int(stat.get(name, 0)) for name in files))
            break
        except (OSError, ValueError):  # ("max" is no number)
            continue
    return min(found) if found else None


def check_room(nbytes: int, what: str) -> None:
    """Host memory must have room for ``nbytes`` more.

    Raises:
        ConfigurationError: with both figures.
    """
    free = available_bytes()
    if free is not None and nbytes > free:
        gc.collect()  # (a deleted model's experts are in a circle with what brought them)
        free = available_bytes()
    if free is not None and nbytes > free:
        raise ConfigurationError(
            f"{what} take {nbytes / 2**30:.2f} GiB of host memory, and {max(0, free) / 2**30:.2f} GiB can be "
            "had. Keep more of them on the device (a larger `budget`), choose a smaller format, end other "
            "programs, or leave them on disk (experts_device='disk', of a checkpoint that is packed)"
        )
