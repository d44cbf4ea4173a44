"""Packed experts modules under `torch.compile`: one graph, equal bits, few compilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import needs
import parity
import tiny
from fourfold.experts import find_experts
from fourfold.experts.packed import pack_module_
from fourfold.formats import PackFormat
from fourfold.kernels import LowRank, layer

FORMATS = [PackFormat("nf4", 64, True), PackFormat("fp4"), PackFormat("int8")]
H = 64


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def packed_experts(kind: str, fmt: PackFormat, number: int = 0) -> Any:
    """Of a tiny model; biases among the parameters that are trained."""
    found = list(find_experts(tiny.build(tiny.KINDS[kind]())))[number]
    return pack_module_(found.module, fmt, found.name)


def random_factors(module: Any) -> dict[str, LowRank]:
    return {
        p.name: LowRank(
            (torch.randn(p.shape.experts, 5, p.shape.columns) * 0.1).requires_grad_(),
            (torch.randn(p.shape.experts, p.shape.rows, 5) * 0.1).requires_grad_(),
        )
        for p in module.fourfold_layout.projections
    }


def random_batch(tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    x = torch.randn(tokens, H).to(dtype)
    return [x.requires_grad_(), index, torch.rand(tokens, 2, requires_grad=True)]


def leaves_of(
    module: nn.Module, batch: list[torch.Tensor], low_rank: dict[str, LowRank]
) -> list[torch.Tensor]:
    factors = [t for f in low_rank.values() for t in (f.a_ERK, f.b_ENR)]
    return [batch[0], batch[2], *factors, *(p for p in module.parameters() if p.requires_grad)]


def results(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    probe = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), leaves)]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(mine, theirs), f"result {number}"
        assert bool(theirs.any()), f"result {number}"


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "low-rank"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_equals_eager(kind: str, fmt: PackFormat, adapted: bool) -> None:
    module, batch = packed_experts(kind, fmt), random_batch(9)
    low_rank = random_factors(module) if adapted else {}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = leaves_of(module, batch, low_rank)
    equal(
        results(compiled(*batch, low_rank=low_rank), leaves),
        results(module(*batch, low_rank=low_rank), leaves),
    )


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_in_one_step_equals_eager(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer of the common kind is one step (on CUDA); gpt_oss is none."""
    needs.triton()
    monkeypatch.setattr(layer, "runs_on", lambda device, dtype: True)
    called: list[int] = []
    whole = layer.silu_experts
    monkeypatch.setattr(layer, "silu_experts", lambda *a, **k: called.append(1) or whole(*a, **k))
    test_equals_eager(kind, FORMATS[0], True)
    assert bool(called) is (kind == "mixtral")


@pytest.mark.parametrize("way", ["reference", "workspace", "in_product"])
def test_a_way_is_gone_and_another_is_compiled_anew(way: str) -> None:
    if way == "in_product":
        needs.triton()
    module, batch = packed_experts("gpt_oss", FORMATS[0]), random_batch(9)
    low_rank, seen = random_factors(module), []
    leaves = leaves_of(module, batch, low_rank)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.extend(a for n in graph.graph.nodes for a in n.args if isinstance(a, str))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    compiled(*batch, low_rank=low_rank)
    assert way not in seen
    module.way = way
    found = results(compiled(*batch, low_rank=low_rank), leaves)
    equal(found, results(module(*batch, low_rank=low_rank), leaves))
    assert seen.count(way) == 2


def test_a_way_that_there_is_not_names_the_module() -> None:
    module, batch = packed_experts("mixtral", FORMATS[0]), random_batch(9)
    module.way = "fastest"
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        with pytest.raises(Exception, match=r"experts: way='fastest': there is no such way"):
            run(*batch)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_inductor_equals_eager(kind: str) -> None:
    """It fuses what lies between the steps, and so rounds elsewhere."""
    module, batch = packed_experts(kind, FORMATS[0]), random_batch(9)
    low_rank = random_factors(module)
    leaves = leaves_of(module, batch, low_rank)
    found = results(torch.compile(module, fullgraph=True)(*batch, low_rank=low_rank), leaves)
    for mine, theirs in zip(found, results(module(*batch, low_rank=low_rank), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("around", ["autocast", "checkpoint", "no_grad"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_in_what_training_puts_around(kind: str, around: str, dtype: torch.dtype) -> None:
    module, batch = packed_experts(kind, FORMATS[0]).to(dtype), random_batch(9, dtype)
    module.fourfold_dtype = dtype
    low_rank = random_factors(module)

    def run() -> torch.Tensor:
        if around == "checkpoint":
            return checkpoint(module, *batch, low_rank=low_rank, use_reentrant=False)
        if around == "no_grad":
            with torch.no_grad():
                return module(*batch, low_rank=low_rank)
        with torch.autocast("cpu", torch.bfloat16):
            return module(*batch, low_rank=low_rank)

    compiled: Callable[[], torch.Tensor] = torch.compile(run, fullgraph=True, backend="aot_eager")
    if around == "no_grad":
        equal([compiled()], [run()])
        return
    leaves = leaves_of(module, batch, low_rank)
    equal(results(compiled(), leaves), results(run(), leaves))


@pytest.mark.parametrize("in_one_step", [False, True])
def test_another_number_of_tokens_is_not_compiled_again(
    in_one_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_one_step:
        needs.triton()
        monkeypatch.setattr(layer, "runs_on", lambda device, dtype: True)
    module = packed_experts("mixtral", FORMATS[0])
    low_rank, counter = random_factors(module), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for tokens in (9, 32, 5, 17):
        batch = random_batch(tokens)
        for tensor in batch:
            torch._dynamo.mark_dynamic(tensor, 0)
        leaves = leaves_of(module, batch, low_rank)
        found = results(compiled(*batch, low_rank=low_rank), leaves)
        equal(found, results(module(*batch, low_rank=low_rank), leaves))
    assert counter.frame_count == 1


@pytest.mark.parametrize("in_one_step", [False, True])
def test_layers_share_compiled_code(in_one_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_one_step:
        needs.triton()
        monkeypatch.setattr(layer, "runs_on", lambda device, dtype: True)
    modules = [packed_experts("qwen3_moe", FORMATS[0], number) for number in (0, 1)]
    batch, counter = random_batch(9), CompileCounterWithBackend("aot_eager")
    for module in modules:
        module.compile(fullgraph=True, backend=counter)
        equal([module(*batch).detach()], [module.forward(*batch).detach()])
    assert not torch.equal(modules[0](*batch), modules[1](*batch))
    assert counter.frame_count == 1


def test_tables_of_codes_are_made_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where recording a CUDA graph is the first thing that runs, they would lie in the graph's memory."""
    made: list[str] = []

    def note(quant_type: str, device: torch.device) -> None:
        assert type(torch.zeros(1)) is torch.Tensor  # not a compiler's stand-in, which would be kept
        made.append(f"{quant_type} {device}")

    monkeypatch.setattr("fourfold.experts.forward.four_bit_codes", note)
    module, batch = packed_experts("mixtral", FORMATS[1]), random_batch(9)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        assert made == ["fp4 cpu"]
        return graph.forward

    torch.compile(module, fullgraph=True, backend=backend)(*batch)
    assert made == ["fp4 cpu"]


class _OneAndAHalf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * nn.functional.silu(x)


def test_another_activation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the gate is the common one was a constant to the compiler."""
    needs.triton()
    monkeypatch.setattr(layer, "runs_on", lambda device, dtype: True)
    module, batch = packed_experts("mixtral", FORMATS[0]), random_batch(9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = compiled(*batch)
    module.act_fn = _OneAndAHalf()
    after = compiled(*batch)
    torch.testing.assert_close(after, 1.5 * before, rtol=1e-5, atol=1e-6)


def test_exported() -> None:
    module, batch = packed_experts("mixtral", FORMATS[0]), random_batch(9)
    tokens = torch.export.Dim("tokens", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, None)
    program = torch.export.export(module, tuple(t.detach() for t in batch), dynamic_shapes=shapes[:3])
    other = [t.detach() for t in random_batch(14)]
    assert torch.equal(program.module()(*other), module(*other))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "fourfold.packed_linear.default" in names


def test_a_setting_that_decides_on_fp32_is_watched() -> None:
    """(How the model's own forward multiplies, and so ours; it can be changed after compiling.)"""
    found = next(iter(find_experts(parity.build("privacy_filter").bfloat16())))
    module = pack_module_(found.module, PackFormat("nf4", 64, True), found.name)
    module.requires_grad_(False)
    H, E = module.fourfold_layout.up.shape.columns, module.fourfold_layout.num_experts
    x, weights = torch.randn(6, H).bfloat16(), torch.rand(6, 2).bfloat16()
    index = torch.stack([torch.randperm(E)[:2] for _ in range(6)])
    compiled = torch.compile(lambda: module(x, index, weights), backend="aot_eager", fullgraph=True)
    results = []
    for implementation in ("grouped_mm", "eager", "grouped_mm"):
        module.config._experts_implementation = implementation
        results.append(compiled())
        assert torch.equal(results[-1], module(x, index, weights)), implementation
    assert not torch.equal(results[0], results[1])
