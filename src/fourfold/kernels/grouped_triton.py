"""Products per expert that sum over its rows: the gradients of low-rank factors, without the host waiting.

    ``out[e] = x[rows of e]^T y[rows of e]``      ``[E, M, N]``

For dtypes and strides that `grouped_mm` does not take. A program owns a tile of one expert's result and walks
through the expert's rows, whose ends it reads on the device; an expert without rows gets zeros.

S rows sorted by expert, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 32  # summed over in one step
COLUMNS = (16, 64)  # of a tile: what holds a factor's rank, and what the other dimension is cut into


@triton.jit
def _outer_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    offsets_ptr,
    M,
    N,
    stride_x,
    stride_y,
    BS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(2)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in tl.range(begin, end, BS, num_stages=1):
        row = (start + tl.arange(0, BS)).to(tl.int64)
        live = (row < end)[:, None]
        x = tl.load(x_ptr + row[:, None] * stride_x + m[None, :], mask=live & (m < M)[None, :], other=0.0)
        y = tl.load(y_ptr + row[:, None] * stride_y + n[None, :], mask=live & (n < N)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), y, acc, input_precision=PRECISION)
    to = out_ptr + (expert.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def grouped_outer_triton(x_SM: torch.Tensor, y_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """``x[rows of e]^T y[rows of e]`` of every expert, ``[E, M, N]`` in the dtype of ``x_SM``."""
    x_SM, y_SN = (t if t.stride(1) == 1 else t.contiguous() for t in (x_SM, y_SN))
    (M, N), E = (x_SM.shape[1], y_SN.shape[1]), offsets_E.shape[0]
    BM, BN = (COLUMNS[size > COLUMNS[0]] for size in (M, N))
    out_EMN = x_SM.new_empty(E, M, N)
    with torch.cuda.device_of(x_SM):  # Triton launches on the current device
        _outer_kernel[(triton.cdiv(M, BM), triton.cdiv(N, BN), E)](
            x_SM,
            y_SN,
            out_EMN,
            offsets_E,
            M,
            N,
            x_SM.stride(0),
            y_SN.stride(0),
            BS=ROWS,
            BM=BM,
            BN=BN,
            PRECISION="ieee",
            num_warps=4,
        )
    return out_EMN
