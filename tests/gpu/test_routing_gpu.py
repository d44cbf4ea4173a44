"""Routing in CUDA C++: the same bits as a stable sort, sums rounded once, what is left to Triton."""

import pytest
import torch

from fourfold.kernels import routing
from fourfold.kernels.cuda import routing as in_cuda
from fourfold.kernels.route_triton import route_triton
from fourfold.kernels.routing_triton import sum_rows_triton

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_memory")]
NAMES = ("order_S", "position_Tk", "expert_S", "offsets_E")
# T, k, E: one row; odd; more experts than rows; several rounds of a block; many experts
CASES = [(1, 1, 1), (37, 3, 6), (2, 4, 257), (1366, 3, 60), (130, 8, 1024), (4096, 8, 128)]


def random_index(T: int, k: int, E: int) -> torch.Tensor:
    """Skewed; the last expert of several gets no row."""
    scores = torch.randn(T, E, device="cuda") + 2 * torch.randn(E, device="cuda")
    if k < E:
        scores[:, -1] = -1e4
    return scores.topk(k).indices


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_stable_sort(case: tuple[int, int, int]) -> None:
    index = random_index(*case)
    wanted = routing.route_sorted(index, case[2])
    for name, found in zip(NAMES, in_cuda.route(index, case[2]), strict=True):
        expected = getattr(wanted, name)
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        assert torch.equal(found, expected), name
        assert found.untyped_storage().nbytes() == found.nbytes, name  # its own: an operator's result


@pytest.mark.parametrize("tokens", [1, 3, 48])
def test_as_an_operator(tokens: int) -> None:
    torch.library.opcheck(torch.ops.fourfold.route.default, (random_index(tokens, 2, 6), 6))


def test_no_tokens() -> None:
    rows = torch.empty(0, 64, device="cuda", dtype=torch.bfloat16)
    position = torch.empty(0, 2, device="cuda", dtype=torch.int64)
    assert routing.sum_rows(rows, position, None, torch.float32).shape == (0, 64)


def test_what_is_no_expert_goes_last_and_moves_nobody() -> None:
    E, index = 6, random_index(1000, 2, 6)
    index[::7, 0], index[::11, 1] = E + 3, -1
    for ours, theirs in zip(in_cuda.route(index, E), route_triton(index, E, one_launch=True), strict=True):
        assert torch.equal(ours, theirs)


def test_the_layer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("Triton was asked")

    monkeypatch.setattr("fourfold.kernels.route_triton.route_triton", never)
    monkeypatch.setattr("fourfold.kernels.routing_triton.sum_rows_triton", never)
    index = random_index(64, 8, 128)
    found = routing.route(index, 128)
    rows = torch.randn(512, 256, device="cuda").bfloat16()
    routing.sum_rows(rows, found.position_Tk, None, torch.bfloat16)
    with pytest.raises(AssertionError, match="Triton was asked"):
        routing.route(index.int(), 128)
    with pytest.raises(AssertionError, match="Triton was asked"):
        routing.sum_rows(rows[:, :250].contiguous(), found.position_Tk, None, torch.bfloat16)
    with pytest.raises(AssertionError, match="Triton was asked"):
        routing.sum_rows(rows, found.position_Tk.int(), None, torch.bfloat16)


@pytest.mark.parametrize("weights_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_dtype", [torch.bfloat16, torch.float16])
def test_sums(rows_dtype: torch.dtype, dtype: torch.dtype, weights_dtype: torch.dtype | None) -> None:
    for T, k, H in ((1, 1, 8), (33, 8, 2056), (300, 3, 4096)):
        rows = torch.randn(T * k, H, device="cuda").to(rows_dtype)
        position = torch.randperm(T * k, device="cuda").view(T, k)
        weights = None if weights_dtype is None else torch.rand(T, k, device="cuda").to(weights_dtype)
        found = in_cuda.sum_rows(rows, position, weights, dtype)
        picked = rows.double()[position]
        exact = (picked if weights is None else picked * weights.double().unsqueeze(-1)).sum(1)
        error = (found.double() - exact).norm()
        assert error <= 1.02 * (exact.to(dtype) - exact).norm() + 1e-6 * exact.norm()
        triton = sum_rows_triton(rows, position, weights, dtype)
        assert (found.double() - triton.double()).norm() <= 2 * error
