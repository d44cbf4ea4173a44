"""Rows to experts and back, as operators."""

from __future__ import annotations

from typing import Any

import torch

from fourfold.kernels.operators.define import Context, define
from fourfold.kernels.routing import Routing, _Combine, _Dispatch, _route, sum_rows


def _route_run(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    routing = _route(index, num_experts)
    return routing.order_S, routing.position_Tk, routing.expert_S, routing.offsets_E


def _route_fake(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    S = index.numel()
    return (
        index.new_empty(S, dtype=torch.int64),
        index.new_empty(index.shape, dtype=torch.int64),
        index.new_empty(S, dtype=torch.int32),
        index.new_empty(num_experts, dtype=torch.int32),
    )


_route_operator = define(
    "route", "(Tensor index, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)", _route_run, _route_fake
)


def route(top_k_index_Tk: torch.Tensor, num_experts: int) -> Routing:
    """`routing.route`."""
    return Routing(*_route_operator(top_k_index_Tk, num_experts))


def _sum_rows_fake(
    rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return rows.new_empty(position.shape[0], rows.shape[1], dtype=dtype)


_sum_rows = define(
    "sum_rows",
    "(Tensor rows, Tensor position, Tensor? weights, ScalarType dtype) -> Tensor",
    sum_rows,
    _sum_rows_fake,
)


def _dispatch_run(x: torch.Tensor, order: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    routing = Routing(order, position, order, order)  # (it looks at the first two)
    return _Dispatch.forward(Context([True]), x, routing).contiguous()


def _dispatch_fake(x: torch.Tensor, order: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _dispatch_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (position,) = ctx.saved_tensors
    return _sum_rows(grad.contiguous(), position, None, grad.dtype), None, None


_dispatch_operator = define(
    "dispatch",
    "(Tensor x, Tensor order, Tensor position) -> Tensor",
    _dispatch_run,
    _dispatch_fake,
    (_dispatch_setup, _dispatch_backward),
)


def dispatch(x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`routing.dispatch`."""
    return _dispatch_operator(x_TH, routing.order_S, routing.position_Tk)


def _combine_run(
    rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, position: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return sum_rows(rows, position, weights, dtype)


def _combine_fake(
    rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, position: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return rows.new_empty(position.shape[0], rows.shape[1], dtype=dtype)


def _combine_backward_run(
    grad: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    ctx: Any = Context([True, True], [rows, weights])
    ctx.routing = Routing(order, position, order, order)
    grad_rows, grad_weights, *_ = _Combine.backward(ctx, grad)
    return grad_rows, grad_weights.contiguous()


def _combine_backward_fake(
    grad: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


_combine_backward_operator = define(
    "combine_backward",
    "(Tensor grad, Tensor rows, Tensor weights, Tensor order, Tensor position) -> (Tensor, Tensor)",
    _combine_backward_run,
    _combine_backward_fake,
)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _combine_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_rows, grad_weights = _combine_backward_operator(grad, *ctx.saved_tensors)
    return grad_rows, grad_weights, None, None, None


_combine_operator = define(
    "combine",
    "(Tensor rows, Tensor weights, Tensor order, Tensor position, ScalarType dtype) -> Tensor",
    _combine_run,
    _combine_fake,
    (_combine_setup, _combine_backward),
)


def combine(
    rows_SH: torch.Tensor, weights_Tk: torch.Tensor, routing: Routing, dtype: torch.dtype
) -> torch.Tensor:
    """`routing.combine`."""
    return _combine_operator(rows_SH, weights_Tk, routing.order_S, routing.position_Tk, dtype)
