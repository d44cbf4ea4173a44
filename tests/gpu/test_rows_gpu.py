"""Passes over rows, in CUDA C++ and in Triton, against plain torch: rounded once, nothing else read."""

import pytest
import torch

from fourfold.kernels import rows
from fourfold.kernels.cuda import compile as compiled
from fourfold.kernels.cuda import rows as in_cuda
from fourfold.kernels.linear import empty_rows

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_memory")]
DTYPES = [torch.bfloat16, torch.float16]
RANKS = [0, 8, 16, 24, 64]
# T, k, E, H: several tiles an expert, few rows, a width that fills no step of columns; few rows again, of
# more experts and columns than a block looks at in a turn, and of as many columns as it can hold
CASES = [(400, 2, 5, 512), (9, 8, 40, 264), (70, 1, 3, 72), (2, 4, 600, 4104), (3, 2, 40, 16384)]


def routed(T: int, k: int, E: int):
    scores = torch.randn(T, E, device="cuda") + 2 * torch.randn(E, device="cuda")
    scores[:, 1] = -1e4  # an expert without rows
    weights, index = torch.softmax(scores, -1).topk(k)
    expert, order = torch.sort(index.reshape(-1), stable=True)
    offsets = torch.bincount(index.reshape(-1), minlength=E).cumsum(0).int()
    return weights, expert, order, offsets


def off(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> float:
    """Error by that of rounding once."""
    assert found.isfinite().all()
    wanted = wanted.double()
    return float((found - wanted).norm() / (wanted.to(dtype) - wanted).norm())


def by_expert(x: torch.Tensor, factor_EKR: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.double().unsqueeze(1), factor_EKR.double()[expert]).squeeze(1)


@pytest.fixture(autouse=True, params=["CUDA", "Triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose are called; the others cannot be."""
    from fourfold.kernels import rows_triton

    if request.param == "Triton":
        monkeypatch.setattr(in_cuda, "can", lambda *arguments: False)
    else:
        for name in ("gather_triton", "silu_mul_triton", "silu_mul_backward_triton"):
            monkeypatch.setattr(rows_triton, name, None)
    return request.param


def wide(dtype: torch.dtype, S: int, columns: int, rank: int) -> torch.Tensor:
    return empty_rows(torch.empty(0, device="cuda", dtype=dtype), S, columns, rank).fill_(float("nan"))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rank_first", [True, False])
def test_gather(rank_first: bool, case: tuple[int, ...], dtype: torch.dtype, rank: int, kernels: str) -> None:
    T, k, E, H = case
    weights, expert, order, offsets = routed(T, k, E)
    x, S = torch.randn(T, H, device="cuda").to(dtype), T * k
    factor = None
    if rank:
        factor = (torch.randn((E, rank, H) if rank_first else (E, H, rank), device="cuda") * H**-0.5).to(
            dtype
        )
        factor = factor.transpose(1, 2) if rank_first else factor
    for given in (None, weights, weights.to(dtype)):
        out = wide(dtype, S, H, rank)
        low = rows.gather(x, order, k, offsets, out, factor, given)
        if kernels == "CUDA":
            one_row = S <= 4 * E and (rank_first or not rank)
            assert ("rows", 0, rank_first and rank > 0, dtype, 0, one_row) in compiled.launchers()
        assert torch.equal(out[:, :H], x[order // k])
        if factor is None:
            assert low is None
            continue
        wanted = by_expert(x[order // k], factor, expert)
        assert off(out[:, H : H + rank], wanted, dtype) < 1.02
        if given is not None:
            wanted = wanted * given.reshape(-1)[order, None].double()
        assert off(low, wanted, dtype) < 1.02


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gate_and_its_gradient(case: tuple[int, ...], dtype: torch.dtype, rank: int) -> None:
    T, k, E, I = case  # noqa: E741
    weights, expert, order, offsets = routed(T, k, E)
    S = T * k
    up = (torch.randn(S, 2 * I, device="cuda") * 3).to(dtype)
    a = (torch.randn(E, rank, I, device="cuda") * I**-0.5).to(dtype) if rank else None
    out = wide(dtype, S, I, rank)
    low = rows.silu_mul(up, weights, order, offsets, out, a)
    exact = up.double().requires_grad_()
    act = torch.nn.functional.silu(exact[:, :I]) * exact[:, I:]
    assert off(out[:, :I], act.detach(), dtype) < 1.02
    weight_S1 = weights.reshape(-1)[order, None].double()
    if a is not None:
        wanted = by_expert(out[:, :I], a.transpose(1, 2), expert)
        assert off(out[:, I : I + rank], wanted, dtype) < 1.02
        assert off(low, wanted * weight_S1, dtype) < 1.02

    grad = torch.randn(S, I, device="cuda").to(dtype)
    b = (torch.randn(E, 2 * I, rank, device="cuda") * I**-0.5).to(dtype) if rank else None
    (wanted_up,) = torch.autograd.grad((act * grad.double() * weight_S1).sum(), exact)
    wanted_weights = torch.zeros(S, device="cuda", dtype=torch.float64)
    wanted_weights[order] = (act.detach() * grad.double()).sum(1)
    for keep_act in (True, False):
        out = wide(dtype, S, 2 * I, rank)
        low, act_again, grad_weights = rows.silu_mul_backward(
            up, grad, weights, order, offsets, out, b, keep_act=keep_act
        )
        assert off(out[:, : 2 * I], wanted_up, dtype) < 1.02
        assert (grad_weights.reshape(-1) - wanted_weights).norm() < 1e-5 * wanted_weights.norm()
        assert (act_again is not None) == keep_act
        if act_again is not None:
            assert off(act_again, act.detach(), dtype) < 1.02
        if b is not None:
            wanted = by_expert(out[:, : 2 * I], b, expert)
            assert off(out[:, 2 * I : 2 * I + rank], wanted, dtype) < 1.02
            assert torch.equal(low, out[:, 2 * I : 2 * I + rank])


def test_no_rows(kernels: str) -> None:
    if kernels == "Triton":
        return
    x, none = torch.zeros(0, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(5, device="cuda").int()
    order, out = torch.empty(0, device="cuda", dtype=torch.int64), wide(torch.bfloat16, 0, 64, 0)
    assert rows.gather(x, order, 1, none, out, None) is None


def test_what_it_leaves_to_triton(kernels: str) -> None:
    if kernels == "Triton":
        return
    x = torch.zeros(4, 64, device="cuda", dtype=torch.bfloat16)
    out = wide(torch.bfloat16, 4, 64, 0)
    assert in_cuda.can(64, out, None, 0, None, x)
    assert not in_cuda.can(64, out, None, 0, None, x.float())
    assert not in_cuda.can(60, out, None, 0, None, x)
    assert not in_cuda.can(64, out, None, 72, None, x)
    assert not in_cuda.can(64, out, None, 12, None, x)
    assert not in_cuda.can(64, out, None, 0, None, x.t())
