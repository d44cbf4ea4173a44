"""Passes over routed rows (`rows.cu`): what `kernels.rows_triton` does, in reads and writes of 16 bytes."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from fourfold.kernels.cuda import compile as compiled

MOST_RANK = 64
THREADS, TILE_S = 256, 64
# Rows an expert, on average, up to which a block takes one row instead of a tile (whose time is that of its
# steps of columns, whatever it holds: 28 us on an H100 for Qwen3-30B-A3B's), and columns that it can hold.
FEW_ROWS, FEW_COLUMNS = 4, 16384
GATHER, SILU, BACKWARD = 0, 1, 2
_WEIGHT_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _source() -> str:
    return (Path(__file__).parent / "rows.cu").read_text(encoding="utf-8")


def _cubin(
    mode: int, rank_first: bool, dtype: torch.dtype, capability: tuple[int, int], one_row: bool = False
) -> bytes:
    switches = {
        "MODE": mode,
        "RANK_FIRST": int(rank_first),
        "HALF": int(dtype == torch.float16),
        "ONE_ROW": int(one_row),
    }
    architecture = compiled.portable_architecture(capability)
    return compiled.cubin(_source(), architecture, tuple(f"{n}={v}" for n, v in switches.items()))


def shared_bytes(mode: int, rank_first: bool) -> int:
    """Dynamic shared memory of a block, as `rows.cu` lays it out."""
    columns, matrices = (64, 2) if mode == BACKWARD else (128, 1)
    factor = MOST_RANK * (columns * 2 + 16) if rank_first else columns * (MOST_RANK * 2 + 16)
    return matrices * (TILE_S * columns * 2 + factor)


@functools.cache
def _available(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or dtype not in _WEIGHT_KINDS:
        return False
    capability = torch.cuda.get_device_capability(device)
    if dtype == torch.float32 or capability < (8, 0):
        return False
    try:
        compiled.driver()
        _cubin(GATHER, False, dtype, capability)
    except compiled.CompilerMissingError:
        return False
    return True


def _in_whole_pieces(*tensors: torch.Tensor | None) -> bool:
    return all(t is None or (t.stride(-1) == 1 and t.data_ptr() % 16 == 0) for t in tensors)


def can(
    columns: int,
    wide_Ss: torch.Tensor,
    factor: torch.Tensor | None,
    rank: int,
    weights_Tk: torch.Tensor | None,
    *rows: torch.Tensor,
) -> bool:
    """Whether these kernels take it: one dtype of 16 bits, rows of whole 16 bytes, a rank of up to 64."""
    return (
        _available(wide_Ss.dtype, wide_Ss.device)
        and columns % 8 == 0
        and rank % 8 == 0
        and rank <= MOST_RANK
        and wide_Ss.stride(0) % 8 == 0
        and (weights_Tk is None or (weights_Tk.dtype in _WEIGHT_KINDS and weights_Tk.is_contiguous()))
        and all(t.dtype == wide_Ss.dtype and t.is_contiguous() for t in rows)
        and (factor is None or (factor.dtype == wide_Ss.dtype and factor.is_contiguous()))
        and _in_whole_pieces(wide_Ss, factor, *rows)
    )


def takes_one_row(mode: int, rank_first: bool, rows: int, experts: int, columns: int) -> bool:
    """Whether a block takes one row (forward, few rows an expert) instead of a tile."""
    return mode != BACKWARD and rank_first and rows <= FEW_ROWS * experts and columns <= FEW_COLUMNS


def _launch(
    mode: int,
    rank_first: bool,
    rows: int,
    columns: int,
    top_k: int,
    source: torch.Tensor,
    grad_SI: torch.Tensor | None,
    order_S: torch.Tensor,
    weights_Tk: torch.Tensor | None,
    factor: torch.Tensor | None,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    act_SI: torch.Tensor | None = None,
    grad_weights_Tk: torch.Tensor | None = None,
) -> torch.Tensor | None:
    assert offsets_E.dtype == torch.int32
    assert order_S.dtype == torch.int64
    E, index, dtype = offsets_E.shape[0], wide_Ss.get_device(), wide_Ss.dtype
    rank = 0
    if factor is not None:
        rank = factor.shape[1 if rank_first else 2]
    low_SR = None if factor is None else wide_Ss.new_empty(rows, rank)
    if rows == 0:
        return low_SR
    pointers = (
        source,
        grad_SI,
        order_S,
        weights_Tk,
        factor,
        offsets_E,
        wide_Ss,
        low_SR,
        act_SI,
        grad_weights_Tk,
    )
    one_row = takes_one_row(mode, rank_first or factor is None, rows, E, columns)
    if one_row:
        blocks, shared = rows, columns * 2
    else:
        blocks, shared = -(-rows // TILE_S) + min(E, rows), shared_bytes(mode, rank_first)
    key = ("rows", mode, rank_first, dtype, index, one_row)
    with torch.cuda.device_of(wide_Ss):
        launcher = compiled.launchers().get(key)
        if launcher is None:
            code = _cubin(mode, rank_first, dtype, torch.cuda.get_device_capability(index), one_row)
            most = FEW_COLUMNS * 2 if one_row else shared
            kernel = compiled.function(code, "rows_pass", most, index)
            launcher = compiled.launchers()[key] = compiled.Launcher(
                kernel, index, maps=0, pointers=10, ints=6
            )
        kind = 0 if weights_Tk is None else _WEIGHT_KINDS[weights_Tk.dtype]
        launcher(
            (blocks, 1, 1),
            THREADS,
            shared,
            compiled.stream(index),
            (),
            [0 if t is None else t.data_ptr() for t in pointers],
            (E, top_k, columns, rank, wide_Ss.stride(0), kind),
        )
    return low_SR


def gather(
    x_TH: torch.Tensor,
    order_S: torch.Tensor,
    top_k: int,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    factor: torch.Tensor | None,
    weights_Tk: torch.Tensor | None,
    *,
    rank_first: bool,
) -> torch.Tensor | None:
    """`rows_triton.gather_triton`; the factor is ``[E, R, H]`` (``rank_first``) or ``[E, H, R]``."""
    return _launch(
        GATHER, rank_first, len(order_S), x_TH.shape[1], top_k, x_TH, None, order_S, weights_Tk, factor,
        offsets_E, wide_Ss,
    )  # fmt: skip


def silu_mul(
    up_SN: torch.Tensor,
    weights_Tk: torch.Tensor,
    order_S: torch.Tensor,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    a_ERI: torch.Tensor | None,
) -> torch.Tensor | None:
    """`rows_triton.silu_mul_triton`."""
    return _launch(
        SILU, True, len(up_SN), up_SN.shape[1] // 2, 1, up_SN, None, order_S, weights_Tk, a_ERI, offsets_E,
        wide_Ss,
    )  # fmt: skip


def silu_mul_backward(
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
    """`rows_triton.silu_mul_backward_triton`."""
    act_SI = torch.empty_like(grad_SI) if keep_act else None
    grad_weights_Tk = torch.empty_like(weights_Tk)
    low_SR = _launch(
        BACKWARD, False, len(up_SN), up_SN.shape[1] // 2, 1, up_SN, grad_SI, order_S, weights_Tk, b_ENR,
        offsets_E, wide_Ss, act_SI, grad_weights_Tk,
    )  # fmt: skip
    return low_SR, act_SI, grad_weights_Tk
