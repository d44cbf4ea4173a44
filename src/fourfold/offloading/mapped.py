"""Safetensors files mapped into memory: tensors whose pages are the file's own.

A mapped tensor takes no memory of the process. Its pages come from the file when they are first read, are
shared with whoever else reads it, and the system drops them again where memory is short. The mapping is
private: what writes into such a tensor (a state being loaded) gets pages of its own, and the file never
changes.

A file that is cut short underneath a map ends the process at the next access (SIGBUS), and one that is
written over gives other numbers. So a file is looked at before each use, which costs a `stat`; where that
shows a change, its length, the hash of its header and samples of its data have to be those that were mapped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import platform
import struct
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import CheckpointError, ConfigurationError

DTYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32}
SAMPLE_BYTES = 64
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_Stamp = tuple[int, int, int, int, int]

_files: weakref.WeakSet[MappedFile] = weakref.WeakSet()


@dataclass(frozen=True)
class Region:
    """A stored tensor, or some of its first axis: where its bytes lie in a file.

    Attributes:
        file: holds it.
        offset: of its first byte there.
        shape: of the tensor.
        dtype: of the tensor.
    """

    file: MappedFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> Region:
        start, stop, _ = rows.indices(self.shape[0])
        row = self.nbytes // self.shape[0]
        return replace(self, offset=self.offset + start * row, shape=(stop - start, *self.shape[1:]))


class _Pages(mmap.mmap):
    """The pages of a file."""

    file: MappedFile


class MappedFile:
    """One safetensors file, mapped.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        regions: of the stored tensors whose dtype packed experts have, by key.

    Raises:
        CheckpointError: it is no safetensors file, or shorter than its header says.
        ConfigurationError: the system cannot do it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(path))  # (whoever looks again may be elsewhere)
        if not hasattr(os, "pread"):
            raise ConfigurationError(
                "experts on disk are read by calls that this system does not have (Linux does); give them "
                "host memory instead (device='cpu')"
            )
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self._fd)
        stat = os.fstat(self._fd)
        self._size, self._known = stat.st_size, _stamp(stat)
        begin, header = self._header()
        self._middles: list[int] = []
        self.regions: dict[str, Region] = {}
        try:
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                start, stop = entry["data_offsets"]
                self._middles.append(begin + (start + stop) // 2)
                if entry["dtype"] not in DTYPES:
                    continue
                region = Region(self, begin + start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
                if start < 0 or region.nbytes != stop - start or begin + stop > self._size:
                    raise ValueError(f"{key} lies outside the file")
                self.regions[key] = region
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        self._print = self._fingerprint(self._fd)
        self._pages = _pages(self._fd, self._size)
        self._pages.file = self  # (tensors hold the pages, and these what watches over the file)
        # (a tensor of it is not kept: pages and tensor would hold each other)
        self._address = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
        _files.add(self)

    def __deepcopy__(self, memo: Any) -> MappedFile:
        return self

    def _damaged(self, why: object) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged ({why}); download or save it again")

    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and what the header says."""
        try:
            (length,) = struct.unpack("<Q", os.pread(self._fd, 8, 0))
            if length > min(_LARGEST_HEADER, self._size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {self._size}")
            header = json.loads(os.pread(self._fd, length, 8))
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
        except (struct.error, ValueError, OSError, RecursionError) as error:
            raise self._damaged(error) from error
        self._begin = 8 + length
        return self._begin, header

    def _fingerprint(self, fd: int) -> tuple[int, str]:
        """Size; hash of the header, and of some bytes in the middle of every tensor."""
        found = hashlib.sha256(os.pread(fd, self._begin, 0))
        for middle in self._middles:
            found.update(os.pread(fd, SAMPLE_BYTES, middle))
        return os.fstat(fd).st_size, found.hexdigest()

    def tensor(self, key: str) -> torch.Tensor:
        """A stored tensor, its pages those of the file."""
        region = self.regions[key]
        with torch.device("cpu"), torch.inference_mode(False):  # (models are made under another default)
            if not region.nbytes:
                return torch.empty(region.shape, dtype=region.dtype)
            if region.offset % region.dtype.itemsize:  # (written by others: numbers that straddle words)
                data = bytearray(os.pread(self._fd, region.nbytes, region.offset))
                return torch.frombuffer(data, dtype=region.dtype).view(region.shape)
            count = math.prod(region.shape)
            flat = torch.frombuffer(self._pages, dtype=region.dtype, count=count, offset=region.offset)
            return flat.view(region.shape)

    def region_of(self, tensor: torch.Tensor) -> Region | None:
        """Where a tensor lies in this file; None where it does not."""
        offset = tensor.data_ptr() - self._address
        if tensor.device.type != "cpu" or not 0 <= offset <= self._size - tensor.nbytes or not tensor.nbytes:
            return None
        return Region(self, offset, tuple(tensor.shape), tensor.dtype)

    def check(self, *, thorough: bool = False) -> None:
        """The file must be the one that was mapped.

        Args:
            thorough: compare length, header and samples also where the system says that nothing changed.

        Raises:
            CheckpointError: it was cut short, written over, or another one lies in its place.
        """
        try:
            stat = os.stat(self.path)
        except OSError:  # gone; the pages stay as long as the file is open
            stat = os.fstat(self._fd)
        stamp, known = _stamp(stat), self._known
        if stamp == known and not thorough:
            return
        same = _inode(stamp) == _inode(known)
        if same or os.fstat(self._fd).st_size == self._size:
            try:
                fd = self._fd if same else os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise self.changed(str(error)) from error
            try:
                found = self._fingerprint(fd)
            finally:
                if not same:
                    os.close(fd)
            if found == self._print:
                self._known = stamp
                return
            size = found[0]
        else:
            size = os.fstat(self._fd).st_size
        if size != self._size:
            raise self.changed(f"it has {size} bytes, and had {self._size}")
        raise self.changed("its header or its numbers are others")

    def changed(self, how: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} was changed while experts are mapped from it ({how}). What it holds is not what "
            "was loaded: put the file back, or load the model again; write new checkpoints elsewhere"
        )

    def read_into(self, place: memoryview, offset: int) -> None:
        """Read bytes of the file, past the map.

        Raises:
            CheckpointError: the file is shorter by now, or cannot be read.
        """
        while len(place):
            try:
                count = _read(self._fd, place, offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read ({error.strerror}); see to the disk, and go on from the "
                    "last checkpoint"
                ) from error
            if not count:
                raise self.changed(f"it ends at byte {offset}, and had {self._size}")
            place, offset = place[count:], offset + count

    def will_need(self, region: Region) -> None:
        """Have the system read a region ahead of its use."""
        start = region.offset - region.offset % mmap.PAGESIZE
        if hasattr(self._pages, "madvise"):
            try:
                self._pages.madvise(mmap.MADV_WILLNEED, start, region.offset + region.nbytes - start)
            except OSError:  # advice is all it is
                pass


def region_of(tensor: torch.Tensor) -> Region | None:
    """Where a tensor lies in a mapped file; None where it lies elsewhere."""
    for file in list(_files):
        region = file.region_of(tensor)
        if region is not None:
            return region
    return None


def files_of(tensors: Iterable[torch.Tensor]) -> list[MappedFile]:
    """The files that some of the tensors are mapped from, each once."""
    regions = [region_of(tensor) for tensor in tensors]
    return list({id(region.file): region.file for region in regions if region is not None}.values())


def _read(fd: int, place: memoryview, offset: int) -> int:
    """As many bytes as one call reads; into ``place``, without a copy where the system can."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [place], offset)
    data = os.pread(fd, len(place), offset)
    place[: len(data)] = data
    return len(data)


def _stamp(stat: os.stat_result) -> _Stamp:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _inode(stamp: _Stamp) -> tuple[int, int]:
    return stamp[:2]


def _pages(fd: int, size: int) -> _Pages:
    """The file's pages, private. No memory is set aside for them: a file may be larger than all there is."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return _Pages(fd, size, access=mmap.ACCESS_COPY)
    try:
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        return _Pages(fd, size, flags=mmap.MAP_PRIVATE | _no_reserve(), prot=writable)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    # Where the system sets aside all that could be written (overcommit_memory=2): pages that cannot be.
    return _Pages(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def _no_reserve() -> int:
    """MAP_NORESERVE, which Python does not name."""
    known = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "AMD64", "arm64")
    return 0x4000 if known else 0
