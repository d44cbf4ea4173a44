"""Safetensors files as bytes: where each tensor lies, so that it can be copied or read in pieces.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the length of the header,
the header as JSON (key -> dtype, shape, begin and end counted from behind the header), then the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fourfold.errors import CheckpointError

# Numbers in high precision, by safetensors' names.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SAMPLE = 4096  # bytes
_READ = 2**23


@dataclass(frozen=True)
class RawTensor:
    """One stored tensor: ``size`` bytes from ``begin``, counted from the beginning of ``file``."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True)
class RawFile:
    """A safetensors file.

    Attributes:
        path: where it is.
        data_begin: where the first tensor begins; what lies before is the header.
        tensors: in the order in which they lie in the file.
    """

    path: Path
    data_begin: int
    tensors: tuple[RawTensor, ...]


def read_raw(path: Path) -> RawFile:
    """Read the header of one file.

    Raises:
        CheckpointError: it is no safetensors file, or shorter or longer than its header says.
    """
    length = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > length - 8:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(header_size))
        begin = 8 + header_size
        tensors = [
            RawTensor(
                path,
                key,
                entry["dtype"],
                tuple(entry["shape"]),
                begin + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for key, entry in header.items()
            if key != "__metadata__"
        ]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.size))
        position = begin
        for tensor in tensors:
            if tensor.begin != position or tensor.size < 0:
                raise ValueError(f"{tensor.key} does not follow the tensor before it")
            position += tensor.size
        if position != length:
            raise ValueError(f"the header speaks of {position} bytes, there are {length}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error
    return RawFile(path, begin, tuple(tensors))


def read_numbers(source: BinaryIO, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The next ``count`` numbers of an open file.

    Raises:
        CheckpointError: there are fewer.
    """
    buffer = bytearray(count * dtype.itemsize)
    view, got = memoryview(buffer), 0
    while got < len(buffer):
        chunk = source.read(min(len(buffer) - got, _READ))
        if not chunk:
            raise CheckpointError(f"{source.name} became shorter while it was read")
        view[got : got + len(chunk)] = chunk
        got += len(chunk)
    return torch.frombuffer(buffer, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def read_whole(tensor: RawTensor) -> torch.Tensor:
    """All of a stored tensor (`DTYPES` only) in its own shape and dtype."""
    dtype = DTYPES[tensor.dtype]
    with tensor.file.open("rb") as source:
        source.seek(tensor.begin)
        return read_numbers(source, tensor.size // dtype.itemsize, dtype).view(tensor.shape)


def _role(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", key)


def fingerprint(files: Iterable[str | Path]) -> str | None:
    """What tells these weights from others: key, dtype and shape of every tensor, and samples of the numbers.

    Of every role (a key without its numbers), 4 KiB from the middle of the first and the last tensor: some
    sixty small reads, and training of any kind changes a whole role. Files can be cut otherwise, or lie
    elsewhere, and the answer is the same.

    Returns:
        A hexadecimal number; None where there are no safetensors files.
    """
    paths = [Path(file) for file in files if str(file).endswith(".safetensors")]
    tensors = sorted((t for path in paths for t in read_raw(path).tensors), key=lambda t: t.key)
    if not tensors:
        return None
    ends: dict[str, list[RawTensor]] = {}
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.key} {tensor.dtype} {tensor.shape}\n".encode())
        first_and_last = ends.setdefault(_role(tensor.key), [tensor, tensor])
        first_and_last[1] = tensor
    for first, last in ends.values():
        for tensor in (first, last):
            with tensor.file.open("rb") as file:
                file.seek(tensor.begin + max(0, (tensor.size - _SAMPLE) // 2))
                digest.update(file.read(min(_SAMPLE, tensor.size)))
    return digest.hexdigest()[:32]
