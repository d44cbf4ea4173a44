"""``dq(q(W))``: what a weight is after packing, one matrix at a time, in fp32.

The bytes are those that packing makes (`formats.quantize` for experts, bitsandbytes for Linears); what
differs is memory. bitsandbytes' quantizer on CPUs takes 25 bytes a weight, 2 GB for the largest published
expert matrix, so blocks are quantized a few million weights at a time. Double quantization needs the scales
of the whole matrix; they are all there before it begins.

N rows (out), K columns (in), B blocks.
"""

from __future__ import annotations

import torch

from fourfold.errors import CheckpointError
from fourfold.formats.codebooks import byte_pairs
from fourfold.formats.packed import INT8_STEP, PackedStack, PackFormat, StackShape, decode_absmax
from fourfold.formats.quantize import FP16_MAX, pack_absmax_

_CHUNK = 2**21  # weights


def round_trip(
    w_NK: torch.Tensor,
    fmt: PackFormat,
    *,
    name: str,
    flat: bool = False,
    out_NK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and decode one matrix.

    Args:
        w_NK: ``[N, K]`` in bf16, fp16 or fp32, out-by-in, on the CPU; a part (gate or up) is a matrix of its
            own.
        fmt: how it is packed.
        name: for messages.
        flat: blocks straddle rows, as bitsandbytes has them in Linears (experts: every row begins a block).
        out_NK: fp32, where the result is to be written; for a part of a matrix, which then takes no memory
            of its own.

    Returns:
        fp32 ``[N, K]``, before any rounding to the model's dtype; ``out_NK``, if that was given.

    Raises:
        CheckpointError: a weight is not finite, or (INT8) beyond the range of fp16.
    """
    limit = FP16_MAX if not fmt.is_4bit else torch.finfo(torch.float32).max
    low, high = torch.aminmax(w_NK)
    if not (float(low) >= -limit and float(high) <= limit):
        raise CheckpointError(f"{name}: weights are NaN, infinite or beyond what {fmt} can hold")
    if out_NK is None:
        out_NK = torch.empty(w_NK.shape, dtype=torch.float32)
    if not fmt.is_4bit:
        return _int8(w_NK, out_NK)
    N, K = w_NK.shape
    if K % fmt.blocksize == 0:  # no block straddles rows, and nothing is padded
        shape = (-1, fmt.blocksize) if flat else (N, K)
        _four_bit(w_NK.reshape(shape), fmt, out_NK.view(shape))
        return out_NK
    if flat:
        padding = -w_NK.numel() % fmt.blocksize
        rows_RK = torch.nn.functional.pad(w_NK.reshape(-1), (0, padding)).view(-1, fmt.blocksize)
    else:
        rows_RK = torch.nn.functional.pad(w_NK, (0, -K % fmt.blocksize))
    out_RK = _four_bit(rows_RK, fmt, torch.empty(rows_RK.shape))
    out_NK.copy_(out_RK.view(-1)[: N * K].view(N, K) if flat else out_RK[:, :K])
    return out_NK


def _int8(w_NK: torch.Tensor, out_NK: torch.Tensor) -> torch.Tensor:
    import bitsandbytes  # noqa: F401  (registers the operators)

    step = max(1, _CHUNK // w_NK.shape[1])
    for start in range(0, len(w_NK), step):
        half = w_NK[start : start + step].to(torch.float16).contiguous()
        codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(half)
        out_NK[start : start + step] = (codes * absmax.view(-1, 1)).mul_(INT8_STEP)
    return out_NK


def _four_bit(w_NK: torch.Tensor, fmt: PackFormat, out_NK: torch.Tensor) -> torch.Tensor:
    import bitsandbytes  # noqa: F401  (registers the operators)

    N, K = w_NK.shape
    stack = PackedStack.empty(fmt, StackShape(1, N, K), "cpu")
    absmax_NB = torch.empty(N, K // fmt.blocksize)
    step = max(1, _CHUNK // K)
    for start in range(0, N, step):
        rows = w_NK[start : start + step].contiguous()
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
            rows, fmt.blocksize, fmt.quant_type, torch.uint8
        )
        stack.data[0, start : start + step] = codes.view(len(rows), -1)
        absmax_NB[start : start + step] = absmax.view(len(rows), -1)
    if fmt.double_quant:
        pack_absmax_(stack, 0, absmax_NB.view(1, -1))
        absmax_NB = decode_absmax(stack)[0]
    pairs = byte_pairs(fmt.quant_type, stack.data.device)
    for start in range(0, N, step):
        codes = stack.data[0, start : start + step]
        values = torch.index_select(pairs, 0, codes.reshape(-1).int()).view(torch.float32)
        blocks = values.view(len(codes), -1, fmt.blocksize)
        out_NK[start : start + step] = blocks.mul_(absmax_NB[start : start + step, :, None]).view(
            len(codes), -1
        )
    return out_NK
