"""Sorting, gathering and summing rows: against plain indexing, in torch and in Triton."""

import pytest
import torch

import needs
from fourfold.kernels import combine, dispatch, route

triton = needs.triton()
T, K, E, H = 37, 3, 6, 72


@pytest.fixture
def batch():
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])  # the last expert gets no row
    return index, torch.randn(T, H, requires_grad=True), torch.rand(T, K, requires_grad=True)


def test_rows_are_sorted_and_counted(batch) -> None:
    index, _, _ = batch
    routing = route(index, E)
    flat = index.flatten()
    assert torch.equal(flat[routing.order_S].int(), routing.expert_S)
    assert torch.equal(routing.offsets_E, torch.bincount(flat, minlength=E).cumsum(0).int())
    assert torch.equal(routing.order_S[routing.position_Tk.flatten()], torch.arange(T * K))
    for e in range(E):  # stable: rows of an expert keep the order of their tokens
        rows = routing.order_S[routing.expert_S == e]
        assert torch.equal(rows, rows.sort().values)


@pytest.mark.usefixtures("poison_memory")
def test_round_trip_and_gradients_equal_plain_indexing(batch) -> None:
    index, x, weights = batch
    routing = route(index, E)
    scale = torch.linspace(0.5, 2, E)
    probe = torch.randn(T, H)

    rows = dispatch(x, routing)
    assert torch.equal(rows, x[routing.order_S // K])
    out = combine(rows * scale[routing.expert_S.long()].unsqueeze(-1), weights, routing, torch.float32)
    grads = torch.autograd.grad((out * probe).sum(), (x, weights))

    wanted = (x.unsqueeze(1) * (weights * scale[index]).unsqueeze(-1)).sum(1)
    wanted_grads = torch.autograd.grad((wanted * probe).sum(), (x, weights))
    torch.testing.assert_close(out, wanted)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_torch(batch, dtype: torch.dtype) -> None:
    from fourfold.kernels import routing_triton

    index, x, weights = batch
    routing = route(index, E)
    rows = x.detach().to(dtype)[routing.order_S // K]
    weights = weights.detach()
    summed = routing_triton.sum_rows_triton(rows, routing.position_Tk, weights, dtype)
    picked = rows[routing.position_Tk].float()
    torch.testing.assert_close(summed, (picked * weights.unsqueeze(-1)).sum(1).to(dtype))
    plain = routing_triton.sum_rows_triton(rows, routing.position_Tk, None, dtype)
    torch.testing.assert_close(plain, picked.sum(1).to(dtype))

    grad = torch.randn(T, H).to(dtype)
    grad_rows, grad_weights = routing_triton.combine_backward_triton(grad, rows, weights, routing.order_S)
    grad_S = grad.float()[routing.order_S // K]
    torch.testing.assert_close(
        grad_rows, (grad_S * weights.flatten()[routing.order_S].unsqueeze(-1)).to(dtype)
    )
    torch.testing.assert_close(grad_weights, (grad_S * rows.float()).sum(-1)[routing.position_Tk])
