"""Decoding a packed stack into a workspace: Triton where tensors are on CUDA, plain torch otherwise.

Both give the same bits: fp32 code times fp32 absmax, rounded once (a test compares them on every format).
"""

from __future__ import annotations

import importlib.util

import torch

from fourfold.formats import PackedStack, decode_stack
from fourfold.formats.plain import PlainStack

ROW_MULTIPLE = 8  # 16 bytes of bf16
HAS_TRITON = importlib.util.find_spec("triton") is not None


def decode(stack: PackedStack | PlainStack, dtype: torch.dtype) -> torch.Tensor:
    """All matrices of ``stack`` as ``[E, N, K]`` in ``dtype`` (a view of ``[E, N, Kp]`` where rows are
    padded).
    """
    if isinstance(stack, PlainStack):
        return stack.data.to(dtype)
    if stack.data.is_cuda and HAS_TRITON:
        return decode_wide(stack, dtype)[..., : stack.shape.columns]
    return decode_stack(stack, dtype)


def decode_wide(
    stack: PackedStack, dtype: torch.dtype, extra_rows: int = 0, extra_columns: int = 0
) -> torch.Tensor:
    """The matrices in the upper left of ``[E, N + extra_rows, s]``, s >= K + extra_columns.

    What lies beside and below them is undefined: room for what is multiplied together with them. Rows begin
    at multiples of 16 bytes where there are extra columns.
    """
    shape, device = stack.shape, stack.data.device
    K = shape.columns
    columns = K + extra_columns
    if extra_columns:
        columns += -columns % ROW_MULTIPLE
    in_blocks = shape.blocks(stack.fmt) * stack.fmt.blocksize if stack.fmt.is_4bit else K
    size = (shape.experts, shape.rows + extra_rows, max(columns, in_blocks))
    out_ENs = torch.empty(size, dtype=dtype, device=device)
    if stack.data.is_cuda and HAS_TRITON:
        from fourfold.kernels.decode_triton import decode_triton

        decode_triton(stack, out_ENs)
    else:
        decode_stack(stack, dtype, out=out_ENs[:, : shape.rows, :K])
    return out_ENs
