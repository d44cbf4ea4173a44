"""The packed product against the oracle: outputs and every gradient, on odd shapes."""

import pytest
import torch

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, packed_linear, reference_linear
from fourfold.kernels.linear import padded_factors
from fourfold.kernels.workspace import matrices

COUNTS = {
    "even": [16, 16, 16, 16],
    "odd": [63, 1, 0, 37],  # an expert without rows
    "one": [0, 0, 5, 0],
}
FORMATS = [PackFormat("nf4"), PackFormat("nf4", 64, True), PackFormat("fp4", 32), PackFormat("int8")]


def setup(
    fmt: PackFormat,
    counts: list[int],
    rank: int,
    n: int = 40,
    k: int = 100,
    dtype: torch.dtype = torch.float32,
):
    E = len(counts)
    stack = pack_stack(PackedStack.empty(fmt, StackShape(E, n, k), "cpu"), torch.randn(E, n, k) * 0.1, "w")
    x = torch.randn(sum(counts), k, dtype=dtype, requires_grad=True)
    a = (torch.randn(E, rank, k) * 0.1).requires_grad_()
    b = (torch.randn(E, n, rank) * 0.1).requires_grad_()
    offsets = torch.tensor(counts).cumsum(0).int()
    return stack, x, a, b, offsets


def results(function, x, a, b):
    y = function()
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), (x, a, b))
    return y.detach(), *grads


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("limit", [None, 1, 2 * 40 * 100 * 4, 10**9])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equals_the_reference(fmt: PackFormat, counts: list[int], limit: int | None) -> None:
    stack, x, a, b, offsets = setup(fmt, counts, rank=5)
    way = None if limit is None else "workspace"  # (on a CPU the rule takes one expert at a time)
    ours = results(
        lambda: packed_linear(x, stack, offsets, LowRank(a, b), workspace_bytes=limit, way=way), x, a, b
    )
    theirs = results(lambda: reference_linear(x, stack, offsets, a, b), x, a, b)
    for name, mine, wanted in zip(("y", "dx", "da", "db"), ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_scales_of_the_neighbouring_expert_show() -> None:
    """The comparison above can fail: it does when scales are rolled by one expert."""
    stack, x, a, b, offsets = setup(PackFormat("nf4"), COUNTS["even"], rank=4)
    wanted = reference_linear(x, stack, offsets, a, b)
    rolled = PackedStack(stack.fmt, stack.shape, stack.data, stack.absmax.roll(1, 0))
    assert (packed_linear(x, rolled, offsets, LowRank(a, b)) - wanted).norm() > 1e-2 * wanted.norm()


def test_without_lora_only_the_input_gets_a_gradient_and_x_is_not_kept() -> None:
    stack, x, _, _, offsets = setup(PackFormat("nf4"), COUNTS["odd"], rank=4)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = packed_linear(x, stack, offsets)
    assert all(t.shape == offsets.shape for t in kept)
    y.sum().backward()
    assert x.grad is not None


def test_nothing_of_the_size_of_the_weights_is_kept_for_backward() -> None:
    stack, x, a, b, offsets = setup(PackFormat("nf4"), COUNTS["odd"], rank=4)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_linear(x, stack, offsets, LowRank(a, b))
    one_matrix = stack.shape.rows * stack.shape.columns
    assert max(t.numel() for t in kept) < 4 * one_matrix
    assert {x.numel(), a.numel(), b.numel()} <= {t.numel() for t in kept}


def test_bf16_is_as_good_as_decoding_and_multiplying_in_bf16() -> None:
    stack, x, a, b, offsets = setup(PackFormat("nf4"), COUNTS["odd"], rank=8)
    exact = reference_linear(x, stack, offsets, a, b)
    low = x.detach().bfloat16()
    ours = packed_linear(low, stack, offsets, LowRank(a, b)).float()
    theirs = reference_linear(low, stack, offsets, a, b).float()
    assert ours.isfinite().all()
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize("transposed", [True, False])
def test_a_factor_beside_weights_that_are_not_packed_is_refused(transposed: bool) -> None:
    """(It would be left out.)"""
    stack = PlainStack(StackShape(2, 8, 16), torch.randn(2, 8, 16))
    with pytest.raises(ValueError, match="no room for a factor"):
        matrices(stack, torch.float32, torch.randn(2, 4, 16), transposed=transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.3])
def test_a_scaled_factor_is_rounded_once_and_its_gradient_lies_as_the_factor_does(
    scaling: float, dtype: torch.dtype
) -> None:
    E, N, R = 3, 10, 4
    weight = torch.randn(N, R * E, requires_grad=True)  # PEFT's: the expert fastest
    b = weight.view(N, R, E).permute(2, 0, 1)
    _, ready = padded_factors(LowRank(torch.randn(E, R, 6), b, scaling), torch.empty(0, dtype=dtype))
    assert ready.dtype == dtype
    assert ready.is_contiguous()
    assert torch.equal(ready, (b * scaling).to(dtype))
    probe = torch.randn(E, N, R).to(dtype)
    (grad,) = torch.autograd.grad(ready, b, probe, retain_graph=True)
    assert grad.stride() == b.stride()
    assert torch.equal(grad, probe.float() * scaling)
    (grad,) = torch.autograd.grad(ready, weight, probe)
    assert torch.equal(grad, (probe.float() * scaling).permute(1, 2, 0).reshape(N, R * E))


def test_a_factor_that_is_ready_is_not_copied() -> None:
    b = torch.randn(3, 10, 4)
    _, ready = padded_factors(LowRank(torch.randn(3, 4, 6), b), torch.empty(0))
    assert ready is b


def test_a_rank_is_padded_with_zeros() -> None:
    class OnTheGpu:
        dtype, is_cuda = torch.bfloat16, True

    a, b = torch.randn(2, 3, 6), torch.randn(2, 10, 3, requires_grad=True)
    ready_a, ready_b = padded_factors(LowRank(a, b, 0.5), OnTheGpu())  # type: ignore[arg-type]
    assert ready_a.shape == (2, 8, 6)
    assert ready_b.shape == (2, 10, 8)
    assert torch.equal(ready_b[..., :3], (b * 0.5).bfloat16())
    assert not ready_a[:, 3:].any()
    assert not ready_b[..., 3:].any()
    (grad,) = torch.autograd.grad(ready_b, b, torch.ones_like(ready_b))
    assert torch.equal(grad, torch.full_like(b, 0.5))


def test_scaling_is_part_of_the_product() -> None:
    stack, x, a, b, offsets = setup(PackFormat("nf4"), [5, 0, 2, 3], rank=4)
    wanted = packed_linear(x, stack, offsets, LowRank(a, b * 0.7))
    assert torch.allclose(packed_linear(x, stack, offsets, LowRank(a, b, 0.7)), wanted, rtol=1e-5, atol=1e-5)
