"""A whole layer in one step against a loop over experts in autograd (through Triton's interpreter)."""

import pytest
import torch

import needs
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, combine, dispatch, grouped, packed_linear, reference_linear, route, ways
from fourfold.kernels.layer import silu_experts
from fourfold.planning.standins import Matrices, OneStep, Target
from fourfold.planning.standins import factors as factors_of

triton = needs.triton()
NAMES = ("y", "dx", "dw", "a_up", "b_up", "a_down", "b_down")


def factors(E: int, rank: int, n: int, k: int, device: str) -> LowRank:
    a, b = torch.randn(E, rank, k, device=device) * 0.1, torch.randn(E, n, rank, device=device) * 0.1
    return LowRank(a.requires_grad_(), b.requires_grad_())


def reference(x, weights, index, up, down, low_up, low_down):
    """A loop over experts, differentiated by autograd."""
    T, k = index.shape
    order = index.reshape(-1).argsort(stable=True)
    offsets = torch.bincount(index.reshape(-1), minlength=up.shape.experts).cumsum(0).int()
    low = [(None, None) if f is None else (f.a_ERK, f.b_ENR) for f in (low_up, low_down)]
    gate, lift = reference_linear(x[order // k], up, offsets, *low[0]).chunk(2, dim=1)
    rows = reference_linear(torch.nn.functional.silu(gate) * lift, down, offsets, *low[1])
    return x.new_zeros(T, rows.shape[1]).index_add(0, order // k, rows * weights.reshape(-1)[order, None])


def case(fmt, rank_up, rank_down, E=5, T=37, k=2, H=72, I=40, device="cpu"):  # noqa: E741
    torch.manual_seed(0)
    up = PackedStack.empty(fmt, StackShape(E, 2 * I, H, 2), device)
    down = PackedStack.empty(fmt, StackShape(E, H, I), device)
    pack_stack(up, torch.randn(E, 2 * I, H, device=device) * 0.2, "up")
    pack_stack(down, torch.randn(E, H, I, device=device) * 0.2, "down")
    x = torch.randn(T, H, device=device, requires_grad=True)
    weights = torch.rand(T, k, device=device, requires_grad=True)
    # (the last expert but one has no rows)
    allowed = torch.tensor([e for e in range(E) if e != E - 2], device=device)
    index = allowed[torch.stack([torch.randperm(E - 1, device=device)[:k] for _ in range(T)])]
    low_up = factors(E, rank_up, 2 * I, H, device) if rank_up else None
    low_down = factors(E, rank_down, H, I, device) if rank_down else None
    return x, weights, index, up, down, low_up, low_down


def results(function, x, weights, low_up, low_down):
    y = function()
    wanted = [x, weights]
    for low in (low_up, low_down):
        wanted += [] if low is None else [low.a_ERK, low.b_ENR]
    scale = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return y.detach(), *torch.autograd.grad((y * scale).sum(), wanted)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize(("limit", "way"), [(None, None), (1, "workspace"), (None, "in_product")])
@pytest.mark.parametrize("ranks", [(5, 3), (0, 0), (16, 0), (0, 20)], ids=str)
@pytest.mark.parametrize("fmt", [PackFormat("nf4", 64, True), PackFormat("int8")], ids=str)
def test_equals_a_loop_over_experts(
    fmt: PackFormat, ranks: tuple[int, int], limit: int | None, way: str | None
) -> None:
    x, weights, index, up, down, low_up, low_down = case(fmt, *ranks)
    routing = route(index, up.shape.experts)

    def ours():
        return silu_experts(
            x,
            weights,
            routing,
            up,
            down,
            low_up,
            low_down,
            compute_dtype=torch.float32,
            workspace_bytes=limit,
            way=way,
        )

    found = results(ours, x, weights, low_up, low_down)
    wanted = results(
        lambda: reference(x, weights, index, up, down, low_up, low_down), x, weights, low_up, low_down
    )
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=2e-5, msg=lambda m, number=number: f"result {number}: {m}"
        )


def test_products_whose_rows_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As grouped_mm returns them on CUDA: rows begin at multiples of 16 bytes."""
    inside: list[int] = []

    def padded_product(a: torch.Tensor, b: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        rows = [(0 if e == 0 else int(offsets_E[e - 1]), int(stop)) for e, stop in enumerate(offsets_E)]
        if b.ndim == 2:
            return torch.stack([a[:, i:j] @ b[i:j] for i, j in rows])
        columns = b.shape[2]
        inside.append(columns % 4)
        y = a.new_full((a.shape[0], columns + -columns % 4), 7.0)[:, :columns]
        for e, (i, j) in enumerate(rows):
            y[i:j] = a[i:j] @ b[e]
        return y

    monkeypatch.setattr(grouped, "uses_native", lambda *operands: True)
    monkeypatch.setattr(grouped, "_native_grouped_mm", padded_product)
    x, weights, index, up, down, low_up, low_down = case(PackFormat("nf4"), 4, 4, H=70, I=37)
    routing = route(index, up.shape.experts)
    compared = (x, weights, low_up, low_down)

    def ours():
        return silu_experts(
            x,
            weights,
            routing,
            up,
            down,
            low_up,
            low_down,
            compute_dtype=torch.float32,
            workspace_bytes=10**9,  # (all experts in one product)
        )

    found = results(ours, *compared)
    wanted = results(lambda: reference(x, weights, index, up, down, low_up, low_down), *compared)
    for name, mine, theirs in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any(inside)


def test_swapped_factors_show() -> None:
    """The comparison above can fail."""
    x, weights, index, up, down, low_up, low_down = case(PackFormat("nf4"), 4, 4)
    wanted = reference(x, weights, index, up, down, low_up, low_down)
    rolled = LowRank(low_up.a_ERK.roll(1, 0), low_up.b_ENR)
    routing = route(index, up.shape.experts)
    found = silu_experts(x, weights, routing, up, down, rolled, low_down, compute_dtype=torch.float32)
    assert (found - wanted).norm() > 1e-2 * wanted.norm()


def test_only_what_is_asked_for_is_computed_and_kept() -> None:
    x, weights, index, up, down, low_up, low_down = case(PackFormat("nf4"), 4, 4)
    routing = route(index, up.shape.experts)
    for low in (low_up, low_down):
        low.a_ERK.requires_grad_(False)
        low.b_ENR.requires_grad_(False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = silu_experts(x, weights, routing, up, down, low_up, low_down, compute_dtype=torch.float32)
    rows = index.numel()
    assert not any(t.shape == (rows, x.shape[1]) for t in kept)  # neither gathered rows nor results
    y.sum().backward()
    assert low_up.a_ERK.grad is None
    assert x.grad is not None
    assert weights.grad is not None


def test_a_second_derivative_is_refused() -> None:
    x, weights, index, up, down, low_up, low_down = case(PackFormat("nf4"), 4, 4)
    routing = route(index, up.shape.experts)
    for y in (
        silu_experts(x, weights, routing, up, down, low_up, low_down, compute_dtype=torch.float32),
        combine(
            packed_linear(dispatch(x, routing), up, routing.offsets_E, low_up), weights, routing, x.dtype
        ),
    ):
        (grad,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


class _InProduct(Target):
    """What the interpreter runs: products that decode inside."""

    def way(self, problem: ways.Problem) -> str:
        return "in_product"


@pytest.mark.parametrize("ranks", [(8, 16), (0, 0), (16, 0), (0, 8)], ids=str)
def test_its_stand_in_keeps_the_same_tensors(ranks: tuple[int, int]) -> None:
    """What the plan of a run counts for backward: shapes, and the storages behind them."""
    fmt = PackFormat("nf4")
    x, weights, index, up, down, low_up, low_down = case(fmt, *ranks)
    routing = route(index, up.shape.experts)
    real = silu_experts(
        x, weights, routing, up, down, low_up, low_down, compute_dtype=torch.float32, way="in_product"
    )
    target = _InProduct("cpu", None)
    matrices = [Matrices(s.shape.experts, s.shape.rows, s.shape.columns, fmt, None) for s in (up, down)]
    pairs = [factors_of(low, torch.float32, target) for low in (low_up, low_down)]
    planned = OneStep.apply(x, weights, *pairs[0], *pairs[1], (*matrices, target, torch.float32))

    def kept(y: torch.Tensor) -> list[tuple[tuple[int, ...], int] | None]:
        return [None if t is None else (tuple(t.shape), t.untyped_storage().nbytes()) for t in _saved(y)]

    assert kept(planned) == kept(real)
    wanted = [t for t in (x, weights, *(f for pair in pairs for f in pair)) if t is not None]
    grads = torch.autograd.grad(planned, wanted, torch.ones_like(planned))
    assert [g.shape for g in grads] == [t.shape for t in wanted]


def _saved(y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return y.grad_fn.saved_tensors  # type: ignore[union-attr]
