"""Decoding in one pass over memory: read half a byte a weight, write it once in the compute dtype.

A program decodes a tile of rows by words: 8 weights, 4 bytes in, 16 bytes out in bf16, so that both sides are
whole transactions. Which matrix and part a row belongs to is computed once a row. The scale of a word's block
(with double quantization: code map, group scale, part offset) is computed once a word; its values come from
the 16-entry table, which stays in L1. Products and sums are kept apart (``enable_fp_fusion=False``): a fused
multiply-add would round the double-quantized absmax differently from bitsandbytes and from the plain-torch
twin.

Element counts of a stack pass 2^31, so addresses are 64 bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fourfold.formats import PackedStack
from fourfold.formats.codebooks import absmax_codes, four_bit_codes
from fourfold.formats.packed import ABSMAX_GROUP, INT8_STEP

WORDS_PER_TILE = 512
NUM_WARPS = 4


@triton.jit
def _decode_4bit_kernel(
    words_ptr,
    absmax_ptr,
    scale_ptr,
    offset_ptr,
    codes_ptr,
    map_ptr,
    out_ptr,
    all_rows,
    words_per_row,
    rows_per_part,
    groups_per_part,
    rows,
    extra_rows,
    stride,
    DOUBLE_QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    live = (row < all_rows)[:, None] & (word < words_per_row)[None, :]
    row_64 = row.to(tl.int64)
    packed = tl.load(words_ptr + row_64[:, None] * words_per_row + word[None, :], mask=live, other=0)
    blocks_per_row = words_per_row // WORDS_PER_BLOCK
    block_in_row = word // WORDS_PER_BLOCK
    block = row_64[:, None] * blocks_per_row + block_in_row[None, :]
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32)
        part = row // rows_per_part
        group = ((row - part * rows_per_part)[:, None] * blocks_per_row + block_in_row[None, :]) // GROUP
        scale = tl.load(scale_ptr + (part * groups_per_part)[:, None] + group, mask=live, other=0.0)
        offset = tl.load(offset_ptr + part, mask=row < all_rows, other=0.0)
        absmax = tl.load(map_ptr + code) * scale + offset[:, None]
    else:
        absmax = tl.load(absmax_ptr + block, mask=live, other=0.0)
    # The upper half of a byte is the first of its two weights: in a little-endian word, weight j is at
    # bit 4 (j ^ 1).
    j = tl.arange(0, 8)
    code_of = (packed[:, :, None] >> ((j ^ 1) * 4)[None, None, :]) & 15
    value = tl.load(codes_ptr + code_of) * absmax[:, :, None]
    out = (row_64 + row // rows * extra_rows) * stride
    element = out[:, None, None] + (word * 8)[None, :, None] + j[None, None, :]
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=live[:, :, None])


@triton.jit
def _decode_int8_kernel(
    data_ptr,
    absmax_ptr,
    out_ptr,
    columns,
    rows,
    extra_rows,
    stride,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = column < columns
    code = tl.load(data_ptr + row * columns + column, mask=live, other=0).to(tl.float32)
    value = code * tl.load(absmax_ptr + row) * STEP
    out = out_ptr + (row + row // rows * extra_rows) * stride
    tl.store(out + column, value.to(out_ptr.dtype.element_ty), mask=live)


def decode_triton(stack: PackedStack, out_ENs: torch.Tensor) -> None:
    """Decode into ``out_ENs`` ``[E, N or more, s]``, contiguous; s: at least the columns in whole blocks.

    The columns past K (a row's padding) and the rows past N are left undefined.
    """
    fmt, shape, device = stack.fmt, stack.shape, stack.data.device
    E, N, K = shape.experts, shape.rows, shape.columns
    extra_rows, stride = out_ENs.shape[1] - N, out_ENs.shape[2]
    if not fmt.is_4bit:
        tile = min(2048, triton.next_power_of_2(K))
        with torch.cuda.device_of(stack.data):  # Triton launches on the current device
            _decode_int8_kernel[(E * N, triton.cdiv(K, tile))](
                stack.data,
                stack.absmax.view(torch.float32),
                out_ENs,
                K,
                N,
                extra_rows,
                stride,
                STEP=INT8_STEP,
                TILE=tile,
                enable_fp_fusion=False,
            )
        return
    B = shape.blocks(fmt)
    words_per_row = B * fmt.blocksize // 8
    tile_words = min(WORDS_PER_TILE, triton.next_power_of_2(words_per_row))
    tile_rows = WORDS_PER_TILE // tile_words
    codes = four_bit_codes(fmt.quant_type, device)
    if fmt.double_quant:
        assert stack.absmax_scale is not None
        assert stack.absmax_offset is not None
        absmax, scale = stack.absmax, stack.absmax_scale.view(torch.float32)
        offset, groups = stack.absmax_offset.view(torch.float32), stack.absmax_scale.shape[-1]
        code_map = absmax_codes(device)
    else:
        absmax = scale = offset = stack.absmax.view(torch.float32)
        groups, code_map = 0, codes
    with torch.cuda.device_of(stack.data):
        _decode_4bit_kernel[(triton.cdiv(E * N, tile_rows), triton.cdiv(words_per_row, tile_words))](
            stack.data.view(torch.int32),
            absmax,
            scale,
            offset,
            codes,
            code_map,
            out_ENs,
            E * N,
            words_per_row,
            N // shape.parts,
            groups,
            N,
            extra_rows,
            stride,
            DOUBLE_QUANT=fmt.double_quant,
            GROUP=ABSMAX_GROUP,
            WORDS_PER_BLOCK=fmt.blocksize // 8,
            ROWS=tile_rows,
            WORDS=tile_words,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
