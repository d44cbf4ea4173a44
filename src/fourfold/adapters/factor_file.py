"""An adapter's file, read a little at a time.

Factors of fused experts lie in one tensor for all experts: with r=128 on DeepSeek-V3's shape A and B of a
layer have 1.3 billion bytes each time they are read in fp32, and there are 58 layers. What is needed is one
expert's. Of A that is a run of rows. B has the expert as its fastest axis, so an expert's numbers are spread
over all of it; B is therefore read through in chunks of rows, and those of as many experts kept as fit into
`HELD_BYTES`, the next ones in the order in which they will be asked for. Files are read, not mapped: mapped
pages count as memory of the process.

M matrices (experts), R rank, C columns of A, N rows of B, G experts that are held.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fourfold.errors import AdapterError, CheckpointError
from fourfold.loading.raw import RawTensor, read_numbers, read_raw

# Widest first, as safetensors sorts them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# B of as many experts of one parameter as go into this; of two parameters at a time, for files hold the keys
# of an expert side by side, and gate_up and down are asked for in turns.
HELD_BYTES = 2**26
HELD_PARAMETERS = 2
CHUNK_BYTES = 2**23


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read, or made, whenever it is asked for; ``key``: its name, if it lies in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    key: str = ""

    def stream(self) -> Stream:
        """In one piece."""
        return Stream(self.shape, self.dtype, lambda: iter((self.read(),)))


@dataclass(frozen=True)
class Stream:
    """A tensor in pieces: one after the other, they are its numbers in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class _Held:
    places: dict[int, int]
    b_GNR: torch.Tensor


class AdapterFile:
    """The tensors of one safetensors file.

    Args:
        path: of the file.

    Attributes:
        shapes: key -> shape.
        dtypes: key -> dtype.
        held: key of a B -> what is held of it; the one that was asked for last comes last.

    Raises:
        AdapterError: it is damaged, or a tensor in it holds no floating point numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            raw = read_raw(path)
        except (CheckpointError, OSError) as error:
            raise AdapterError(f"{path} is truncated or damaged ({error}); copy it again") from error
        self._tensors: dict[str, RawTensor] = {tensor.key: tensor for tensor in raw.tensors}
        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, tensor in self._tensors.items():
            if tensor.dtype not in DTYPES:
                raise AdapterError(f"{path}: {key} is {tensor.dtype}; adapters hold {', '.join(DTYPES)}")
            self.dtypes[key] = DTYPES[tensor.dtype]
            if tensor.size != torch.Size(tensor.shape).numel() * self.dtypes[key].itemsize:
                raise AdapterError(f"{path} is damaged ({key} has not as many bytes as its shape says)")
        self.held: OrderedDict[str, _Held] = OrderedDict()
        self._file = path.open("rb")

    def close(self) -> None:
        self._file.close()
        self.held.clear()

    def rows(self, key: str, begin: int, end: int) -> torch.Tensor:
        """Rows ``begin`` to ``end`` of one tensor, in its own dtype.

        Raises:
            AdapterError: the file became shorter.
        """
        tensor, dtype = self._tensors[key], self.dtypes[key]
        rows = max(0, min(end, _length(tensor.shape)) - begin)
        width = torch.Size(tensor.shape[1:]).numel()
        self._file.seek(tensor.begin + begin * width * dtype.itemsize)
        try:
            return read_numbers(self._file, rows * width, dtype).view(rows, *tensor.shape[1:])
        except CheckpointError as error:
            raise AdapterError(str(error)) from error

    def lazy(self, key: str) -> Lazy:
        """One tensor, to be read whole."""
        shape = self.shapes[key]
        return Lazy(shape, self.dtypes[key], lambda: self.rows(key, 0, _length(shape)).view(shape), key)

    def check(self) -> str:
        """Read all of it once.

        Returns:
            The SHA-256 of the file.

        Raises:
            AdapterError: a number in it is NaN or infinite.
        """
        digest = hashlib.sha256()
        self._file.seek(0)
        digest.update(self._file.read(min((t.begin for t in self._tensors.values()), default=0)))
        for key, tensor in self._tensors.items():  # (in the order of the file, without gaps)
            self._file.seek(tensor.begin)
            left, dtype = tensor.size // self.dtypes[key].itemsize, self.dtypes[key]
            while left:
                numbers = read_numbers(self._file, min(left, CHUNK_BYTES // dtype.itemsize), dtype)
                low, high = torch.aminmax(numbers)
                if not bool(torch.isfinite(low) & torch.isfinite(high)):
                    raise AdapterError(f"{self.path}: {key} holds NaN or infinite numbers")
                digest.update(memoryview(numbers.view(torch.uint8).numpy()))
                left -= numbers.numel()
        return digest.hexdigest()


def _length(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


class FlatFactors:
    """A ``[M*R, C]`` and B ``[N, R*M]`` of one parameter, one matrix at a time, in the file's dtype.

    Args:
        file: that holds them.
        a_key: of A, expert slowest.
        b_key: of B, expert fastest.
        matrices: M.
        grouped: B's expert is the slowest of its two axes.
        order: in which matrices will be asked for; another order gives the same numbers, only slower.
    """

    def __init__(
        self,
        file: AdapterFile,
        a_key: str,
        b_key: str,
        matrices: int,
        *,
        grouped: bool = False,
        order: Sequence[int] = (),
    ) -> None:
        self.file, self.a_key, self.b_key = file, a_key, b_key
        self.matrices, self.grouped = matrices, grouped
        self.rank = file.shapes[a_key][0] // matrices
        known = dict.fromkeys((*order, *range(matrices)))
        self._order = [number for number in known if number < matrices]
        self._place = {number: place for place, number in enumerate(self._order)}

    def a(self, matrix: int) -> torch.Tensor:
        """``[R, C]``."""
        return self.file.rows(self.a_key, matrix * self.rank, (matrix + 1) * self.rank)

    def b(self, matrix: int) -> torch.Tensor:
        """``[N, R]``; not to be written to."""
        held = self.file.held.get(self.b_key)
        if held is None or matrix not in held.places:
            del held
            held = self._hold(matrix)
        self.file.held.move_to_end(self.b_key)
        return held.b_GNR[held.places[matrix]]

    def _hold(self, first: int) -> _Held:
        held, dtype = self.file.held, self.file.dtypes[self.b_key]
        held.pop(self.b_key, None)  # (before there is another)
        while len(held) >= HELD_PARAMETERS:
            held.popitem(last=False)
        (N, width), M, R = self.file.shapes[self.b_key], self.matrices, self.rank
        count = max(1, HELD_BYTES // max(1, N * R * dtype.itemsize))
        start = self._place[first]
        chosen = torch.tensor(self._order[start : start + count])
        b_GNR = torch.empty(len(chosen), N, R, dtype=dtype)
        step = max(1, CHUNK_BYTES // max(1, width * dtype.itemsize))
        for begin in range(0, N, step):
            rows = self.file.rows(self.b_key, begin, begin + step)
            if self.grouped:
                picked = rows.view(-1, M, R).index_select(1, chosen).transpose(0, 1)
            else:
                picked = rows.view(-1, R, M).index_select(2, chosen).permute(2, 0, 1)
            b_GNR[:, begin : begin + step] = picked
        made = _Held({number: place for place, number in enumerate(chosen.tolist())}, b_GNR)
        held[self.b_key] = made
        return made


__all__ = ["AdapterFile", "FlatFactors", "Lazy", "Stream"]
