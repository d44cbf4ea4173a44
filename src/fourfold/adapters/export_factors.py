"""LoRA factors of experts, whichever way a file packs them, and the ways between.

Everything is read into one form, for each fused parameter A ``[E, r, K]`` and B ``[E, N, r]`` with the update
``scaling * B_e A_e`` of the out-by-in matrix of expert e, and written from it. Nothing is computed on the way
but copies, so converting there and back gives the same bytes.

- PEFT: A ``[E*r, K]`` (expert slowest), B ``[N, r*E]`` (expert fastest).
- Unsloth before 2026-09-17: B ``[N, E*r]`` (expert slowest), of the very same shape.
- Swapped (PEFT 0.17 to 0.19.0 on out-by-in parameters, 0.19.0 on all, any that takes an in-by-out one
  for out-by-in): A has the parameter's N columns and B its K rows; the update is that of ``A_e^T B_e^T``.
- Per expert: A ``[r, K]``, B ``[N, r]``; gate and up share A, and each has its rows of B.

E experts, r rank, K in, N out of the fused parameter, I rows of gate or up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourfold.errors import AdapterError


@dataclass(frozen=True)
class Factors:
    """LoRA of one fused parameter: A ``[E, r, K]``, B ``[E, N, r]``, any float dtype."""

    a_ERK: torch.Tensor
    b_ENR: torch.Tensor

    @property
    def experts(self) -> int:
        return self.a_ERK.shape[0]

    @property
    def rank(self) -> int:
        return self.a_ERK.shape[1]

    @property
    def columns(self) -> int:
        """K, what goes in."""
        return self.a_ERK.shape[2]

    @property
    def rows(self) -> int:
        """N, what comes out."""
        return self.b_ENR.shape[1]

    @property
    def adds_nothing(self) -> bool:
        """Whether both factors are zero throughout, which training never leaves behind (A starts random)."""
        return not bool(self.a_ERK.any()) and not bool(self.b_ENR.any())


def from_peft(a: torch.Tensor, b: torch.Tensor, rank: int, *, grouped: bool, swapped: bool) -> Factors:
    """Read the flat factors of a fused parameter.

    Args:
        a: ``[E*r, columns]``.
        b: ``[rows, r*E]``.
        rank: r.
        grouped: B's expert is the slowest of its two axes (Unsloth's older files).
        swapped: in and out are exchanged.
    """
    a_ErC = a.view(-1, rank, a.shape[1])
    experts = a_ErC.shape[0]
    if grouped:
        b_ERr = b.view(b.shape[0], experts, rank).permute(1, 0, 2)
    else:
        b_ERr = b.view(b.shape[0], rank, experts).permute(2, 0, 1)
    if swapped:
        return Factors(b_ERr.transpose(1, 2), a_ErC.transpose(1, 2))
    return Factors(a_ErC, b_ERr)


def to_peft(factors: Factors, *, swapped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `from_peft`, in PEFT's own order (B's expert fastest); contiguous."""
    a_ERK, b_ENR = factors.a_ERK, factors.b_ENR
    if swapped:
        a_ERK, b_ENR = b_ENR.transpose(1, 2), a_ERK.transpose(1, 2)
    a = a_ERK.contiguous().flatten(0, 1)
    b = b_ENR.permute(1, 2, 0).contiguous().flatten(1, 2)
    return a, b


def split(factors: Factors, *, interleaved: bool) -> tuple[Factors, Factors]:
    """Gate and up of a fused gate_up: the same A, and each its rows of B.

    Raises:
        AdapterError: the rows are no even number.
    """
    if factors.rows % 2:
        raise AdapterError(f"a fused gate_up of {factors.rows} rows cannot be split into gate and up")
    b_ENR, half = factors.b_ENR, factors.rows // 2
    gate, up = (b_ENR[:, ::2], b_ENR[:, 1::2]) if interleaved else (b_ENR[:, :half], b_ENR[:, half:])
    return Factors(factors.a_ERK, gate), Factors(factors.a_ERK, up)


def join(gate: Factors, up: Factors, *, interleaved: bool, double_rank: bool, where: str) -> Factors:
    """A fused gate_up of gate and up, at the same rank where they share A.

    Args:
        interleaved: rows of gate and up alternate in the fused parameter.
        double_rank: where A differs, write both, one under the other, with zeros in B: twice the rank.
        where: name for messages.

    Raises:
        AdapterError: A differs and ``double_rank`` is not set, or the shapes do not fit.
    """
    if gate.a_ERK.shape[2] != up.a_ERK.shape[2] or gate.rows != up.rows or gate.experts != up.experts:
        raise AdapterError(
            f"{where}: gate and up have different shapes ({list(gate.a_ERK.shape)} and "
            f"{list(up.a_ERK.shape)})"
        )
    shared = gate.a_ERK.shape == up.a_ERK.shape and torch.equal(gate.a_ERK, up.a_ERK)
    if shared and not double_rank:
        a_ERK, parts = gate.a_ERK, (gate.b_ENR, up.b_ENR)
    elif not double_rank:
        raise AdapterError(
            f"{where}: gate and up were trained with an A of their own each, which one fused parameter of "
            "this rank cannot hold; pass --double-rank (double_rank=True) to write both at twice the rank"
        )
    else:
        a_ERK = torch.cat((gate.a_ERK, up.a_ERK), dim=1)
        parts = (
            torch.nn.functional.pad(gate.b_ENR, (0, up.rank)),
            torch.nn.functional.pad(up.b_ENR, (gate.rank, 0)),
        )
    if interleaved:
        return Factors(a_ERK, torch.stack(parts, dim=2).flatten(1, 2))
    return Factors(a_ERK, torch.cat(parts, dim=1))


def zeros(experts: int, rank: int, columns: int, rows: int, dtype: torch.dtype) -> Factors:
    """Factors of a projection that was not trained."""
    return Factors(
        torch.zeros(experts, rank, columns, dtype=dtype), torch.zeros(experts, rows, rank, dtype=dtype)
    )


def at_rank(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[r, K]`` and B ``[N, r]`` with zeros up to ``rank``; the product stays what it was."""
    missing = rank - a.shape[0]
    if not missing:
        return a, b
    if a.ndim != 2 or b.ndim != 2:
        raise AdapterError(f"factors of shape {list(a.shape)} cannot be filled up to rank {rank}")
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))


def scaled(b: torch.Tensor, ratio: float) -> tuple[torch.Tensor, bool]:
    """``ratio * b`` in fp32, rounded once to its dtype; and whether nothing was rounded away."""
    if ratio == 1.0:
        return b, True
    product = b.double() * ratio
    rounded = product.to(b.dtype)
    return rounded, bool(torch.equal(rounded.double(), product))


def stack(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], where: str) -> Factors:
    """Per-expert factors, in the experts' order, as one.

    Raises:
        AdapterError: they differ in shape.
    """
    shapes = {(tuple(a.shape), tuple(b.shape)) for a, b in parts}
    if len(shapes) != 1:
        raise AdapterError(f"{where}: the experts' factors differ in shape ({sorted(shapes)[:2]})")
    return Factors(torch.stack([a for a, _ in parts]), torch.stack([b for _, b in parts]))
