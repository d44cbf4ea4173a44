"""The product over packed experts, as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fourfold.formats.remote import RemoteStack
from fourfold.kernels.linear import How, _PackedLinear
from fourfold.kernels.operators.define import (
    STACK,
    Context,
    Stack,
    define,
    needs,
    or_empty,
    or_none,
    stack_arguments,
    stack_of,
)

# Among the arguments of the operator: where the stack begins, and what comes after it.
_STACK_AT, _AFTER = 3, 9


def _run(
    x: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    fmt: str,
    shape: Sequence[int],
    offsets: torch.Tensor,
    limit: int | None,
    way: str | None,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    ctx: Any = Context(wanted)
    stack = stack_of(data, absmax, scale, offset, fmt, shape)
    y = _PackedLinear.forward(ctx, x, a, b, stack, offsets, How(limit, way))
    # (grouped_mm pads rows to 16 bytes. The rows that eager mode keeps may be a copy, by some ways; here the
    # input itself is kept.)
    return y.contiguous(), or_empty(ctx.saved_tensors[1], x).contiguous()


def _fake(
    x: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    fmt: str,
    shape: Sequence[int],
    offsets: torch.Tensor,
    limit: int | None,
    way: str | None,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x.new_empty(0)
    if a is not None and wanted[2]:
        h = x.new_empty(x.shape[0], a.shape[1])
    return x.new_empty(x.shape[0], shape[1]), h


def _backward_run(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    h: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    fmt: str,
    shape: Sequence[int],
    offsets: torch.Tensor,
    limit: int | None,
    way: str | None,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ctx: Any = Context(wanted, [x, h, a, b, offsets])
    ctx.stack, ctx.how = stack_of(data, absmax, scale, offset, fmt, shape), How(limit, way)
    grad_x, grad_a, grad_b = (or_empty(g, grad) for g in _PackedLinear.backward(ctx, grad)[:3])
    return grad_x.contiguous(), grad_a.contiguous(), grad_b.contiguous()


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    h: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    fmt: str,
    shape: Sequence[int],
    offsets: torch.Tensor,
    limit: int | None,
    way: str | None,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = (
        (grad.shape[0], shape[2]),
        a.shape if a is not None else (0,),
        b.shape if b is not None else (0,),
    )
    made = [grad.new_empty(size if want else (0,)) for size, want in zip(sizes, wanted, strict=True)]
    return made[0], made[1], made[2]


_backward_operator = define(
    "packed_linear_backward",
    f"(Tensor grad, Tensor? x, Tensor? h, Tensor? a, Tensor? b, {STACK.format('')}, Tensor offsets, "
    "int? limit, str? way, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, a, b = inputs[:_STACK_AT]
    *tensors, fmt, shape = inputs[_STACK_AT:_AFTER]
    offsets, limit, way, wanted = inputs[_AFTER:]
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(or_none(x, wanted[1]), or_none(h, wanted[2]), a, b, *tensors, offsets)
    ctx.fmt, ctx.shape, ctx.how = fmt, shape, (limit, way)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    rest = (None,) * 10
    if grad is None:
        return None, None, None, *rest
    wanted = list(ctx.needs_input_grad[:_STACK_AT])
    *tensors, offsets = ctx.saved_tensors
    grads = _backward_operator(grad, *tensors, ctx.fmt, ctx.shape, offsets, *ctx.how, wanted)
    return *(or_none(g, want) for g, want in zip(grads, wanted, strict=True)), *rest


_operator = define(
    "packed_linear",
    f"(Tensor x, Tensor? a, Tensor? b, {STACK.format('')}, Tensor offsets, int? limit, str? way, bool[] "
    "wanted) -> (Tensor, Tensor)",
    _run,
    _fake,
    (_setup, _backward),
)


def packed_linear(
    x_SK: torch.Tensor,
    a_ERK: torch.Tensor | None,
    b_ENR: torch.Tensor | None,
    stack: Stack | RemoteStack,
    offsets_E: torch.Tensor,
    how: How,
) -> torch.Tensor:
    """`linear.packed_linear`, its factors cast and padded."""
    wanted = needs(x_SK, a_ERK, b_ENR)
    y_SN, _ = _operator(
        x_SK, a_ERK, b_ENR, *stack_arguments(stack), offsets_E, how.workspace_bytes, how.way, wanted
    )
    return y_SN
