"""The grouped product with weights decoded inside: no workspace, and only experts that have rows are read.

    forward      ``y[s] = x[s] W_e^T + h[s] B_e^T``      ``[S, N]``, h = x A^T
    transposed   ``dx[s] = dy[s] W_e + h[s] A_e``        ``[S, K]``, h = dy B

A program owns up to BM rows of one expert (found from the offsets on the device, `rows_triton`) and a tile of
the result. It computes the transposed tile, so that the weights are the first operand of the tensor cores,
which has room for 64 of them where an expert has a few rows.

Four bits are loaded by words of 8 weights, a whole line of memory per matrix row in the tile for few rows. A
word's weights are decoded where it lies and joined in the thread, 16 bytes of bf16: one store and one
barrier a tile on the way to the tensor cores. The words, scales and rows of the next tile are loaded before
this one is decoded: Triton's own pipelining, which has unpacked and INT8 weights, would bring all that by way
of shared memory, and look-ups in a table as well.

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


# Lane l of a warp keeps entry l % 16 of the table; a weight is fetched from the lane that its code names: two
# instructions (the shift and this), where a load wants six to find the address. Both halves of a warp are
# segments of 16 lanes (0x101f), so the code's upper bits need no masking.
TABLE = tl.constexpr(
    "{.reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; and.b32 l, l, 15; "
    "mad.wide.u32 a, l, 4, $1; ld.global.nc.f32 $0, [a];}"
)
LOOK_UP = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;")


@triton.jit
def _nth(packed, absmax, codes_ptr, table, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Weight J of every word. The upper half of a byte is the first of its two weights."""
    code = packed >> ((J ^ 1) * 4)
    if ASM:
        value = tl.inline_asm_elementwise(
            LOOK_UP, "=f,f,r", [table, code], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        value = tl.load(codes_ptr + (code & 15))
    return (value * absmax).to(DTYPE)


@triton.jit
def _decode_words(
    packed,
    scales,
    map_ptr,
    codes_ptr,
    table,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Weights ``[BN, 8 BW]`` of a tile of words."""
    absmax, scale, offset = scales
    if DOUBLE_QUANT:
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + offset[:, None]
    absmax = tl.broadcast_to(absmax[:, :, None], (BN, BLOCKS, BW // BLOCKS))
    absmax = tl.reshape(absmax, (BN, BW))
    w0 = _nth(packed, absmax, codes_ptr, table, 0, DTYPE, ASM)
    w1 = _nth(packed, absmax, codes_ptr, table, 1, DTYPE, ASM)
    w2 = _nth(packed, absmax, codes_ptr, table, 2, DTYPE, ASM)
    w3 = _nth(packed, absmax, codes_ptr, table, 3, DTYPE, ASM)
    w4 = _nth(packed, absmax, codes_ptr, table, 4, DTYPE, ASM)
    w5 = _nth(packed, absmax, codes_ptr, table, 5, DTYPE, ASM)
    w6 = _nth(packed, absmax, codes_ptr, table, 6, DTYPE, ASM)
    w7 = _nth(packed, absmax, codes_ptr, table, 7, DTYPE, ASM)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (BN, 8 * BW))  # (a join's halves are the last bit of an index)


@triton.jit
def _load_words(
    w_ptr,
    absmax_ptr,
    scale_ptr,
    offset_ptr,
    expert,
    first_n,
    first_word,
    N,
    words_per_row,
    parts,
    groups_per_part,
    DOUBLE_QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A tile's words ``[BN, BW]``, and absmax as stored, group scales and part offsets of its blocks (the
    look-up that depends on one of these loads comes later). Zeros outside of the matrix."""
    n = first_n + tl.arange(0, BN)
    word = first_word + tl.arange(0, BW)
    live_n = n < N
    row = expert * N + n
    packed = tl.load(
        w_ptr + row[:, None] * words_per_row + word[None, :],
        mask=live_n[:, None] & (word < words_per_row)[None, :],
        other=0,
    )
    blocks_per_row = words_per_row // WORDS_PER_BLOCK
    block = first_word // WORDS_PER_BLOCK + tl.arange(0, BLOCKS)
    live = live_n[:, None] & (block < blocks_per_row)[None, :]
    absmax = tl.load(absmax_ptr + row[:, None] * blocks_per_row + block[None, :], mask=live, other=0)
    if DOUBLE_QUANT:
        rows_per_part = N // parts
        part = n // rows_per_part
        group = ((n - part * rows_per_part)[:, None] * blocks_per_row + block[None, :]) // GROUP
        part_of_all = expert * parts + part
        scale = tl.load(scale_ptr + (part_of_all * groups_per_part)[:, None] + group, mask=live, other=0.0)
        offset = tl.load(offset_ptr + part_of_all, mask=live_n, other=0.0)
        return packed, (absmax, scale, offset)
    else:
        return packed, (absmax, absmax, absmax)


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
    IS_INT8: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Weights ``[n, k]`` of unpacked or INT8 matrices; zeros outside."""
    at = expert * stride_e + n.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    w = tl.load(w_ptr + at, mask=(n < N)[:, None] & (k < K)[None, :], other=0)
    if IS_INT8:
        absmax = tl.load(absmax_ptr + expert * N + n, mask=n < N, other=0.0)
        return (w.to(tl.float32) * absmax[:, None] * STEP).to(DTYPE)
    else:
        return w.to(DTYPE)


@triton.jit
def _load_rows(ptr, rows, live, column, columns, stride):
    mask = live[:, None] & (column < columns)[None, :]
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _product_kernel(
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
    factor_out,
    factor_r,
    TRANSPOSED: tl.constexpr,
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
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    OUT: tl.constexpr = BK if TRANSPOSED else BN  # of the tile's result
    IN: tl.constexpr = BN if TRANSPOSED else BK  # summed over in one step
    columns, width = (N, K) if TRANSPOSED else (K, N)
    first_out = tl.program_id(1) * OUT
    acc = tl.zeros((OUT, BM), dtype=tl.float32)
    if KIND == FOUR_BIT:
        BW: tl.constexpr = BK // 8
        # A tile is whole blocks, or lies within one.
        BLOCKS: tl.constexpr = BW // WORDS_PER_BLOCK if BW > WORDS_PER_BLOCK else 1
        table = 0.0
        if ASM:
            table = tl.inline_asm_elementwise(
                TABLE, "=f,l", [codes_ptr], dtype=tl.float32, is_pure=True, pack=1
            )
        first_n, first_word = (0, first_out // 8) if TRANSPOSED else (first_out, 0)
        packed, scales = _load_words(
            w_ptr, absmax_ptr, scale_ptr, offset_ptr, expert, first_n, first_word, N, words_per_row, parts,
            groups_per_part, DOUBLE_QUANT, GROUP, WORDS_PER_BLOCK, BN, BW, BLOCKS,
        )  # fmt: skip
        x = _load_rows(x_ptr, rows, live, tl.arange(0, IN), columns, stride_x)
        for start in tl.range(IN, columns + IN, IN, num_stages=1):  # (start: of the next tile)
            first_n, first_word = (start, first_out // 8) if TRANSPOSED else (first_out, start // 8)
            next_packed, next_scales = _load_words(
                w_ptr, absmax_ptr, scale_ptr, offset_ptr, expert, first_n, first_word, N, words_per_row,
                parts, groups_per_part, DOUBLE_QUANT, GROUP, WORDS_PER_BLOCK, BN, BW, BLOCKS,
            )  # fmt: skip
            next_x = _load_rows(x_ptr, rows, live, start + tl.arange(0, IN), columns, stride_x)
            w = _decode_words(
                packed, scales, map_ptr, codes_ptr, table, DOUBLE_QUANT, DTYPE, ASM, BN, BW, BLOCKS
            )
            # (Triton 3.7 does not compile the usual order in fp32 for capability 10.0.)
            if TRANSPOSED and x_ptr.dtype.element_ty == tl.float32:
                acc += tl.trans(tl.dot(x, w, input_precision=PRECISION))
            elif TRANSPOSED:
                acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
            packed, scales, x = next_packed, next_scales, next_x
    else:
        out = first_out + tl.arange(0, OUT)
        for start in tl.range(0, columns, IN, num_stages=STAGES):
            column = start + tl.arange(0, IN)
            n, k = (column, out) if TRANSPOSED else (out, column)
            w = _load_dense(
                w_ptr, absmax_ptr, expert, n, k, N, K, stride_e, stride_n, stride_k, KIND == INT8, STEP, DTYPE
            )
            x = _load_rows(x_ptr, rows, live, column, columns, stride_x)
            if TRANSPOSED:
                w = tl.trans(w)
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    out = first_out + tl.arange(0, OUT)
    if LOW_RANK:
        for start in tl.range(0, R, BR, num_stages=1):
            r = start + tl.arange(0, BR)
            at = (
                expert * factor_e
                + out.to(tl.int64)[:, None] * factor_out
                + r.to(tl.int64)[None, :] * factor_r
            )
            f = tl.load(factor_ptr + at, mask=(out < width)[:, None] & (r < R)[None, :], other=0.0)
            h = _load_rows(h_ptr, rows, live, r, R, stride_h)
            acc = tl.dot(f, tl.trans(h), acc, input_precision=PRECISION)
    to = y_ptr + rows[None, :] * width + out[:, None]
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=live[None, :] & (out < width)[:, None])


@dataclass(frozen=True)
class Tiles:
    """Rows, out and in of a program's tile; how it is run."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    stages: int = 1


# Few on purpose: `tests/gpu/test_product_gpu.py` compares each with the reference, for a compiler may get one
# tile wrong and its neighbours right. (transposed, four bits) -> by rows, ascending.
TILES = {
    (False, True): (Tiles(16, 64, 256, 4), Tiles(64, 128, 64, 4), Tiles(128, 128, 64, 8)),
    (True, True): (Tiles(16, 32, 256, 4), Tiles(64, 64, 128, 4), Tiles(128, 64, 128, 8)),
    (False, False): (Tiles(16, 64, 128, 4, 2), Tiles(64, 128, 64, 4, 2)),
    (True, False): (Tiles(16, 64, 128, 4, 2), Tiles(64, 64, 128, 4, 2)),
}
ROWS_OF_TILE = {16: 0, 64: 32, 128: 256}  # BM -> from how many rows an expert on
# Products in fp32 are no work for tensor cores: wide tiles would only take registers.
FP32_TILES = {False: Tiles(16, 32, 128, 4), True: Tiles(16, 32, 128, 4)}

RANK_STEP = 32  # of the low-rank sum


def choose_tiles(rows: int, experts: int, dtype: torch.dtype, *, transposed: bool, is_4bit: bool) -> Tiles:
    """Tiles for ``rows`` spread over the experts that can have any."""
    if dtype == torch.float32:
        return FP32_TILES[transposed]
    per_expert = rows / max(1, min(rows, experts))
    fitting = [t for t in TILES[transposed, is_4bit] if per_expert >= ROWS_OF_TILE[t.BM]]
    return fitting[-1]


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
    stack: PackedStack | PlainStack, rank: int, dtype: torch.dtype, tiles: Tiles, *, transposed: bool
) -> dict[str, Any]:
    """What a kernel is compiled for, beside the dtypes."""
    packed = None if isinstance(stack, PlainStack) else stack.fmt
    return {
        "TRANSPOSED": transposed,
        "KIND": _kind(stack),
        "DOUBLE_QUANT": packed is not None and packed.double_quant,
        "GROUP": ABSMAX_GROUP,
        "WORDS_PER_BLOCK": packed.blocksize // 8 if packed is not None and packed.is_4bit else 1,
        "STEP": INT8_STEP,
        # (neither Triton's interpreter nor ROCm reads PTX)
        "ASM": not triton.knobs.runtime.interpret and torch.version.hip is None,
        "PRECISION": "ieee",
        "LOW_RANK": rank > 0,
        "EP": triton.next_power_of_2(stack.shape.experts),
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
    if x_SK.shape[1] != (N if transposed else K):
        raise ValueError(f"rows of {x_SK.shape[1]} numbers, weights for {N if transposed else K}")
    y = x_SK.new_empty(S, width)
    if S == 0:
        return y
    if tiles is None:
        is_4bit = _kind(stack) == FOUR_BIT.value
        tiles = choose_tiles(S, E, x_SK.dtype, transposed=transposed, is_4bit=is_4bit)
    x_SK = x_SK if x_SK.stride(1) == 1 else x_SK.contiguous()
    h = x_SK if h_SR is None else (h_SR if h_SR.stride(1) == 1 else h_SR.contiguous())
    pointers, sizes = _weights(stack, x_SK)
    grid = (triton.cdiv(S, tiles.BM) + min(E, S), triton.cdiv(width, tiles.BK if transposed else tiles.BN))
    strides = (0, 0, 0) if factor is None else factor.stride()
    if transposed:
        strides = strides[0], strides[2], strides[1]
    with torch.cuda.device_of(x_SK):  # Triton launches on the current device
        _product_kernel[grid](
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
            *strides,
            **constants(stack, R, x_SK.dtype, tiles, transposed=transposed),
        )
    return y
