"""Grouped matrix products: rows sorted by expert, one product per group.

On CUDA `torch.nn.functional.grouped_mm` does a whole stack in one launch and reads the offsets on the device.
It wants bf16, capability 8.0, and every stride a multiple of 16 bytes. fp16 and other strides are multiplied
in Triton, which reads the offsets on the device as well. fp32 on CUDA, and every CPU, takes a loop over
groups, which reads them on the host: free on a CPU, one synchronisation on CUDA. (On CPUs the loop is as
fast: 27.1 ms both ways for 4 groups of 256 x 3072 x 576 in fp32.)

S rows, E groups, K/M/N dimensions. `offsets_E` holds the end of each group, int32, as `grouped_mm` wants it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fourfold.formats import StackShape
from fourfold.formats.plain import PlainStack
from fourfold.kernels.decode import HAS_TRITON

RANK_MULTIPLE = 8  # 16 bytes of bf16: low-rank factors of other ranks are padded to it on CUDA

SUM_BLOCKS = 16  # `grouped_sums` copies this part of the weights at a time


def _native_grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    function = (
        getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    )  # public from torch 2.10 on
    return function(a, b, offs=offsets_E)


def _aligned(tensor: torch.Tensor) -> bool:
    strides = [s for s in tensor.stride() if s != 1]
    return all(s * tensor.element_size() % 16 == 0 for s in strides) and tensor.data_ptr() % 16 == 0


def uses_native(*operands: torch.Tensor) -> bool:
    """Whether `grouped_mm` takes these operands in one launch, without host synchronisation."""
    first = operands[0]
    return (
        first.is_cuda
        and first.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(first.device) >= (8, 0)
        and all(_aligned(t) for t in operands)
    )


def uses_triton(*operands: torch.Tensor) -> bool:
    """Whether Triton multiplies these operands (where `uses_native` says no)."""
    first = operands[0]
    return (
        first.is_cuda
        and HAS_TRITON
        and first.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(first.device) >= (8, 0)
    )


def _dense_product(
    x_SK: torch.Tensor,
    w_EKN: torch.Tensor,
    offsets_E: torch.Tensor,
    h_SR: torch.Tensor | None = None,
    b_ERN: torch.Tensor | None = None,
) -> torch.Tensor:
    from fourfold.kernels.product_triton import product_triton

    E, K, N = w_EKN.shape
    stack = PlainStack(StackShape(E, N, K), w_EKN.transpose(1, 2))
    factor_ENR = None if b_ERN is None else b_ERN.transpose(1, 2)
    return product_triton(x_SK, stack, offsets_E, h_SR, factor_ENR, transposed=False)


def _groups(offsets_E: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, stop in enumerate(offsets_E.tolist()):
        if stop > start:
            yield expert, start, stop
        start = stop


def grouped_rows(x_SK: torch.Tensor, w_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """``y[s] = x[s] @ w[e(s)]``, ``[S, N]``; rows past the last offset are undefined."""
    if uses_native(x_SK, w_EKN):
        # Its rows begin at multiples of 16 bytes; kernels over rows want them one behind the other.
        return _native_grouped_mm(x_SK, w_EKN, offsets_E).contiguous()
    if uses_triton(x_SK):
        return _dense_product(x_SK, w_EKN, offsets_E)
    y_SN = x_SK.new_empty(x_SK.shape[0], w_EKN.shape[2])
    for expert, start, stop in _groups(offsets_E):
        torch.mm(x_SK[start:stop], w_EKN[expert], out=y_SN[start:stop])
    return y_SN


def add_grouped_rows_(
    y_SN: torch.Tensor, x_SK: torch.Tensor, w_EKN: torch.Tensor, offsets_E: torch.Tensor
) -> torch.Tensor:
    """``y[s] += x[s] @ w[e(s)]`` in place; in the loop the product is not rounded before it is added."""
    if uses_native(x_SK, w_EKN) or uses_triton(x_SK):
        return y_SN.add_(grouped_rows(x_SK, w_EKN, offsets_E))
    for expert, start, stop in _groups(offsets_E):
        y_SN[start:stop].addmm_(x_SK[start:stop], w_EKN[expert])
    return y_SN


def grouped_sums(
    x_SK: torch.Tensor,
    w_EKN: torch.Tensor,
    h_SR: torch.Tensor,
    b_ERN: torch.Tensor,
    offsets_E: torch.Tensor,
) -> torch.Tensor:
    """``y[s] = x[s] @ w[e(s)] + h[s] @ b[e(s)]``, both sums in one product's accumulators, rounded once.

    In one launch of `grouped_mm` (or of the loop) both matrices have to lie one above the other: they are
    copied into a workspace, a sixteenth of their columns at a time. Triton takes them from where they are.
    """
    if uses_triton(x_SK) and not uses_native(x_SK, w_EKN):
        return _dense_product(x_SK, w_EKN, offsets_E, h_SR, b_ERN)
    (S, K), R, (E, _, N) = x_SK.shape, h_SR.shape[1], w_EKN.shape
    padded = K + R + -(K + R) % RANK_MULTIPLE
    rows_SM = x_SK.new_empty(S, padded)[:, : K + R]
    rows_SM[:, :K], rows_SM[:, K:] = x_SK, h_SR
    step = -(-N // SUM_BLOCKS)
    step += -step % RANK_MULTIPLE
    work_EnM = x_SK.new_empty(E, min(step, N), padded)[..., : K + R]
    y_SN = x_SK.new_empty(S, N)
    for first in range(0, N, step):
        columns = slice(first, min(first + step, N))
        w_EnM = work_EnM[:, : columns.stop - first]
        w_EnM[..., :K] = w_EKN[..., columns].transpose(1, 2)
        w_EnM[..., K:] = b_ERN[..., columns].transpose(1, 2)
        y_SN[:, columns] = grouped_rows(rows_SM, w_EnM.transpose(1, 2), offsets_E)
    return y_SN


def grouped_outer(x_SM: torch.Tensor, y_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """``out[e] = x[rows of e].T @ y[rows of e]``, ``[E, M, N]``; zero for a group without rows."""
    if uses_native(x_SM, y_SN):
        return _native_grouped_mm(x_SM.t(), y_SN, offsets_E)
    if uses_triton(x_SM):
        from fourfold.kernels.grouped_triton import grouped_outer_triton

        return grouped_outer_triton(x_SM, y_SN, offsets_E)
    out_EMN = x_SM.new_zeros(offsets_E.shape[0], x_SM.shape[1], y_SN.shape[1])
    for expert, start, stop in _groups(offsets_E):
        torch.mm(x_SM[start:stop].t(), y_SN[start:stop], out=out_EMN[expert])
    return out_EMN
