"""Passes over routed rows that do the small products of LoRA on their way.

The expensive products of an experts layer are grouped matmuls. Around them lie passes over memory: gathering
rows, the gate, its gradient. Each reads and writes every row once; the low-rank product of the same rows
(``x A^T``, ``dy B``) costs nothing beside that, while a matmul of its own would read them again. The result
goes where the grouped product wants it: behind the row (`kernels.linear`), and by itself.

A program owns up to BM rows of one expert. Which rows it finds from the ends of the experts' rows on the
device: the grid has room for one broken tile an expert, and programs past the last tile do nothing.

S rows sorted by expert, H hidden, I intermediate, R rank, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rows_of_tile(offsets_ptr, E, EP: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end of the rows of this program's tile (no rows: first row = end)."""
    tile = tl.program_id(0)
    e = tl.arange(0, EP)
    end = tl.load(offsets_ptr + e, mask=e < E, other=0)
    begin = tl.load(offsets_ptr + e - 1, mask=(e < E) & (e > 0), other=0)
    tiles = tl.where(e < E, (end - begin + BM - 1) // BM, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    mine = e == expert
    first_tile = tl.sum(tl.where(mine, last - tiles, 0), 0)
    row_end = tl.sum(tl.where(mine, end, 0), 0)
    first = tl.sum(tl.where(mine, begin, 0), 0) + (tile - first_tile) * BM
    return expert, tl.where(expert < E, first, row_end), row_end


@triton.jit
def _store_low_rank(acc, weight, out_ptr, low_ptr, rows, live, r, column, stride, R):
    """Behind the row as it is, by itself times the row's weight."""
    mask = live[:, None] & (r < R)[None, :]
    value = acc.to(low_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * stride + column + r[None, :], value, mask=mask)
    value = (acc * weight[:, None]).to(low_ptr.dtype.element_ty)
    tl.store(low_ptr + rows[:, None] * R + r[None, :], value, mask=mask)


@triton.jit
def _gather_kernel(
    src_ptr,
    order_ptr,
    weights_ptr,
    factor_ptr,
    out_ptr,
    low_ptr,
    offsets_ptr,
    E,
    TOP_K,
    H,
    R,
    stride,
    factor_stride_h,
    factor_stride_r,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RP: tl.constexpr,
    LOW_RANK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = _rows_of_tile(offsets_ptr, E, EP, BM)
    if first >= end:
        return
    rows = first.to(tl.int64) + tl.arange(0, BM)
    live = rows < end
    source = tl.load(order_ptr + rows, mask=live, other=0)
    token = source // TOP_K
    r = tl.arange(0, RP)
    acc = tl.zeros((BM, RP), dtype=tl.float32)
    for start in range(0, H, BK):
        h = start + tl.arange(0, BK)
        mask = live[:, None] & (h < H)[None, :]
        x = tl.load(src_ptr + token[:, None] * H + h[None, :], mask=mask, other=0.0)
        x = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * stride + h[None, :], x, mask=mask)
        if LOW_RANK:
            at = expert.to(tl.int64) * R * H + h[:, None] * factor_stride_h + r[None, :] * factor_stride_r
            f = tl.load(factor_ptr + at, mask=(h < H)[:, None] & (r < R)[None, :], other=0.0)
            acc = tl.dot(x, f, acc, input_precision=PRECISION)
    if LOW_RANK:
        weight = tl.full((BM,), 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + source, mask=live, other=0.0).to(tl.float32)
        _store_low_rank(acc, weight, out_ptr, low_ptr, rows, live, r, H, stride, R)


@triton.jit
def _silu_mul_kernel(
    up_ptr,
    weights_ptr,
    order_ptr,
    factor_ptr,
    out_ptr,
    low_ptr,
    offsets_ptr,
    E,
    I,  # noqa: E741
    R,
    stride,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RP: tl.constexpr,
    LOW_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = _rows_of_tile(offsets_ptr, E, EP, BM)
    if first >= end:
        return
    rows = first.to(tl.int64) + tl.arange(0, BM)
    live = rows < end
    r = tl.arange(0, RP)
    acc = tl.zeros((BM, RP), dtype=tl.float32)
    for start in range(0, I, BK):
        i = start + tl.arange(0, BK)
        mask = live[:, None] & (i < I)[None, :]
        at = rows[:, None] * (2 * I) + i[None, :]
        gate = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at + I, mask=mask, other=0.0).to(tl.float32)
        act = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * stride + i[None, :], act, mask=mask)
        if LOW_RANK:
            at_f = expert.to(tl.int64) * R * I + i[:, None] + r[None, :] * I
            f = tl.load(factor_ptr + at_f, mask=(i < I)[:, None] & (r < R)[None, :], other=0.0)
            acc = tl.dot(act, f, acc, input_precision=PRECISION)
    if LOW_RANK:
        source = tl.load(order_ptr + rows, mask=live, other=0)
        weight = tl.load(weights_ptr + source, mask=live, other=0.0).to(tl.float32)
        _store_low_rank(acc, weight, out_ptr, low_ptr, rows, live, r, I, stride, R)


@triton.jit
def _silu_mul_backward_kernel(
    up_ptr,
    grad_ptr,
    weights_ptr,
    order_ptr,
    factor_ptr,
    out_ptr,
    low_ptr,
    act_ptr,
    grad_weights_ptr,
    offsets_ptr,
    E,
    I,  # noqa: E741
    R,
    stride,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RP: tl.constexpr,
    LOW_RANK: tl.constexpr,
    KEEP_ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = _rows_of_tile(offsets_ptr, E, EP, BM)
    if first >= end:
        return
    rows = first.to(tl.int64) + tl.arange(0, BM)
    live = rows < end
    source = tl.load(order_ptr + rows, mask=live, other=0)
    weight = tl.load(weights_ptr + source, mask=live, other=0.0).to(tl.float32)
    r = tl.arange(0, RP)
    acc = tl.zeros((BM, RP), dtype=tl.float32)
    dot = tl.zeros((BM,), dtype=tl.float32)
    for start in range(0, I, BK):
        i = start + tl.arange(0, BK)
        mask = live[:, None] & (i < I)[None, :]
        at = rows[:, None] * (2 * I) + i[None, :]
        gate = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at + I, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * I + i[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dot += tl.sum(grad * silu * up, axis=1)
        if KEEP_ACT:
            act = (silu * up).to(act_ptr.dtype.element_ty)
            tl.store(act_ptr + rows[:, None] * I + i[None, :], act, mask=mask)
        grad *= weight[:, None]
        d_gate = (grad * up * (sigmoid + silu * (1 - sigmoid))).to(out_ptr.dtype.element_ty)
        d_up = (grad * silu).to(out_ptr.dtype.element_ty)
        to = rows[:, None] * stride + i[None, :]
        tl.store(out_ptr + to, d_gate, mask=mask)
        tl.store(out_ptr + to + I, d_up, mask=mask)
        if LOW_RANK:
            at_f = (expert.to(tl.int64) * (2 * I) + i[:, None]) * R + r[None, :]
            mask_f = (i < I)[:, None] & (r < R)[None, :]
            acc = tl.dot(
                d_gate, tl.load(factor_ptr + at_f, mask=mask_f, other=0.0), acc, input_precision=PRECISION
            )
            f = tl.load(factor_ptr + at_f + I * R, mask=mask_f, other=0.0)
            acc = tl.dot(d_up, f, acc, input_precision=PRECISION)
    tl.store(grad_weights_ptr + source, dot.to(grad_weights_ptr.dtype.element_ty), mask=live)
    if LOW_RANK:
        one = tl.full((BM,), 1.0, tl.float32)  # (the gradient is weighted already)
        _store_low_rank(acc, one, out_ptr, low_ptr, rows, live, r, 2 * I, stride, R)


GATE_COLUMNS = 64  # of a tile of the gate and its gradient


def gather_columns(rank: int) -> int:
    """Columns of a tile of gathered rows."""
    return 128 if rank <= 64 else 64


def _launch(
    rows: int, offsets_E: torch.Tensor, rank: int, dtype: torch.dtype
) -> tuple[tuple[int], dict[str, object]]:
    """Grid and constants that the kernels share. Tiles are small where experts have few rows each."""
    E = offsets_E.shape[0]
    BM = 64 if rows >= 32 * E else 16
    constants = {
        "EP": triton.next_power_of_2(E),
        "BM": BM,
        "RP": max(16, triton.next_power_of_2(rank)),
        "LOW_RANK": rank > 0,
        "PRECISION": "ieee",
        "num_warps": 4,
        # Tiles of factors grow with the rank: one at a time, so that any card's shared memory holds them.
        "num_stages": 3 if rank <= 64 else 1,
    }
    return (triton.cdiv(rows, BM) + min(E, rows),), constants


def _low_rank_rows(factor: torch.Tensor | None, rows: int, like: torch.Tensor, rank: int) -> torch.Tensor:
    return like if factor is None else like.new_empty(rows, rank)


def gather_triton(
    x_TH: torch.Tensor,
    order_S: torch.Tensor,
    top_k: int,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    factor_EHR: torch.Tensor | None,
    weights_Tk: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The rows of ``x_TH`` in sorted order into ``wide_Ss``, in its dtype, and behind them ``x factor``.

    Returns:
        ``x factor``, ``[S, R]``, times the rows' weights where such are given; None without a factor.
    """
    S, H = order_S.shape[0], x_TH.shape[1]
    R = 0 if factor_EHR is None else factor_EHR.shape[2]
    grid, constants = _launch(S, offsets_E, R, wide_Ss.dtype)
    low_SR = _low_rank_rows(factor_EHR, S, wide_Ss, R)
    strides = (0, 0) if factor_EHR is None else factor_EHR.stride()[1:]
    with torch.cuda.device_of(x_TH):  # Triton launches on the current device
        _gather_kernel[grid](
            x_TH,
            order_S,
            wide_Ss if weights_Tk is None else weights_Tk,
            wide_Ss if factor_EHR is None else factor_EHR,
            wide_Ss,
            low_SR,
            offsets_E,
            offsets_E.shape[0],
            top_k,
            H,
            R,
            wide_Ss.stride(0),
            *strides,
            BK=gather_columns(R),
            WEIGHTED=weights_Tk is not None,
            # Not pipelined: Triton 3.6 on an H100 gave low-rank columns up to 8 % off, at ranks of 64 and
            # more, with two stages as with three.
            **(constants | {"num_stages": 1}),
        )
    return None if factor_EHR is None else low_SR


def silu_mul_triton(
    up_SN: torch.Tensor,
    weights_Tk: torch.Tensor,
    order_S: torch.Tensor,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    a_ERI: torch.Tensor | None,
) -> torch.Tensor | None:
    """``silu(gate) * up`` of ``up_SN = [gate, up]`` into ``wide_Ss``, behind it ``act A^T``.

    Returns:
        ``act A^T`` times the rows' weights, ``[S, R]``: what the gradient of B wants. None without A.
    """
    S, I = up_SN.shape[0], up_SN.shape[1] // 2  # noqa: E741
    R = 0 if a_ERI is None else a_ERI.shape[1]
    grid, constants = _launch(S, offsets_E, R, wide_Ss.dtype)
    low_SR = _low_rank_rows(a_ERI, S, wide_Ss, R)
    with torch.cuda.device_of(up_SN):
        _silu_mul_kernel[grid](
            up_SN,
            weights_Tk,
            order_S,
            wide_Ss if a_ERI is None else a_ERI,
            wide_Ss,
            low_SR,
            offsets_E,
            offsets_E.shape[0],
            I,
            R,
            wide_Ss.stride(0),
            BK=GATE_COLUMNS,
            **constants,
        )
    return None if a_ERI is None else low_SR


def silu_mul_backward_triton(
    up_SN: torch.Tensor,
    grad_SI: torch.Tensor,
    weights_Tk: torch.Tensor,
    order_S: torch.Tensor,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    b_ENR: torch.Tensor | None,
    *,
    keep_act: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """The gate's gradient, from that of its result without the routing weight.

    Args:
        up_SN: what the gate was computed of, ``[gate, up]``.
        grad_SI: gradient of a row's result as if its routing weight were 1.
        weights_Tk: routing weights; ``order_S`` holds each row's place among them.
        wide_Ss: filled with the gradient of ``up_SN``, and behind it that times ``b_ENR``.
        keep_act: also compute ``silu(gate) * up`` again.

    Returns:
        The low-rank product ``[S, R]``, the activation ``[S, I]`` (None where not asked for), and the
        gradient of the routing weights ``[T, k]``: of a row, ``<grad, act>``. (The sum over H of gradient
        times result is the same number, and would need the result to be kept.)
    """
    S, I = up_SN.shape[0], up_SN.shape[1] // 2  # noqa: E741
    R = 0 if b_ENR is None else b_ENR.shape[2]
    grid, constants = _launch(S, offsets_E, R, wide_Ss.dtype)
    low_SR = _low_rank_rows(b_ENR, S, wide_Ss, R)
    act_SI = torch.empty_like(grad_SI) if keep_act else grad_SI
    grad_weights_Tk = torch.empty_like(weights_Tk)
    with torch.cuda.device_of(up_SN):
        _silu_mul_backward_kernel[grid](
            up_SN,
            grad_SI,
            weights_Tk,
            order_S,
            wide_Ss if b_ENR is None else b_ENR,
            wide_Ss,
            low_SR,
            act_SI,
            grad_weights_Tk,
            offsets_E,
            offsets_E.shape[0],
            I,
            R,
            wide_Ss.stride(0),
            KEEP_ACT=keep_act,
            BK=GATE_COLUMNS,
            **constants,
        )
    return (None if b_ENR is None else low_SR), (act_SI if keep_act else None), grad_weights_Tk
