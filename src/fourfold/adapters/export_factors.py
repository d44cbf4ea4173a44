"""LoRA factors of experts, whichever way a file packs them, and the ways between.

Everything is read into one form, for each fused parameter A ``[E, r, K]`` and B ``[E, N, r]`` with the
update ``scaling * B_e A_e`` of the out-by-in matrix of expert e, and written from it; one expert's are in
memory at a time. Nothing is computed on the way but copies, so converting there and back gives the same
bytes.

- PEFT: A ``[E*r, K]`` (expert slowest), B ``[N, r*E]`` (expert fastest).
- Unsloth before 2026-09-17: B ``[N, E*r]`` (expert slowest), of the very same shape.
- Swapped (PEFT 0.17 to 0.19.0 on out-by-in parameters, 0.19.0 on all, any that takes an in-by-out one
  for out-by-in): A has the parameter's N columns and B its K rows; the update is that of ``A_e^T B_e^T``.
- Per expert: A ``[r, K]``, B ``[N, r]``; gate and up share A, and each has its rows of B.

E experts, r rank, K in, N out of the fused parameter, I rows of gate or up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fourfold.adapters import factor_file
from fourfold.adapters.factor_file import FlatFactors, Lazy, Stream
from fourfold.errors import AdapterError


@dataclass(frozen=True)
class Factors:
    """LoRA of one fused parameter, one expert at a time.

    Attributes:
        experts: E.
        rank: r.
        columns: K, what goes in.
        rows: N, what comes out.
        dtype: of both factors, any float dtype.
        a: expert -> A ``[r, K]``.
        b: expert -> B ``[N, r]``.
    """

    experts: int
    rank: int
    columns: int
    rows: int
    dtype: torch.dtype
    a: Callable[[int], torch.Tensor]
    b: Callable[[int], torch.Tensor]

    @property
    def adds_nothing(self) -> bool:
        """Whether both factors are zero throughout, which training never leaves behind (A starts random)."""
        return not any(bool(self.a(e).any()) or bool(self.b(e).any()) for e in range(self.experts))

    def of(self, expert: int) -> tuple[Lazy, Lazy]:
        """A and B of one expert, to be read when they are needed."""
        return (
            Lazy((self.rank, self.columns), self.dtype, lambda: self.a(expert)),
            Lazy((self.rows, self.rank), self.dtype, lambda: self.b(expert)),
        )


def from_peft(flat: FlatFactors, *, swapped: bool) -> Factors:
    """The factors of a fused parameter in an adapter's file.

    Args:
        flat: as they lie there.
        swapped: in and out are exchanged.

    Raises:
        AdapterError: A and B have different dtypes.
    """
    (_, C), (N, _) = flat.file.shapes[flat.a_key], flat.file.shapes[flat.b_key]
    dtype = _one_dtype((flat.file.dtypes[flat.a_key], flat.file.dtypes[flat.b_key]), flat.a_key)
    if swapped:
        return Factors(flat.matrices, flat.rank, N, C, dtype, lambda e: flat.b(e).T, lambda e: flat.a(e).T)
    return Factors(flat.matrices, flat.rank, C, N, dtype, flat.a, flat.b)


def _one_dtype(dtypes: Sequence[torch.dtype], where: str) -> torch.dtype:
    if len(set(dtypes)) != 1:
        raise AdapterError(f"{where}: factors that belong together differ in dtype ({dtypes})")
    return dtypes[0]


def to_peft(factors: Factors, *, swapped: bool) -> tuple[Stream, Stream]:
    """The inverse of `from_peft`, in PEFT's own order (B's expert fastest)."""
    E, r = factors.experts, factors.rank
    columns, rows, a, b = factors.columns, factors.rows, factors.a, factors.b
    if swapped:
        columns, rows = rows, columns
        a, b = (lambda e: factors.b(e).T), (lambda e: factors.a(e).T)

    def rows_of_b() -> Iterator[torch.Tensor]:
        """As many rows at a time as go into `factor_file.HELD_BYTES`; each needs every expert."""
        step = max(1, factor_file.HELD_BYTES // max(1, r * E * factors.dtype.itemsize))
        for start in range(0, rows, step):
            b_NrE = torch.empty(min(step, rows - start), r, E, dtype=factors.dtype)
            for e in range(E):
                b_NrE[:, :, e] = b(e)[start : start + step]
            yield b_NrE

    return (
        Stream((E * r, columns), factors.dtype, lambda: (a(e) for e in range(E))),
        Stream((rows, r * E), factors.dtype, rows_of_b),
    )


def split(factors: Factors, *, interleaved: bool) -> tuple[Factors, Factors]:
    """Gate and up of a fused gate_up: the same A, and each its rows of B.

    Raises:
        AdapterError: the rows are no even number.
    """
    if factors.rows % 2:
        raise AdapterError(f"a fused gate_up of {factors.rows} rows cannot be split into gate and up")
    half = factors.rows // 2
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    )
    return (
        replace(factors, rows=half, b=lambda e: factors.b(e)[first]),
        replace(factors, rows=half, b=lambda e: factors.b(e)[second]),
    )


def join(gate: Factors, up: Factors, *, interleaved: bool, double_rank: bool, where: str) -> Factors:
    """A fused gate_up of gate and up, at the same rank where they share A.

    Args:
        interleaved: rows of gate and up alternate in the fused parameter.
        double_rank: where A differs, write both, one under the other, with zeros in B: twice the rank.
        where: name for messages.

    Raises:
        AdapterError: A differs and ``double_rank`` is not set, or the shapes do not fit.
    """
    if (gate.columns, gate.rows, gate.experts) != (up.columns, up.rows, up.experts):
        raise AdapterError(
            f"{where}: gate and up have different shapes ({gate.experts} experts, {gate.columns} in, "
            f"{gate.rows} out, and {up.experts}, {up.columns}, {up.rows})"
        )
    dtype = _one_dtype((gate.dtype, up.dtype), where)
    shared = gate.rank == up.rank and all(torch.equal(gate.a(e), up.a(e)) for e in range(gate.experts))
    if not shared and not double_rank:
        raise AdapterError(
            f"{where}: gate and up were trained with an A of their own each, which one fused parameter of "
            "this rank cannot hold; pass --double-rank (double_rank=True) to write both at twice the rank"
        )
    rank = gate.rank + up.rank if double_rank else gate.rank

    def a(e: int) -> torch.Tensor:
        return torch.cat((gate.a(e), up.a(e))) if double_rank else gate.a(e)

    def b(e: int) -> torch.Tensor:
        parts = (gate.b(e), up.b(e))
        if double_rank:
            pad = torch.nn.functional.pad
            parts = (pad(parts[0], (0, up.rank)), pad(parts[1], (gate.rank, 0)))
        return torch.stack(parts, dim=1).flatten(0, 1) if interleaved else torch.cat(parts)

    return Factors(gate.experts, rank, gate.columns, 2 * gate.rows, dtype, a, b)


def zeros(experts: int, rank: int, columns: int, rows: int, dtype: torch.dtype) -> Factors:
    """Factors of a projection that was not trained."""
    a, b = torch.zeros(rank, columns, dtype=dtype), torch.zeros(rows, rank, dtype=dtype)
    return Factors(experts, rank, columns, rows, dtype, lambda _: a, lambda _: b)


def at_rank(a: Lazy, b: Lazy, rank: int) -> tuple[Lazy, Lazy]:
    """A ``[r, K]`` and B ``[N, r]`` with zeros up to ``rank``; the product stays what it was."""
    missing = rank - a.shape[0]
    if not missing:
        return a, b
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(f"factors of shape {list(a.shape)} cannot be filled up to rank {rank}")
    pad = torch.nn.functional.pad
    return (
        Lazy((rank, a.shape[1]), a.dtype, lambda: pad(a.read(), (0, 0, 0, missing))),
        Lazy((b.shape[0], rank), b.dtype, lambda: pad(b.read(), (0, missing))),
    )


def scaled(b: torch.Tensor, ratio: float) -> tuple[torch.Tensor, bool]:
    """``ratio * b`` in fp32, rounded once to its dtype; and whether nothing was rounded away."""
    if ratio == 1.0:
        return b, True
    product = b.double() * ratio
    rounded = product.to(b.dtype)
    return rounded, bool(torch.equal(rounded.double(), product))


def stack(parts: Sequence[tuple[Lazy, Lazy]], where: str) -> Factors:
    """Per-expert factors, in the experts' order, as one.

    Raises:
        AdapterError: they differ in shape or dtype, or are no matrices of one rank.
    """
    shapes = {(a.shape, b.shape) for a, b in parts}
    if len(shapes) != 1:
        raise AdapterError(f"{where}: the experts' factors differ in shape ({sorted(shapes)[:2]})")
    a, b = next(iter(shapes))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise AdapterError(f"{where}: {list(a)} and {list(b)} are no factors of one rank")
    dtype = _one_dtype([lazy.dtype for part in parts for lazy in part], where)
    return Factors(
        len(parts), a[0], a[1], b[0], dtype, lambda e: parts[e][0].read(), lambda e: parts[e][1].read()
    )
