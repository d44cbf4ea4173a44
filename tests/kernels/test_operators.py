"""The steps as operators: their fake implementations tell the truth, and bits are those of the functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

import needs
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, combine, dispatch, packed_linear, route
from fourfold.kernels.layer import silu_experts
from fourfold.kernels.operators.define import stack_arguments

ops = torch.ops.fourfold
FORMATS = [PackFormat("nf4"), PackFormat("nf4", 64, True), PackFormat("fp4", 32), PackFormat("int8")]
E, T, TOP_K, H = 4, 9, 2, 36
I = 20  # noqa: E741


def packed(fmt: PackFormat | None, n: int, k: int, parts: int = 1) -> PackedStack | PlainStack:
    """Random; transposed and unquantized without a format."""
    shape = StackShape(E, n, k, parts)
    if fmt is None:
        return PlainStack(shape, torch.randn(E, k, n).transpose(1, 2))
    return pack_stack(PackedStack.empty(fmt, shape, "cpu"), torch.randn(E, n, k) * 0.2, "w")


def random_factors(rank: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(E, rank, k, dtype=dtype) * 0.2, torch.randn(E, n, rank, dtype=dtype) * 0.2
    return a.requires_grad_(), b.requires_grad_()


def routed(tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights; the last expert gets no row."""
    index = torch.stack([torch.randperm(E - 1)[:TOP_K] for _ in range(tokens)])
    return index, torch.rand(tokens, TOP_K, requires_grad=True)


def test_fakes_of_routing() -> None:
    index, weights = routed()
    opcheck(ops.route.default, (index, E))
    routing = route(index, E)
    order, position = routing.order_S, routing.position_Tk
    x, rows = torch.randn(T, H, requires_grad=True), torch.randn(T * TOP_K, H, requires_grad=True)
    opcheck(ops.dispatch.default, (x, order, position))
    opcheck(ops.combine.default, (rows, weights, order, position, torch.float32))
    detached = rows.detach(), weights.detach()
    opcheck(ops.sum_rows.default, (detached[0], position, detached[1], torch.bfloat16))
    opcheck(ops.sum_rows.default, (detached[0], position, None, torch.float32))
    opcheck(ops.combine_backward.default, (torch.randn(T, H), *detached, order, position))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("fmt", [*FORMATS, None], ids=str)
def test_fakes_of_the_product(fmt: PackFormat | None, rank: int, dtype: torch.dtype) -> None:
    routing, N = route(routed()[0], E), 28
    x = torch.randn(T * TOP_K, H, dtype=dtype, requires_grad=True)
    a, b = random_factors(rank, N, H, dtype) if rank else (None, None)
    if fmt is None:
        stack = PlainStack(StackShape(E, N, H), torch.randn(E, H, N, dtype=dtype).transpose(1, 2))
    else:
        stack = packed(fmt, N, H)
    tail = (*stack_arguments(stack), routing.offsets_E, None, None)
    wanted = [True, bool(rank), bool(rank)]
    opcheck(ops.packed_linear.default, (x, a, b, *tail, wanted))
    frozen = [None if t is None else t.detach() for t in (x, a, b)]
    _, h = ops.packed_linear.default(*frozen, *tail, wanted)
    grad = torch.randn(T * TOP_K, N, dtype=dtype)
    for wanted in ([True, True, True], [False, True, False], [True, False, False]):
        if rank or not wanted[1]:
            saved = (frozen[0] if wanted[1] else None, h if wanted[2] else None)
            opcheck(ops.packed_linear_backward.default, (grad, *saved, *frozen[1:], *tail, wanted))


@pytest.mark.parametrize("ranks", [(5, 3), (0, 0), (4, 0)], ids=str)
def test_fakes_of_a_whole_layer(ranks: tuple[int, int]) -> None:
    needs.triton()
    (index, weights), fmt = routed(), PackFormat("nf4", 64, True)
    routing, up, down = route(index, E), packed(fmt, 2 * I, H, 2), packed(fmt, H, I)
    x = torch.randn(T, H, requires_grad=True)
    factors: list[Any] = []
    for rank, n, k in ((ranks[0], 2 * I, H), (ranks[1], H, I)):
        factors += random_factors(rank, n, k, torch.float32) if rank else (None, None)
    places = (routing.order_S, routing.position_Tk, routing.expert_S, routing.offsets_E)
    tail = (*places, *stack_arguments(up), *stack_arguments(down), None, None)
    wanted = [t is not None for t in (x, weights, *factors)]
    opcheck(ops.silu_experts.default, (x, weights, *factors, torch.float32, *tail, wanted))
    frozen = [None if t is None else t.detach() for t in (x, weights, *factors)]
    arguments = (*frozen, torch.float32, *tail)
    out, *kept = ops.silu_experts.default(*arguments, wanted)
    saved = [t if t.numel() else None for t in kept]
    opcheck(ops.silu_experts_backward.default, (torch.randn_like(out), *saved, *frozen[1:], *tail, wanted))
    opcheck(ops.silu_experts.default, (*arguments, [False] * 6))
    assert all(t.numel() == 0 for t in ops.silu_experts.default(*arguments, [False] * 6)[1:])


def compared(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], backend: str = "aot_eager"
) -> None:
    """Value and gradients of a compiled function: equal bits."""
    torch.compiler.reset()
    probe: list[torch.Tensor] = []

    def results(f: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        y = f()
        if not probe:
            probe.append(torch.randn_like(y))
        return [y.detach(), *torch.autograd.grad((y * probe[0]).sum(), inputs)]

    wanted = results(function)
    found = results(torch.compile(function, fullgraph=True, backend=backend))
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(mine, theirs), f"result {number}"
    assert all(bool(t.isfinite().all()) and bool(t.any()) for t in wanted)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("fmt", [*FORMATS, None], ids=str)
def test_a_compiled_product_has_equal_bits(
    fmt: PackFormat | None, limit: int | None, dtype: torch.dtype
) -> None:
    """Product by product, everything around it compiled too."""
    index, weights = routed()
    up = packed(fmt, 28, H)
    x = torch.randn(T, H).to(dtype).requires_grad_()
    a, b = random_factors(5, 28, H, torch.float32)

    def function() -> torch.Tensor:
        routing = route(index, E)
        rows = packed_linear(
            dispatch(x, routing), up, routing.offsets_E, LowRank(a, b), workspace_bytes=limit
        )
        return combine(rows, weights, routing, dtype)

    compared(function, [x, weights, a, b])


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_has_equal_bits(backend: str) -> None:
    needs.triton()
    (index, weights), fmt = routed(), PackFormat("nf4", 64, True)
    up, down = packed(fmt, 2 * I, H, 2), packed(fmt, H, I)
    x = torch.randn(T, H, requires_grad=True)
    low_up = LowRank(*random_factors(5, 2 * I, H, torch.float32))
    low_down = LowRank(*random_factors(3, H, I, torch.float32))

    def function() -> torch.Tensor:
        routing = route(index, E)
        return silu_experts(x, weights, routing, up, down, low_up, low_down, compute_dtype=torch.float32)

    leaves = [x, weights, low_up.a_ERK, low_up.b_ENR, low_down.a_ERK, low_down.b_ENR]
    compared(function, leaves, backend)


def test_frozen_factors_get_no_gradient() -> None:
    x = torch.randn(T * TOP_K, H, requires_grad=True)
    a, b = (f.detach() for f in random_factors(5, 28, H, torch.float32))
    stack, offsets_E = packed(FORMATS[0], 28, H), route(routed()[0], E).offsets_E
    compared(lambda: packed_linear(x, stack, offsets_E, LowRank(a, b)), [x])


def test_a_second_derivative_is_refused() -> None:
    index, weights = routed()
    routing, x = route(index, E), torch.randn(T, H, requires_grad=True)
    rows = ops.dispatch.default(x, routing.order_S, routing.position_Tk)
    out = ops.combine.default(rows, weights, routing.order_S, routing.position_Tk, torch.float32)
    (grad,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
