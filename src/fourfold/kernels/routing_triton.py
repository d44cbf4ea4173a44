"""One pass over memory for the weighted sum over experts, and one for its gradient.

In plain torch the sum takes three passes over ``[S, H]`` (gather, multiply, reduce), in fp32 where the
routing weights are fp32. Here a program owns a token, reads its k rows and writes the sum once; in backward a
program owns a routed row, reads the token's gradient and the row, and writes the row's gradient and the dot
product that is the gradient of its routing weight. No atomics: every output has one writer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_rows_kernel(
    rows_ptr,
    position_ptr,
    weights_ptr,
    out_ptr,
    H,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = column < H
    total = tl.zeros((TILE,), dtype=tl.float32)
    for slot in range(K):
        row = tl.load(position_ptr + token * K + slot)
        value = tl.load(rows_ptr + row * H + column, mask=live, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + token * K + slot).to(tl.float32)
        total += value
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _combine_backward_kernel(
    grad_ptr, rows_ptr, weights_ptr, order_ptr, grad_rows_ptr, grad_weights_ptr, H, K, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(order_ptr + row)
    token = source // K
    weight = tl.load(weights_ptr + source).to(tl.float32)
    dot = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, H, TILE):
        column = start + tl.arange(0, TILE)
        live = column < H
        grad = tl.load(grad_ptr + token * H + column, mask=live, other=0.0).to(tl.float32)
        value = tl.load(rows_ptr + row * H + column, mask=live, other=0.0).to(tl.float32)
        tl.store(
            grad_rows_ptr + row * H + column, (grad * weight).to(grad_rows_ptr.dtype.element_ty), mask=live
        )
        dot += grad * value
    tl.store(grad_weights_ptr + source, tl.sum(dot, axis=0).to(grad_weights_ptr.dtype.element_ty))


def sum_rows_triton(
    rows_SH: torch.Tensor, position_Tk: torch.Tensor, weights_Tk: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``out[t] = sum_j weights[t, j] * rows[position[t, j]]``, ``[T, H]`` in ``dtype``; contiguous inputs."""
    T, k = position_Tk.shape
    H = rows_SH.shape[1]
    out_TH = torch.empty(T, H, dtype=dtype, device=rows_SH.device)
    tile = min(1024, triton.next_power_of_2(H))
    weights = rows_SH if weights_Tk is None else weights_Tk.contiguous()
    with torch.cuda.device_of(rows_SH):  # Triton launches on the current device
        _sum_rows_kernel[(T, triton.cdiv(H, tile))](
            rows_SH, position_Tk, weights, out_TH, H, K=k, WEIGHTED=weights_Tk is not None, TILE=tile
        )
    return out_TH


def combine_backward_triton(
    grad_TH: torch.Tensor, rows_SH: torch.Tensor, weights_Tk: torch.Tensor, order_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the weighted sum with respect to rows ``[S, H]`` and weights ``[T, k]``."""
    S, H = rows_SH.shape
    weights_Tk = weights_Tk.contiguous()
    grad_rows_SH = torch.empty_like(rows_SH)
    grad_weights_Tk = torch.empty_like(weights_Tk)
    with torch.cuda.device_of(rows_SH):
        _combine_backward_kernel[(S,)](
            grad_TH,
            rows_SH,
            weights_Tk,
            order_S,
            grad_rows_SH,
            grad_weights_Tk,
            H,
            weights_Tk.shape[1],
            TILE=min(1024, triton.next_power_of_2(H)),
        )
    return grad_rows_SH, grad_weights_Tk
