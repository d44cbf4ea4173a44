"""Decoding in one pass over memory: read half a byte a weight, write it once in the compute dtype.

A program decodes a tile of whole blocks. The scale of a block (with double quantization: code map, group
scale, part offset) is computed once per block and broadcast along it; the two values of a byte come from the
16-entry table, which stays in L1. Products and sums are kept apart (``enable_fp_fusion=False``): a fused
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


@triton.jit
def _decode_4bit_kernel(
    data_ptr,
    absmax_ptr,
    scale_ptr,
    offset_ptr,
    codes_ptr,
    map_ptr,
    out_ptr,
    n_blocks,
    blocks_per_row,
    blocks_per_part,
    groups_per_part,
    rows,
    extra_rows,
    stride,
    DOUBLE_QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = block < n_blocks
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32)
        part = block // blocks_per_part
        group = (block - part * blocks_per_part) // GROUP
        scale = tl.load(scale_ptr + part * groups_per_part + group, mask=live, other=0.0)
        absmax = tl.load(map_ptr + code) * scale + tl.load(offset_ptr + part, mask=live, other=0.0)
    else:
        absmax = tl.load(absmax_ptr + block, mask=live, other=0.0)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(data_ptr + byte, mask=live[:, None], other=0).to(tl.int32)
    first = tl.load(codes_ptr + (packed >> 4)) * absmax[:, None]
    second = tl.load(codes_ptr + (packed & 15)) * absmax[:, None]
    row = block // blocks_per_row
    first_element = (row + row // rows * extra_rows) * stride + (block - row * blocks_per_row) * (2 * HALF)
    element = first_element[:, None] + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + element, tl.interleave(first, second).to(out_ptr.dtype.element_ty), mask=live[:, None])


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
    n_blocks = E * N * B
    half = fmt.blocksize // 2
    tile = max(1, 2048 // half)
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
        _decode_4bit_kernel[(triton.cdiv(n_blocks, tile),)](
            stack.data,
            absmax,
            scale,
            offset,
            codes,
            code_map,
            out_ENs,
            n_blocks,
            B,
            N // shape.parts * B,
            groups,
            N,
            extra_rows,
            stride,
            DOUBLE_QUANT=fmt.double_quant,
            GROUP=ABSMAX_GROUP,
            HALF=half,
            TILE=tile,
            enable_fp_fusion=False,
        )
