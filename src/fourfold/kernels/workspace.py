"""The product by way of a workspace: decode matrices, multiply, let go.

The workspace has room for the low-rank factor beside or below the weights (``[W, B]``, transposed ``[W;
A]``), so that both terms are summed in one product's accumulators. It lives as long as the product. One that
holds all experts takes one launch and no host synchronisation on CUDA; a smaller one works through the
experts in chunks and reads the offsets on the host.

S rows sorted by expert, K in, N out, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fourfold.formats import PackedStack
from fourfold.formats.plain import PlainStack
from fourfold.kernels.decode import decode, decode_wide
from fourfold.kernels.grouped import grouped_rows


@dataclass(frozen=True)
class _Chunk:
    """Experts ``start`` to ``stop`` and their rows; ``rows`` None means all of them."""

    start: int
    stop: int
    rows: slice | None


def _chunks(
    stack: PackedStack | PlainStack, dtype: torch.dtype, offsets_E: torch.Tensor, limit: int | None
) -> Iterator[_Chunk]:
    E, N, K = stack.shape.experts, stack.shape.rows, stack.shape.columns
    step = E if limit is None else max(1, limit // (N * K * dtype.itemsize))
    if step >= E:
        yield _Chunk(0, E, None)
        return
    ends = [0, *offsets_E.tolist()]
    for start in range(0, E, step):
        stop = min(start + step, E)
        if ends[stop] > ends[start]:
            yield _Chunk(start, stop, slice(ends[start], ends[stop]))


def matrices(
    stack: PackedStack | PlainStack,
    dtype: torch.dtype,
    factor: torch.Tensor | None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """What rows are multiplied with: ``[E, K (+ R), N]``, or transposed ``[E, N (+ R), K]``."""
    if factor is not None and isinstance(stack, PlainStack):
        raise ValueError(
            "weights that are not packed lie where they are, with no room for a factor beside them"
        )
    if factor is None or isinstance(stack, PlainStack):
        w_ENK = decode(stack, dtype)
        return w_ENK if transposed else w_ENK.transpose(1, 2)
    N, K = stack.shape.rows, stack.shape.columns
    if transposed:
        w_EnK = decode_wide(stack, dtype, extra_rows=factor.shape[1])[..., :K]
        w_EnK[:, N:] = factor
        return w_EnK
    R = factor.shape[2]
    w_ENk = decode_wide(stack, dtype, extra_columns=R)[..., : K + R]
    w_ENk[..., K:] = factor
    return w_ENk.transpose(1, 2)


def workspace_product(
    rows_SM: torch.Tensor,
    stack: PackedStack | PlainStack,
    offsets_E: torch.Tensor,
    factor: torch.Tensor | None,
    limit: int | None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """``[x, h] [W, B]^T``, or transposed ``[dy, h] [W; A]``.

    Args:
        rows_SM: sorted rows, with the low-rank columns behind them where there is a factor.
        factor: B ``[E, N, R]``; transposed, A ``[E, R, K]`` (packed stacks only).
        limit: bytes of decoded weight at a time, but never less than one expert; None is all of it.
    """
    out: torch.Tensor | None = None
    for chunk in _chunks(stack, rows_SM.dtype, offsets_E, limit):
        if chunk.rows is None:
            return grouped_rows(
                rows_SM, matrices(stack, rows_SM.dtype, factor, transposed=transposed), offsets_E
            )
        experts = slice(chunk.start, chunk.stop)
        w = matrices(
            stack.experts(chunk.start, chunk.stop),
            rows_SM.dtype,
            None if factor is None else factor[experts],
            transposed=transposed,
        )
        if out is None:
            out = rows_SM.new_empty(rows_SM.shape[0], w.shape[2])
        out[chunk.rows] = grouped_rows(rows_SM[chunk.rows], w, offsets_E[experts] - chunk.rows.start)
        del w  # else two chunks would be decoded at a time
    if out is None:  # no rows at all
        width = stack.shape.columns if transposed else stack.shape.rows
        return rows_SM.new_empty(rows_SM.shape[0], width)
    return out
