"""The grouped product with weights decoded inside: no workspace, and only experts that have rows are read.

    forward      ``y[s] = x[s] W_e^T + h[s] B_e^T``      ``[S, N]``, h = x A^T
    transposed   ``dx[s] = dy[s] W_e + h[s] A_e``        ``[S, K]``, h = dy B

A program owns up to BM rows of one expert (found from the offsets on the device, `rows_triton`) and a tile of
the result. It computes the transposed tile: the decoded weight is the first operand of the tensor cores,
which may come from registers.

Four bits are loaded as words of 8 weights and never put in order. Weight j of every word of a tile is a
matrix of its own, so a tile is eight products whose operands are the same words shifted by 4 j bits. Forward,
where K is summed over, the rows' columns are split the same way; transposed, there are eight accumulators,
interleaved once at the end. What changes its place between threads on the way to the tensor cores are so the
words, half a byte a weight, and not what they decode to. The table of values is read by an instruction that
Triton does not look into (else it would pipeline the table's look-ups through shared memory, four bytes a
weight); the next tile's words, scales and rows are loaded before the eight products of this one.

A weight is exactly what decoding gives (`decode_triton`): fp32 code times fp32 absmax, rounded once to the
rows' dtype; products and sums are kept apart (``enable_fp_fusion=False``).

S rows sorted by expert, E experts, N out, K in, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fourfold.formats import PackedStack
from fourfold.formats.codebooks import absmax_codes, four_bit_codes
from fourfold.formats.packed import ABSMAX_GROUP, INT8_STEP
from fourfold.formats.plain import PlainStack
from fourfold.kernels.rows_triton import _rows_of_tile

DENSE, INT8, FOUR_BIT = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def _look_up(codes_ptr, code, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [codes_ptr + code], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(codes_ptr + code)


@triton.jit
def _nth(packed, absmax, codes_ptr, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Weight J of every word. The upper half of a byte is the first of its two weights."""
    return (_look_up(codes_ptr, (packed >> ((J ^ 1) * 4)) & 15, ASM) * absmax).to(DTYPE)


@triton.jit
def _eighths(x, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Columns 8 w + j of ``x``, for j = 0 ... 7, each ``[ROWS, WORDS]``."""
    even, odd = tl.split(tl.reshape(x, (ROWS, WORDS, 2, 2, 2)))
    x04_26_0, x04_26_1 = tl.split(even)
    x15_37_0, x15_37_1 = tl.split(odd)
    x0, x4 = tl.split(x04_26_0)
    x2, x6 = tl.split(x04_26_1)
    x1, x5 = tl.split(x15_37_0)
    x3, x7 = tl.split(x15_37_1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _load_words(
    w_ptr,
    absmax_ptr,
    scale_ptr,
    offset_ptr,
    map_ptr,
    expert,
    n,
    start,
    N,
    words_per_row,
    parts,
    groups_per_part,
    DOUBLE_QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Words ``start`` ... of rows ``n`` and the scale of each, ``[BN, BW]``; zeros outside."""
    word = start + tl.arange(0, BW)
    live_n = n < N
    row = expert * N + n
    packed = tl.load(
        w_ptr + row[:, None] * words_per_row + word[None, :],
        mask=live_n[:, None] & (word < words_per_row)[None, :],
        other=0,
    )
    # A tile is whole blocks, or lies within one.
    blocks_per_row = words_per_row // WORDS_PER_BLOCK
    BLOCKS: tl.constexpr = BW // WORDS_PER_BLOCK if BW > WORDS_PER_BLOCK else 1
    block = start // WORDS_PER_BLOCK + tl.arange(0, BLOCKS)
    live = live_n[:, None] & (block < blocks_per_row)[None, :]
    at = absmax_ptr + row[:, None] * blocks_per_row + block[None, :]
    if DOUBLE_QUANT:
        code = tl.load(at, mask=live, other=0).to(tl.int32)
        rows_per_part = N // parts
        part = n // rows_per_part
        group = ((n - part * rows_per_part)[:, None] * blocks_per_row + block[None, :]) // GROUP
        part = expert * parts + part
        scale = tl.load(scale_ptr + (part * groups_per_part)[:, None] + group, mask=live, other=0.0)
        offset = tl.load(offset_ptr + part, mask=live_n, other=0.0)
        absmax = tl.load(map_ptr + code) * scale + offset[:, None]
    else:
        absmax = tl.load(at, mask=live, other=0.0)
    absmax = tl.broadcast_to(absmax[:, :, None], (BN, BLOCKS, BW // BLOCKS))
    return packed, tl.reshape(absmax, (BN, BW))


@triton.jit
def _load_dense(
    w_ptr,
    absmax_ptr,
    expert,
    n,
    k,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Weights ``[n, k]`` of unpacked or INT8 matrices; zeros outside."""
    at = expert * stride_e + n.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    w = tl.load(w_ptr + at, mask=(n < N)[:, None] & (k < K)[None, :], other=0)
    if KIND == INT8:
        absmax = tl.load(absmax_ptr + expert * N + n, mask=n < N, other=0.0)
        return (w.to(tl.float32) * absmax[:, None] * STEP).to(DTYPE)
    else:
        return w.to(DTYPE)


@triton.jit
def _load_rows(ptr, rows, live, column, columns, stride):
    mask = live[:, None] & (column < columns)[None, :]
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    x_ptr,
    h_ptr,
    w_ptr,
    absmax_ptr,
    scale_ptr,
    offset_ptr,
    codes_ptr,
    map_ptr,
    factor_ptr,
    y_ptr,
    offsets_ptr,
    E,
    N,
    K,
    R,
    words_per_row,
    parts,
    groups_per_part,
    stride_x,
    stride_h,
    stride_e,
    stride_n,
    stride_k,
    factor_e,
    factor_n,
    factor_r,
    KIND: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_RANK: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    expert, first, end = _rows_of_tile(offsets_ptr, E, EP, BM)
    if first >= end:
        return
    expert = expert.to(tl.int64)
    rows = first.to(tl.int64) + tl.arange(0, BM)
    live = rows < end
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if KIND == FOUR_BIT:
        BW: tl.constexpr = BK // 8
        packed, absmax = _load_words(
            w_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, expert, n, 0, N, words_per_row, parts,
            groups_per_part, DOUBLE_QUANT, GROUP, WORDS_PER_BLOCK, BN, BW,
        )  # fmt: skip
        x = _load_rows(x_ptr, rows, live, tl.arange(0, BK), K, stride_x)
        for start in tl.range(0, words_per_row, BW, num_stages=1):
            following = start + BW
            next_packed, next_absmax = _load_words(
                w_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, expert, n, following, N, words_per_row,
                parts, groups_per_part, DOUBLE_QUANT, GROUP, WORDS_PER_BLOCK, BN, BW,
            )  # fmt: skip
            next_x = _load_rows(x_ptr, rows, live, following * 8 + tl.arange(0, BK), K, stride_x)
            eighths = _eighths(x, BM, BW)
            for j in tl.static_range(8):
                w = _nth(packed, absmax, codes_ptr, j, DTYPE, ASM)
                acc = tl.dot(w, tl.trans(eighths[j]), acc, input_precision=PRECISION)
            packed, absmax, x = next_packed, next_absmax, next_x
    else:
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            w = _load_dense(
                w_ptr, absmax_ptr, expert, n, k, N, K, stride_e, stride_n, stride_k, KIND, STEP, DTYPE
            )
            x = _load_rows(x_ptr, rows, live, k, K, stride_x)
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    if LOW_RANK:
        for start in tl.range(0, R, BR, num_stages=1):
            r = start + tl.arange(0, BR)
            at = expert * factor_e + n.to(tl.int64)[:, None] * factor_n + r[None, :] * factor_r
            b = tl.load(factor_ptr + at, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
            h = _load_rows(h_ptr, rows, live, r, R, stride_h)
            acc = tl.dot(b, tl.trans(h), acc, input_precision=PRECISION)
    to = y_ptr + rows[None, :] * N + n[:, None]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=live[None, :] & (n < N)[:, None])


@triton.jit
def _transposed_kernel(
    x_ptr,
    h_ptr,
    w_ptr,
    absmax_ptr,
    scale_ptr,
    offset_ptr,
    codes_ptr,
    map_ptr,
    factor_ptr,
    y_ptr,
    offsets_ptr,
    E,
    N,
    K,
    R,
    words_per_row,
    parts,
    groups_per_part,
    stride_x,
    stride_h,
    stride_e,
    stride_n,
    stride_k,
    factor_e,
    factor_r,
    factor_k,
    KIND: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_RANK: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    expert, first, end = _rows_of_tile(offsets_ptr, E, EP, BM)
    if first >= end:
        return
    expert = expert.to(tl.int64)
    rows = first.to(tl.int64) + tl.arange(0, BM)
    live = rows < end
    first_k = tl.program_id(1) * BK
    k = first_k + tl.arange(0, BK)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if KIND == FOUR_BIT:
        BW: tl.constexpr = BK // 8
        n = tl.arange(0, BN)
        packed, absmax = _load_words(
            w_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, expert, n, first_k // 8, N, words_per_row,
            parts, groups_per_part, DOUBLE_QUANT, GROUP, WORDS_PER_BLOCK, BN, BW,
        )  # fmt: skip
        x = _load_rows(x_ptr, rows, live, n, N, stride_x)
        acc_0 = tl.zeros((BW, BM), dtype=tl.float32)
        acc_1, acc_2, acc_3, acc_4, acc_5, acc_6, acc_7 = acc_0, acc_0, acc_0, acc_0, acc_0, acc_0, acc_0
        for start in tl.range(0, N, BN, num_stages=1):
            n = start + BN + tl.arange(0, BN)
            next_packed, next_absmax = _load_words(
                w_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, expert, n, first_k // 8, N, words_per_row,
                parts, groups_per_part, DOUBLE_QUANT, GROUP, WORDS_PER_BLOCK, BN, BW,
            )  # fmt: skip
            next_x = _load_rows(x_ptr, rows, live, n, N, stride_x)
            p, a, xt = tl.trans(packed), tl.trans(absmax), tl.trans(x)
            acc_0 = tl.dot(_nth(p, a, codes_ptr, 0, DTYPE, ASM), xt, acc_0, input_precision=PRECISION)
            acc_1 = tl.dot(_nth(p, a, codes_ptr, 1, DTYPE, ASM), xt, acc_1, input_precision=PRECISION)
            acc_2 = tl.dot(_nth(p, a, codes_ptr, 2, DTYPE, ASM), xt, acc_2, input_precision=PRECISION)
            acc_3 = tl.dot(_nth(p, a, codes_ptr, 3, DTYPE, ASM), xt, acc_3, input_precision=PRECISION)
            acc_4 = tl.dot(_nth(p, a, codes_ptr, 4, DTYPE, ASM), xt, acc_4, input_precision=PRECISION)
            acc_5 = tl.dot(_nth(p, a, codes_ptr, 5, DTYPE, ASM), xt, acc_5, input_precision=PRECISION)
            acc_6 = tl.dot(_nth(p, a, codes_ptr, 6, DTYPE, ASM), xt, acc_6, input_precision=PRECISION)
            acc_7 = tl.dot(_nth(p, a, codes_ptr, 7, DTYPE, ASM), xt, acc_7, input_precision=PRECISION)
            packed, absmax, x = next_packed, next_absmax, next_x
        even = tl.join(tl.join(acc_0, acc_4), tl.join(acc_2, acc_6))
        odd = tl.join(tl.join(acc_1, acc_5), tl.join(acc_3, acc_7))
        interleaved = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))  # word, then the three bits of j
        acc = tl.reshape(interleaved, (BK, BM))
    else:
        acc = tl.zeros((BK, BM), dtype=tl.float32)
        for start in tl.range(0, N, BN, num_stages=STAGES):
            n = start + tl.arange(0, BN)
            w = _load_dense(
                w_ptr, absmax_ptr, expert, n, k, N, K, stride_e, stride_n, stride_k, KIND, STEP, DTYPE
            )
            x = _load_rows(x_ptr, rows, live, n, N, stride_x)
            acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=PRECISION)
    if LOW_RANK:
        for start in tl.range(0, R, BR, num_stages=1):
            r = start + tl.arange(0, BR)
            at = expert * factor_e + k.to(tl.int64)[:, None] * factor_k + r.to(tl.int64)[None, :] * factor_r
            a = tl.load(factor_ptr + at, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)
            h = _load_rows(h_ptr, rows, live, r, R, stride_h)
            acc = tl.dot(a, tl.trans(h), acc, input_precision=PRECISION)
    to = y_ptr + rows[None, :] * K + k[:, None]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=live[None, :] & (k < K)[:, None])


@dataclass(frozen=True)
class Tiles:
    """Rows, out and in of a program's tile; how it is run."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    stages: int = 1


# Few on purpose: `tests/gpu/test_product_gpu.py` compares each with the reference, for a compiler may get one
# tile wrong and its neighbours right. (transposed, words of four bits) -> by rows, ascending.
TILES = {
    (False, True): (Tiles(16, 64, 256, 4), Tiles(64, 128, 128, 4), Tiles(128, 128, 128, 8)),
    (True, True): (Tiles(16, 32, 256, 4), Tiles(64, 32, 256, 8)),
    (False, False): (Tiles(16, 64, 128, 4, 2), Tiles(64, 128, 64, 4, 2)),
    (True, False): (Tiles(16, 64, 128, 4, 2), Tiles(64, 64, 128, 4, 2)),
}
ROWS_OF_TILE = {16: 1, 64: 32, 128: 256}  # BM -> from how many rows an expert on

RANK_STEP = 32  # of the low-rank sum; longer ones go on in steps


def choose_tiles(
    rows: int, experts: int, dtype: torch.dtype, *, transposed: bool, is_4bit: bool
) -> tuple[int, Tiles]:
    """Index in `TILES` and tiles for ``rows`` spread over the experts that can have any."""
    tiles = TILES[transposed, is_4bit]
    if dtype == torch.float32:  # no tensor cores: wide tiles would only take registers
        return 0, tiles[0]
    per_expert = rows / max(1, min(rows, experts))
    index = max(i for i, tile in enumerate(tiles) if i == 0 or per_expert >= ROWS_OF_TILE[tile.BM])
    return index, tiles[index]


def _kind(stack: PackedStack | PlainStack) -> int:
    if isinstance(stack, PlainStack):
        return int(DENSE.value)
    return int(FOUR_BIT.value if stack.fmt.is_4bit else INT8.value)


def _weights(stack: PackedStack | PlainStack, like: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Pointers (weights, absmax and companions, tables) and sizes of a stack as the kernels take them.

    Where a format lacks one, ``like`` stands in; it is not read.
    """
    if isinstance(stack, PlainStack):
        return [stack.data, *[like] * 5], [0, 1, 0]
    if not stack.fmt.is_4bit:
        data = stack.data.view(stack.data.shape[:3])
        return [data, stack.absmax.view(torch.float32), *[like] * 4], [0, 1, 0]
    device = stack.data.device
    codes = four_bit_codes(stack.fmt.quant_type, device)
    words = stack.data.view(torch.int32)
    sizes = [words.shape[2], stack.shape.parts]
    if not stack.fmt.double_quant:
        return [words, stack.absmax.view(torch.float32), like, like, codes, like], [*sizes, 0]
    assert stack.absmax_scale is not None
    assert stack.absmax_offset is not None
    scale, offset = stack.absmax_scale.view(torch.float32), stack.absmax_offset.view(torch.float32)
    return [words, stack.absmax, scale, offset, codes, absmax_codes(device)], [*sizes, scale.shape[-1]]


def constants(
    stack: PackedStack | PlainStack, experts: int, rank: int, dtype: torch.dtype, tiles: Tiles
) -> dict[str, Any]:
    """What a kernel is compiled for, beside the dtypes."""
    packed = None if isinstance(stack, PlainStack) else stack.fmt
    return {
        "KIND": _kind(stack),
        "DOUBLE_QUANT": packed is not None and packed.double_quant,
        "GROUP": ABSMAX_GROUP,
        "WORDS_PER_BLOCK": packed.blocksize // 8 if packed is not None and packed.is_4bit else 1,
        "STEP": INT8_STEP,
        "ASM": not triton.knobs.runtime.interpret,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "LOW_RANK": rank > 0,
        "EP": triton.next_power_of_2(experts),
        "BM": tiles.BM,
        "BN": tiles.BN,
        "BK": tiles.BK,
        "BR": min(RANK_STEP, max(16, triton.next_power_of_2(rank))),
        "STAGES": tiles.stages,
        "num_warps": tiles.num_warps,
        "enable_fp_fusion": False,
    }


def product_triton(
    x_SK: torch.Tensor,
    stack: PackedStack | PlainStack,
    offsets_E: torch.Tensor,
    h_SR: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    *,
    transposed: bool,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``x W^T + h B^T``, or transposed ``dy W + h A``, without host synchronisation.

    Args:
        x_SK: sorted rows, fp32, bf16 or fp16; transposed ``[S, N]``. Rows may lie apart.
        stack: packed ``[E, N, K]``, or unpacked weights in any layout.
        offsets_E: end of each expert's rows, int32, the last one S.
        h_SR: the rows' low-rank columns, in the dtype of ``x_SK``.
        factor: B ``[E, N, R]``; transposed, A ``[E, R, K]``; in that dtype too.
        tiles: others than `choose_tiles` gives.

    Returns:
        ``[S, N]``, transposed ``[S, K]``, contiguous.
    """
    E, N, K = stack.shape.experts, stack.shape.rows, stack.shape.columns
    S, R = x_SK.shape[0], 0 if factor is None else factor.shape[1 if transposed else 2]
    width = K if transposed else N
    y = x_SK.new_empty(S, width)
    if S == 0:
        return y
    if tiles is None:
        is_4bit = _kind(stack) == FOUR_BIT.value
        _, tiles = choose_tiles(S, E, x_SK.dtype, transposed=transposed, is_4bit=is_4bit)
    x_SK = x_SK if x_SK.stride(1) == 1 else x_SK.contiguous()
    h = x_SK if h_SR is None else (h_SR if h_SR.stride(1) == 1 else h_SR.contiguous())
    pointers, sizes = _weights(stack, x_SK)
    grid = (triton.cdiv(S, tiles.BM) + min(E, S), triton.cdiv(width, tiles.BK if transposed else tiles.BN))
    kernel = _transposed_kernel if transposed else _forward_kernel
    with torch.cuda.device_of(x_SK):  # Triton launches on the current device
        kernel[grid](
            x_SK,
            h,
            *pointers,
            x_SK if factor is None else factor,
            y,
            offsets_E,
            E,
            N,
            K,
            R,
            *sizes,
            x_SK.stride(0),
            h.stride(0),
            *(pointers[0].stride() if _kind(stack) != FOUR_BIT.value else (0, 0, 0)),
            *((0, 0, 0) if factor is None else factor.stride()),
            **constants(stack, E, R, x_SK.dtype, tiles),
        )
    return y
