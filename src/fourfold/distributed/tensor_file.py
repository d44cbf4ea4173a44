"""Safetensors files written piece by piece, by several processes if need be: none holds a file in memory.

A file is a header, which says where each tensor begins, and the tensors' bytes, row after row. Whoever knows
the header can write its own bytes into their place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import CheckpointError

# Names of dtypes in the format. (Those of newer releases of torch are there where torch has them.)
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PIECE = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor.

    Attributes:
        key: its name.
        dtype: one of `DTYPE_NAMES`.
        shape: of the whole tensor, wherever its bytes come from.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def dtype_name(key: str, dtype: torch.dtype) -> str:
    """The format's name of a dtype.

    Raises:
        CheckpointError: it has none, with the tensor's name.
    """
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{key} is {dtype}, which safetensors files do not know; cast it before the model is saved"
        )
    return DTYPE_NAMES[dtype]


def in_order(entries: Iterable[Entry]) -> list[Any]:
    """Large elements first, as safetensors lays them out: every tensor is aligned then."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))


def header(entries: Iterable[Entry]) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a file, where each tensor begins in it, and how long it is.

    Raises:
        CheckpointError: a dtype that the format does not know.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    at = 0
    for entry in entries:
        begins[entry.key] = at
        described[entry.key] = {
            "dtype": dtype_name(entry.key, entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: len(head) + begin for key, begin in begins.items()}, len(head) + at


def begin(file: Path, entries: Iterable[Entry]) -> None:
    """Make a file with its header, at its full length."""
    head, _, length = header(entries)
    with file.open("wb") as handle:
        handle.write(head)
        handle.truncate(length)


def pieces(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The bytes of a tensor on any device, on the CPU and few at a time, each with where it begins."""
    data = torch.Tensor(tensor.detach()).contiguous().view(-1).view(torch.uint8)
    for at in range(0, data.numel(), PIECE):
        yield at, data[at : at + PIECE].cpu()


class Writing:
    """A file that was begun, open to be written into; what was written is on the disk when it is closed."""

    def __init__(self, file: Path, entries: Iterable[Entry]) -> None:
        _, self.begins, _ = header(entries)
        self.handle = os.open(file, os.O_WRONLY)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                os.fsync(self.handle)
        finally:
            os.close(self.handle)

    def write(self, key: str, at: int, piece: torch.Tensor) -> None:
        """Bytes of one tensor, from its byte ``at`` on."""
        data = memoryview(piece.numpy())
        while data:
            written = os.pwrite(self.handle, data, self.begins[key] + at)
            data, at = data[written:], at + written
