"""Decoding a packed stack into a workspace: Triton where tensors are on CUDA, plain torch otherwise.

Both give the same bits: fp32 code times fp32 absmax, rounded once (a test compares them on every format).
"""

from __future__ import annotations

import importlib.util

import torch

from fourfold.formats import PackedStack, decode_stack
from fourfold.formats.plain import PlainStack

HAS_TRITON = importlib.util.find_spec("triton") is not None


def decode(stack: PackedStack | PlainStack, dtype: torch.dtype) -> torch.Tensor:
    """All matrices of ``stack`` as ``[E, N, K]`` in ``dtype`` (a view of ``[E, N, Kp]`` where rows are
    padded).
    """
    if isinstance(stack, PlainStack):
        return stack.data.to(dtype)
    if stack.data.is_cuda and HAS_TRITON:
        from fourfold.kernels.decode_triton import decode_triton

        return decode_triton(stack, dtype)
    return decode_stack(stack, dtype)
