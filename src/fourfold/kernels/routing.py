"""Rows to experts and back.

T tokens, k experts a token, S = T*k routed rows, E experts, H hidden. Rows are sorted by expert with a stable
sort, so that everything downstream is deterministic, and offsets stay on the device. Gathering rows and
summing them back are each other's adjoint: the gradient of the one is the other. So neither needs atomics,
which `index_add_` would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fourfold.kernels.cuda import routing as in_cuda
from fourfold.kernels.decode import HAS_TRITON


@dataclass(frozen=True)
class Routing:
    """Where each routed row lies.

    Attributes:
        order_S: flat (token, slot) index of each sorted row, int64.
        position_Tk: sorted row of each (token, slot), int64; the inverse of ``order_S``.
        expert_S: expert of each sorted row.
        offsets_E: end of each expert's rows, int32.
    """

    order_S: torch.Tensor
    position_Tk: torch.Tensor
    expert_S: torch.Tensor
    offsets_E: torch.Tensor


def route(top_k_index_Tk: torch.Tensor, num_experts: int) -> Routing:
    """Sort the routed rows by expert, on the device. Every index must be in ``[0, num_experts)``."""
    if torch.compiler.is_compiling():
        from fourfold.kernels import operators

        return operators.route(top_k_index_Tk, num_experts)
    return _route(top_k_index_Tk, num_experts)


@torch.no_grad()
def _route(top_k_index_Tk: torch.Tensor, num_experts: int) -> Routing:
    # (32-bit counters of tiles and experts, and their histogram in shared memory)
    small = num_experts <= 4096 and top_k_index_Tk.numel() * num_experts < 2**38
    if top_k_index_Tk.is_cuda and HAS_TRITON and top_k_index_Tk.numel() and small:
        from fourfold.kernels.route_triton import ONE_LAUNCH, route_triton

        few = top_k_index_Tk.numel() * num_experts <= ONE_LAUNCH and top_k_index_Tk.dtype == torch.int64
        if few and in_cuda.available(top_k_index_Tk.device):
            return Routing(*in_cuda.route(top_k_index_Tk.contiguous(), num_experts))
        return Routing(*route_triton(top_k_index_Tk, num_experts))
    return route_sorted(top_k_index_Tk, num_experts)


def route_sorted(top_k_index_Tk: torch.Tensor, num_experts: int) -> Routing:
    """`route` with torch's own sort: on CPUs, and what the kernels are compared with."""
    narrow = torch.int16 if num_experts < 2**15 else torch.int32  # fewer passes of the radix sort
    expert_S, order_S = torch.sort(top_k_index_Tk.reshape(-1).to(narrow), stable=True)
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    bounds_E = torch.arange(num_experts, dtype=narrow, device=order_S.device)
    offsets_E = torch.searchsorted(expert_S, bounds_E, right=True).to(torch.int32)
    return Routing(order_S, position_S.view(top_k_index_Tk.shape), expert_S.int(), offsets_E)


def sum_rows(
    rows_SH: torch.Tensor, position_Tk: torch.Tensor, weights_Tk: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``out[t] = sum_j weights[t, j] * rows[position[t, j]]``, summed in fp32, ``[T, H]`` in ``dtype``."""
    if rows_SH.is_cuda and HAS_TRITON:
        if in_cuda.can_sum(rows_SH, position_Tk, weights_Tk, dtype):
            return in_cuda.sum_rows(rows_SH, position_Tk, weights_Tk, dtype)
        from fourfold.kernels.routing_triton import sum_rows_triton

        return sum_rows_triton(rows_SH, position_Tk, weights_Tk, dtype)
    T, k = position_Tk.shape
    picked_TkH = rows_SH[position_Tk.reshape(-1)].view(T, k, -1).float()
    if weights_Tk is not None:
        picked_TkH = picked_TkH * weights_Tk.float().unsqueeze(-1)
    return picked_TkH.sum(dim=1).to(dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        ctx.routing = routing
        return x_TH[routing.order_S // routing.position_Tk.shape[1]]

    @staticmethod
    @once_differentiable  # a second derivative is an error, not a wrong number
    def backward(ctx: Any, grad_SH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_rows(grad_SH.contiguous(), ctx.routing.position_Tk, None, grad_SH.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_SH: torch.Tensor, weights_Tk: torch.Tensor, routing: Routing, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.routing = routing
        ctx.save_for_backward(rows_SH, weights_Tk)
        return sum_rows(rows_SH, routing.position_Tk, weights_Tk, dtype)

    @staticmethod
    @once_differentiable  # a second derivative is an error, not a wrong number
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        rows_SH, weights_Tk = ctx.saved_tensors
        routing: Routing = ctx.routing
        if rows_SH.is_cuda and HAS_TRITON:
            from fourfold.kernels.routing_triton import combine_backward_triton

            grad_rows_SH, grad_weights_Tk = combine_backward_triton(
                grad_TH.contiguous(), rows_SH, weights_Tk, routing.order_S
            )
        else:
            k = weights_Tk.shape[1]
            grad_SH = grad_TH.float()[routing.order_S // k]
            weights_S = weights_Tk.reshape(-1)[routing.order_S].float()
            grad_rows_SH = (grad_SH * weights_S.unsqueeze(-1)).to(rows_SH.dtype)
            dots_S = (grad_SH * rows_SH.float()).sum(dim=-1)
            grad_weights_Tk = dots_S[routing.position_Tk].to(weights_Tk.dtype)
        return grad_rows_SH, grad_weights_Tk if ctx.needs_input_grad[1] else None, None, None


def dispatch(x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The routed rows in sorted order, ``[S, H]``."""
    if torch.compiler.is_compiling():
        from fourfold.kernels import operators

        return operators.dispatch(x_TH, routing)
    return _Dispatch.apply(x_TH, routing)


def combine(
    rows_SH: torch.Tensor, weights_Tk: torch.Tensor, routing: Routing, dtype: torch.dtype
) -> torch.Tensor:
    """Weighted sum of each token's rows, ``[T, H]`` in ``dtype``; summed in fp32 in a fixed order."""
    if torch.compiler.is_compiling():
        from fourfold.kernels import operators

        return operators.combine(rows_SH.contiguous(), weights_Tk, routing, dtype)
    return _Combine.apply(rows_SH.contiguous(), weights_Tk, routing, dtype)
