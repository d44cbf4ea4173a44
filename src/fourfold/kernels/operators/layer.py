"""A whole experts layer in one step, as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fourfold.kernels.decode import ROW_MULTIPLE
from fourfold.kernels.layer import Experts, _SiluExperts
from fourfold.kernels.linear import How
from fourfold.kernels.operators.define import (
    STACK,
    Context,
    define,
    needs,
    or_empty,
    or_none,
    stack_arguments,
    stack_of,
)
from fourfold.kernels.routing import Routing

# Frozen inputs of both operators: four tensors of the routing, then for either stack four tensors, a format
# and a shape.
_FROZEN = f"Tensor order, Tensor position, Tensor expert, Tensor offsets, {STACK.format('up_')}, " + (
    STACK.format("down_")
)
_FROZEN_ARGUMENTS = 4 + 6 + 6


def _experts(frozen: Sequence[Any], how: How) -> Experts:
    return Experts(stack_of(*frozen[4:10]), stack_of(*frozen[10:16]), Routing(*frozen[:4]), how)


def _split(rest: Sequence[Any]) -> tuple[Sequence[Any], How, Any]:
    """Frozen inputs, how to compute, and the last argument."""
    limit, way, wanted = rest[_FROZEN_ARGUMENTS:]
    return rest[:_FROZEN_ARGUMENTS], How(limit, way), wanted


def _run(
    x: torch.Tensor,
    weights: torch.Tensor,
    a_up: torch.Tensor | None,
    b_up: torch.Tensor | None,
    a_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    dtype: torch.dtype,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    frozen, how, wanted = _split(rest)
    ctx: Any = Context(wanted)
    out = _SiluExperts.forward(ctx, x, weights, a_up, b_up, a_down, b_down, _experts(frozen, how), dtype)
    like = x.new_empty(0, dtype=dtype)
    x_rows, up_rows, h_up, h_down = ctx.saved_tensors[:4]
    if not any(wanted):
        return out, like, like.clone(), like.clone(), like.clone()
    return (
        out,
        or_empty(x_rows, like),
        up_rows.contiguous(),
        or_empty(h_up, like),
        or_empty(h_down, like),
    )


def _fake(
    x: torch.Tensor,
    weights: torch.Tensor,
    a_up: torch.Tensor | None,
    b_up: torch.Tensor | None,
    a_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    dtype: torch.dtype,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    frozen, _, wanted = _split(rest)
    S, H, N = frozen[0].shape[0], x.shape[1], frozen[9][1]
    like = x.new_empty(0, dtype=dtype)

    def rows(columns: int, made: bool) -> torch.Tensor:
        return like.new_empty((S, columns) if made and any(wanted) else (0,))

    x_rows = like.new_empty(0)
    if a_up is not None and wanted[2]:
        width = H + a_up.shape[1]
        x_rows = like.new_empty_strided((S, H), (width + -width % ROW_MULTIPLE, 1))
    h_up = rows(0 if a_up is None else a_up.shape[1], a_up is not None)
    h_down = rows(0 if a_down is None else a_down.shape[1], a_down is not None)
    return x.new_empty(x.shape), x_rows, rows(N, True), h_up, h_down


def _backward_run(
    grad: torch.Tensor,
    x_rows: torch.Tensor | None,
    up_rows: torch.Tensor,
    h_up: torch.Tensor | None,
    h_down: torch.Tensor | None,
    weights: torch.Tensor,
    a_up: torch.Tensor | None,
    b_up: torch.Tensor | None,
    a_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    frozen, how, wanted = _split(rest)
    ctx: Any = Context(wanted, [x_rows, up_rows, h_up, h_down, weights, a_up, b_up, a_down, b_down])
    ctx.experts, ctx.compute_dtype = _experts(frozen, how), up_rows.dtype
    return tuple(or_empty(g, grad).contiguous() for g in _SiluExperts.backward(ctx, grad)[:6])


def _backward_fake(
    grad: torch.Tensor,
    x_rows: torch.Tensor | None,
    up_rows: torch.Tensor,
    h_up: torch.Tensor | None,
    h_down: torch.Tensor | None,
    weights: torch.Tensor,
    a_up: torch.Tensor | None,
    b_up: torch.Tensor | None,
    a_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *_, wanted = _split(rest)
    like = (grad, weights, a_up, b_up, a_down, b_down)
    return tuple(
        t.new_empty(t.shape) if want and t is not None else grad.new_empty(0)
        for t, want in zip(like, wanted, strict=True)
    )


_backward_operator = define(
    "silu_experts_backward",
    "(Tensor grad, Tensor? x_rows, Tensor up_rows, Tensor? h_up, Tensor? h_down, Tensor weights, "
    f"Tensor? a_up, Tensor? b_up, Tensor? a_down, Tensor? b_down, {_FROZEN}, int? limit, str? way, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, weights, a_up, b_up, a_down, b_down, _, *rest = inputs
    frozen, how, wanted = _split(rest)
    _, x_rows, up_rows, h_up, h_down = output
    ctx.mark_non_differentiable(x_rows, up_rows, h_up, h_down)
    ctx.set_materialize_grads(False)
    ctx.numbers = [None if isinstance(f, torch.Tensor) else f for f in frozen]
    ctx.how = how
    ctx.save_for_backward(
        or_none(x_rows, a_up is not None and wanted[2]),
        up_rows,
        or_none(h_up, a_up is not None),
        or_none(h_down, a_down is not None),
        weights,
        a_up,
        b_up,
        a_down,
        b_down,
        *(f if isinstance(f, torch.Tensor) else None for f in frozen),
    )


def _backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    rest = (None,) * (1 + _FROZEN_ARGUMENTS + 3)
    if grad is None:
        return *(None,) * 6, *rest
    wanted = list(ctx.needs_input_grad[:6])
    tensors, frozen = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    frozen = [t if n is None else n for t, n in zip(frozen, ctx.numbers, strict=True)]
    grads = _backward_operator(grad, *tensors, *frozen, ctx.how.workspace_bytes, ctx.how.way, wanted)
    return *(or_none(g, want) for g, want in zip(grads, wanted, strict=True)), *rest


_operator = define(
    "silu_experts",
    "(Tensor x, Tensor weights, Tensor? a_up, Tensor? b_up, Tensor? a_down, Tensor? b_down, "
    f"ScalarType dtype, {_FROZEN}, int? limit, str? way, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    (_setup, _backward),
)


def silu_experts(
    x_TH: torch.Tensor,
    weights_Tk: torch.Tensor,
    a_up: torch.Tensor | None,
    b_up: torch.Tensor | None,
    a_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    experts: Experts,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """`layer.silu_experts`, its factors cast and padded."""
    routing = experts.routing
    frozen = (routing.order_S, routing.position_Tk, routing.expert_S, routing.offsets_E)
    wanted = needs(x_TH, weights_Tk, a_up, b_up, a_down, b_down)
    out_TH, *_ = _operator(
        x_TH,
        weights_Tk,
        a_up,
        b_up,
        a_down,
        b_down,
        compute_dtype,
        *frozen,
        *stack_arguments(experts.up),
        *stack_arguments(experts.down),
        experts.how.workspace_bytes,
        experts.how.way,
        wanted,
    )
    return out_TH
