"""Two sums in one product, rounded once."""

from __future__ import annotations

import pytest
import torch

from fourfold.experts.update import Update
from fourfold.kernels.grouped import SUM_BLOCKS, add_grouped_rows_, grouped_rows, grouped_sums


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("K", "N", "R"), [(63, 100, 5), (64, 8, 8), (130, SUM_BLOCKS * 8 + 1, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_sums_rounds_once(K: int, N: int, R: int, transposed: bool) -> None:
    """An expert without rows among them; weights out-by-in and in-by-out."""
    offsets_E = torch.tensor([40, 40, 141, 200], dtype=torch.int32)
    x_SK, h_SR = random(200, K, seed=1), random(200, R, seed=2)
    w_EKN = random(4, N, K, seed=3).transpose(1, 2) if transposed else random(4, K, N, seed=3)
    b_ERN = random(4, R, N, seed=4)
    found = grouped_sums(x_SK, w_EKN, h_SR, b_ERN, offsets_E).double()
    exact = grouped_rows(x_SK.double(), w_EKN.double(), offsets_E)
    exact += grouped_rows(h_SR.double(), b_ERN.double(), offsets_E)

    def off(y: torch.Tensor) -> torch.Tensor:
        return (y.double() - exact).norm() / exact.norm()

    assert off(found) <= 1.01 * off(exact.bfloat16())
    twice = add_grouped_rows_(grouped_rows(x_SK, w_EKN, offsets_E), h_SR, b_ERN, offsets_E)
    assert off(twice) > 1.2 * off(found)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_an_update_is_added_in_fp32(shared: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum and both factors' gradients; one right factor for all experts is summed over them."""
    monkeypatch.setattr("fourfold.experts.update.CHUNK", chunk)
    w_EPQ = random(3, 17, 23, seed=1)
    left_EPR = random(3, 17, 5, seed=2).float().mul(1.0007).requires_grad_()
    right = random(1 if shared else 3, 5, 23, seed=3).float().mul(1.0007).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = Update(left_EPR, right.expand(3, -1, -1)).added_to(w_EPQ.flatten(0, 1), torch.bfloat16)
    grad = random(3, 17, 23, seed=4)
    found = torch.autograd.grad(y, (left_EPR, right), grad.flatten(0, 1))
    exact = w_EPQ.double() + left_EPR.double() @ right.double()
    wanted = torch.autograd.grad(exact, (left_EPR, right), grad.double())
    assert y.shape == (51, 23)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact.flatten(0, 1)).norm() <= 1.01 * (exact.bfloat16() - exact).norm()
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1e-6 * b.norm()
