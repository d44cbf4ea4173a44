"""A whole experts layer of the common kind in one differentiable step: gate and up, silu, down, no biases.

The products are those of `kernels.linear`; what is added is that nothing but them passes over ``[S, ...]``
more than once (`kernels.rows`):

    gather rows, x A^T                 [S, H | R]
    [x, x A^T] [W_up, B_up]^T          [S, 2I]        kept for backward
    silu(gate) * up, act A^T           [S, I | R]
    [act, act A^T] [W_down, B_down]^T  [S, H]
    weighted sum over experts          [T, H]

Backward runs it in reverse. The routing weight of a row is applied where rows are narrow: to the gate's
gradient and to the low-rank columns; so the result of the second product need not be kept for the gradient of
the weights.

T tokens, k experts a token, S = T*k, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fourfold.formats import PackedStack
from fourfold.formats.plain import PlainStack
from fourfold.formats.remote import RemoteStack, in_use
from fourfold.kernels.decode import HAS_TRITON
from fourfold.kernels.grouped import grouped_outer
from fourfold.kernels.linear import How, LowRank, empty_rows, no_autocast, padded_factors, product
from fourfold.kernels.routing import Routing, sum_rows


@dataclass(frozen=True)
class Experts:
    """What a layer computes with that is not differentiated."""

    up: PackedStack | PlainStack | RemoteStack
    down: PackedStack | PlainStack | RemoteStack
    routing: Routing
    how: How


def runs_on(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether `silu_experts` is to be used there."""
    return HAS_TRITON and device.type == "cuda" and compute_dtype in (torch.bfloat16, torch.float16)


class _SiluExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_Tk: torch.Tensor,
        a_up: torch.Tensor | None,
        b_up: torch.Tensor | None,
        a_down: torch.Tensor | None,
        b_down: torch.Tensor | None,
        experts: Experts,
        compute_dtype: torch.dtype,
    ) -> torch.Tensor:
        from fourfold.kernels import rows

        routing, how = experts.routing, experts.how
        offsets_E = routing.offsets_E
        S, H = routing.order_S.shape[0], x_TH.shape[1]
        I = experts.down.shape.columns  # noqa: E741
        like = torch.empty(0, dtype=compute_dtype, device=x_TH.device)
        with no_autocast(x_TH.device.type), in_use(experts.up) as up, in_use(experts.down) as down:
            rank = 0 if a_up is None else a_up.shape[1]
            x_Ss = empty_rows(like, S, H, rank)
            inner = None if a_up is None else a_up.transpose(1, 2)
            h_up = rows.gather(x_TH, routing.order_S, weights_Tk.shape[1], offsets_E, x_Ss, inner)
            up_SN = product(x_Ss[:, : H + rank], up, offsets_E, how, b_up, transposed=False)
            keep_x = a_up is not None and ctx.needs_input_grad[2]
            x_SH = x_Ss[:, :H] if keep_x else None
            del x_Ss
            rank = 0 if a_down is None else a_down.shape[1]
            act_Ss = empty_rows(like, S, I, rank)
            weighted_h_down = rows.silu_mul(up_SN, weights_Tk, routing.order_S, offsets_E, act_Ss, a_down)
            rows_SH = product(act_Ss[:, : I + rank], down, offsets_E, how, b_down, transposed=False)
            del act_Ss
            out_TH = sum_rows(rows_SH, routing.position_Tk, weights_Tk, x_TH.dtype)
        ctx.experts, ctx.compute_dtype = experts, compute_dtype
        ctx.save_for_backward(x_SH, up_SN, h_up, weighted_h_down, weights_Tk, a_up, b_up, a_down, b_down)
        return out_TH

    @staticmethod
    @once_differentiable  # a second derivative is an error, not a wrong number
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from fourfold.kernels import rows

        x_SH, up_SN, h_up, weighted_h_down, weights_Tk, a_up, b_up, a_down, b_down = ctx.saved_tensors
        experts: Experts = ctx.experts
        routing, how = experts.routing, experts.how
        offsets_E, order_S = routing.offsets_E, routing.order_S
        S, k = order_S.shape[0], weights_Tk.shape[1]
        H, N = grad_TH.shape[1], up_SN.shape[1]
        needs_x, needs_w, needs_a_up, needs_b_up, needs_a_down, needs_b_down = ctx.needs_input_grad[:6]
        grad_a_up = grad_b_up = grad_a_down = grad_b_down = grad_x = None
        with no_autocast(grad_TH.device.type), in_use(experts.up) as up, in_use(experts.down) as down:
            rank = 0 if b_down is None else b_down.shape[2]
            grad_Ss = empty_rows(up_SN, S, H, rank)
            weighted_low = rows.gather(
                grad_TH.contiguous(), order_S, k, offsets_E, grad_Ss, b_down, weights_Tk
            )
            grad_SI = product(grad_Ss[:, : H + rank], down, offsets_E, how, a_down, transposed=True)
            if needs_b_down:
                grad_b_down = grouped_outer(grad_Ss[:, :H], weighted_h_down, offsets_E)
            del grad_Ss
            rank = 0 if b_up is None else b_up.shape[2]
            grad_up_Ss = empty_rows(up_SN, S, N, rank)
            low_up, act_SI, grad_weights = rows.silu_mul_backward(
                up_SN,
                grad_SI,
                weights_Tk,
                order_S,
                offsets_E,
                grad_up_Ss,
                b_up,
                keep_act=needs_a_down,
            )
            del grad_SI
            if needs_a_down:
                grad_a_down = grouped_outer(weighted_low, act_SI, offsets_E)
            del act_SI
            if needs_b_up:
                grad_b_up = grouped_outer(grad_up_Ss[:, :N], h_up, offsets_E)
            if needs_a_up:
                grad_a_up = grouped_outer(low_up, x_SH, offsets_E)
            if needs_x:
                rows_SH = product(grad_up_Ss[:, : N + rank], up, offsets_E, how, a_up, transposed=True)
                del grad_up_Ss
                grad_x = sum_rows(rows_SH, routing.position_Tk, None, grad_TH.dtype)
        grads = (grad_a_up, grad_b_up, grad_a_down, grad_b_down)
        return grad_x, grad_weights if needs_w else None, *grads, None, None


def silu_experts(
    x_TH: torch.Tensor,
    weights_Tk: torch.Tensor,
    routing: Routing,
    up: PackedStack | PlainStack | RemoteStack,
    down: PackedStack | PlainStack | RemoteStack,
    low_rank_up: LowRank | None,
    low_rank_down: LowRank | None,
    *,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None = None,
    way: str | None = None,
) -> torch.Tensor:
    """``sum_k weight * down(silu(gate(x)) * up(x))`` over the experts of each token.

    Args:
        x_TH: hidden states; the result and its gradient have their dtype.
        weights_Tk: routing weights.
        routing: of `route`.
        up: ``[E, 2I, H]``, gate above up; packed, or for a way that takes others too. Of a stack that lies
            elsewhere, tensors are asked for again in backward.
        down: ``[E, H, I]``, likewise.
        low_rank_up: LoRA of either projection, differentiable.
        low_rank_down: likewise.
        compute_dtype: of products and everything kept for backward.
        workspace_bytes: as `packed_linear`.
        way: likewise, for all four products.

    Returns:
        ``[T, H]``.
    """
    like = torch.empty(0, dtype=compute_dtype, device=x_TH.device)
    a_up, b_up = padded_factors(low_rank_up, like)
    a_down, b_down = padded_factors(low_rank_down, like)
    experts = Experts(up, down, routing, How(workspace_bytes, way))
    arguments = (x_TH.contiguous(), weights_Tk.contiguous(), a_up, b_up, a_down, b_down)
    if torch.compiler.is_compiling():
        from fourfold.kernels import operators

        return operators.silu_experts(*arguments, experts, compute_dtype)
    return _SiluExperts.apply(*arguments, experts, compute_dtype)
