"""The ways to multiply with packed experts: the same numbers by each, the rule, and its errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import needs
from fourfold.errors import ConfigurationError
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, packed_linear, ways
from fourfold.kernels.cuda import few_rows
from fourfold.kernels.cuda import hopper as products
from fourfold.kernels.layer import silu_experts
from fourfold.kernels.routing import route

needs.triton()

CUDA = ways.Problem("cuda", (8, 0), torch.bfloat16, PackFormat("nf4"), 65536, 128, 1536, 2048)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    ways._by_rule.cache_clear()
    yield
    ways._by_rule.cache_clear()


def but(**changes) -> ways.Problem:
    return CUDA._replace(**changes)


@pytest.mark.parametrize(
    ("problem", "way"),
    [
        (CUDA, "workspace"),
        (but(rows=8), "in_product"),  # one token: eight experts with a row each
        (but(rows=2048), "in_product"),
        (but(rows=2049), "workspace"),
        (but(rows=128, experts=4), "in_product"),
        (but(rows=129, experts=4), "workspace"),
        (but(dtype=torch.float16), "in_product"),
        (but(dtype=torch.float16, fmt=None), "in_product"),
        (but(fmt=None, plain=(torch.bfloat16, (1536 * 2048, 2048, 1))), "in_product"),
        (but(capability=(9, 0)), "hopper"),
        (but(capability=(9, 0), rows=8), "hopper"),
        (but(capability=(9, 0), dtype=torch.float16), "hopper"),
        (but(capability=(9, 0), fmt=PackFormat("nf4", 32)), "workspace"),
        (but(capability=(9, 0), columns=2000), "workspace"),
        (but(capability=(9, 0), fmt=None, plain=(torch.bfloat16, (1536 * 2048, 2048, 1))), "hopper"),
        (but(capability=(9, 0), fmt=None, plain=(torch.float32, (1536 * 2048, 2048, 1))), "in_product"),
        (but(capability=(10, 0)), "workspace"),
        (but(dtype=torch.float16, capability=(7, 5)), "workspace"),
        (but(dtype=torch.float32, rows=8), "workspace"),
        (but(device="cpu", capability=None), "reference"),
        (but(device="cpu", capability=None, dtype=torch.float16, rows=1), "reference"),
        (but(device="mps", capability=None), "reference"),
    ],
    ids=str,
)
def test_the_rule(problem: ways.Problem, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_interpreting", lambda: False)
    monkeypatch.setattr(products, "unavailable", lambda: None)
    assert ways.choose(problem) == way
    # Few rows an expert have a kernel of their own, forward, where it can be compiled.
    monkeypatch.setattr(few_rows, "unavailable", lambda capability: None)
    ways._by_rule.cache_clear()
    few = problem.device == "cuda" and problem.rows == 8 and problem.dtype == torch.bfloat16
    assert ways.choose(problem) == ("few_rows" if few else way)
    assert ways.choose(problem._replace(transposed=True)) == way


@pytest.mark.parametrize(
    ("problem", "way"),
    [
        (but(capability=(9, 0), rows=256), "few_rows"),
        (but(capability=(9, 0), rows=257), "hopper"),
        (but(capability=(9, 0), columns=2000, rows=1024), "few_rows"),  # (not by 64)
        (but(rows=1024), "few_rows"),
        (but(rows=1025), "in_product"),
        (but(rows=1024, dtype=torch.float16), "few_rows"),
        (but(rows=1024, dtype=torch.float32), "workspace"),
    ],
    ids=str,
)
def test_the_rule_of_few_rows(problem: ways.Problem, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_interpreting", lambda: False)
    monkeypatch.setattr(products, "unavailable", lambda: None)
    monkeypatch.setattr(few_rows, "unavailable", lambda capability: None)
    assert ways.choose(problem) == way


def test_a_way_of_forward_alone_leaves_gradients_to_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "unavailable", lambda capability: None)
    assert ways.choose(CUDA, "few_rows") == "few_rows"
    assert ways.choose(but(transposed=True), "few_rows") == "workspace"
    with pytest.raises(ConfigurationError, match="packed weights"):
        ways.choose(but(fmt=None), "few_rows")


def test_a_way_that_cannot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_interpreting", lambda: False)
    assert ways.choose(CUDA, "reference") == "reference"
    with pytest.raises(ConfigurationError, match=r"layers\.3: way='tensor_cores': there is no such way.*"):
        ways.choose(CUDA, "tensor_cores", "layers.3")
    with pytest.raises(
        ConfigurationError, match=r"on CUDA, and the rows are on cpu.*: reference, workspace;"
    ):
        ways.choose(but(device="cpu", capability=None), "in_product")
    with pytest.raises(ConfigurationError, match=r"capability 8\.0 or more, and this one has 7\.5"):
        ways.choose(but(capability=(7, 5)), "in_product")
    with pytest.raises(ConfigurationError, match=r"not in torch\.float64"):
        ways.choose(but(dtype=torch.float64), "in_product")
    monkeypatch.setattr(ways, "HAS_TRITON", False)
    ways._by_rule.cache_clear()
    assert ways.choose(but(rows=8)) == "workspace"
    with pytest.raises(ConfigurationError, match="not installed"):
        ways.choose(CUDA, "in_product")


def test_a_new_way_is_an_entry_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rule passes over lines whose way cannot do the problem."""

    def cannot(problem: ways.Problem) -> str | None:
        return None if problem.capability == (8, 0) else "it is for capability 8.0"

    monkeypatch.setitem(ways.WAYS, "new", ways.Way("a new one", cannot, ways.WAYS["workspace"].product))
    monkeypatch.setattr(ways, "RULE", (ways.Line("new", "cuda"), *ways.RULE))
    assert ways.choose(CUDA) == "new"
    assert ways.choose(but(capability=(8, 6))) == "workspace"
    assert "new         a new one" in ways.describe()


def test_the_rule_is_printed() -> None:
    command = [sys.executable, "-W", "error", "-m", "fourfold.kernels"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ways.WAYS:
        assert name in shown
    assert "bfloat16, at most 16 rows an expert" in shown
    assert shown.strip() == ways.describe() or torch.cuda.is_available()


def case(fmt: PackFormat | None):
    counts, N, K, rank = [9, 0, 1, 4], 40, 100, 5
    E, w = len(counts), torch.randn(4, 40, 100) * 0.1
    shape = StackShape(E, N, K, parts=2)
    stack = PlainStack(shape, w) if fmt is None else pack_stack(PackedStack.empty(fmt, shape, "cpu"), w, "w")
    x = torch.randn(sum(counts), K, requires_grad=True)
    a = (torch.randn(E, rank, K) * 0.1).requires_grad_()
    b = (torch.randn(E, N, rank) * 0.1).requires_grad_()
    return stack, x, a, b, torch.tensor(counts).cumsum(0).int()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU see tests/gpu/test_product_gpu.py")
@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("fmt", [PackFormat("nf4", 64, True), PackFormat("int8"), None], ids=str)
def test_each_way_gives_the_same_numbers(fmt: PackFormat | None, low_rank: bool) -> None:
    """Result and gradients of the product, in fp32."""
    stack, x, a, b, offsets = case(fmt)
    results = {}
    for way in ways.possible(ways.problem(x, stack)):
        y = packed_linear(x, stack, offsets, LowRank(a, b) if low_rank else None, way=way)
        probe = torch.linspace(-1, 1, y.numel()).view_as(y)
        results[way] = [y.detach(), *torch.autograd.grad((y * probe).sum(), (x, a, b) if low_rank else x)]
    for way, found in results.items():
        for mine, theirs in zip(found, results["reference"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5, msg=lambda m, w=way: f"{w}: {m}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU see tests/gpu/test_product_gpu.py")
def test_a_layer_goes_the_way_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four products of a layer in one step, and the numbers are those of the other ways."""
    E, T, H, I = 3, 7, 64, 32  # noqa: E741
    up = PackedStack.empty(PackFormat("nf4"), StackShape(E, 2 * I, H), "cpu")
    down = PackedStack.empty(PackFormat("nf4"), StackShape(E, H, I), "cpu")
    pack_stack(up, torch.randn(E, 2 * I, H) * 0.2, "up")
    pack_stack(down, torch.randn(E, H, I) * 0.2, "down")
    x, weights = torch.randn(T, H, requires_grad=True), torch.rand(T, 2)
    routing = route(torch.stack([torch.randperm(E)[:2] for _ in range(T)]), E)
    gone: list[str] = []
    for name, way in list(ways.WAYS.items()):

        def product(*args, name=name, way=way, **kwargs):
            gone.append(name)
            return way.product(*args, **kwargs)

        monkeypatch.setitem(ways.WAYS, name, dataclasses.replace(way, product=product))
    results = []
    for way in ways.possible(ways.problem(x, up)):
        y = silu_experts(x, weights, routing, up, down, None, None, compute_dtype=torch.float32, way=way)
        results.append(torch.cat([y.detach(), *torch.autograd.grad(y.sum(), x)]))
        assert gone == [way] * 4
        gone.clear()
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=2e-5)
