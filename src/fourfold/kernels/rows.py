"""Passes over routed rows, by the kernel that takes them: CUDA C++ (`cuda.rows`) or Triton (`rows_triton`).

Both compute the same; see the latter for what, and for shapes.
"""

from __future__ import annotations

import torch

from fourfold.kernels.cuda import rows as in_cuda


def gather(
    x_TH: torch.Tensor,
    order_S: torch.Tensor,
    top_k: int,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    factor_EHR: torch.Tensor | None,
    weights_Tk: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """See `rows_triton.gather_triton`."""
    from fourfold.kernels.rows_triton import gather_triton

    rank_first = factor_EHR is not None and not factor_EHR.is_contiguous()
    factor = factor_EHR.transpose(1, 2) if factor_EHR is not None and rank_first else factor_EHR
    rank = 0 if factor_EHR is None else factor_EHR.shape[2]
    if in_cuda.can(x_TH.shape[1], wide_Ss, factor, rank, weights_Tk, x_TH):
        return in_cuda.gather(
            x_TH, order_S, top_k, offsets_E, wide_Ss, factor, weights_Tk, rank_first=rank_first
        )
    return gather_triton(x_TH, order_S, top_k, offsets_E, wide_Ss, factor_EHR, weights_Tk)


def silu_mul(
    up_SN: torch.Tensor,
    weights_Tk: torch.Tensor,
    order_S: torch.Tensor,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    a_ERI: torch.Tensor | None,
) -> torch.Tensor | None:
    """See `rows_triton.silu_mul_triton`."""
    from fourfold.kernels.rows_triton import silu_mul_triton

    arguments = (up_SN, weights_Tk, order_S, offsets_E, wide_Ss, a_ERI)
    rank = 0 if a_ERI is None else a_ERI.shape[1]
    if in_cuda.can(up_SN.shape[1] // 2, wide_Ss, a_ERI, rank, weights_Tk, up_SN):
        return in_cuda.silu_mul(*arguments)
    return silu_mul_triton(*arguments)


def silu_mul_backward(
    up_SN: torch.Tensor,
    grad_SI: torch.Tensor,
    weights_Tk: torch.Tensor,
    order_S: torch.Tensor,
    offsets_E: torch.Tensor,
    wide_Ss: torch.Tensor,
    b_ENR: torch.Tensor | None,
    *,
    keep_act: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """See `rows_triton.silu_mul_backward_triton`."""
    from fourfold.kernels.rows_triton import silu_mul_backward_triton

    arguments = (up_SN, grad_SI, weights_Tk, order_S, offsets_E, wide_Ss, b_ENR)
    rank = 0 if b_ENR is None else b_ENR.shape[2]
    if in_cuda.can(up_SN.shape[1] // 2, wide_Ss, b_ENR, rank, weights_Tk, up_SN, grad_SI):
        return in_cuda.silu_mul_backward(*arguments, keep_act=keep_act)
    return silu_mul_backward_triton(*arguments, keep_act=keep_act)
