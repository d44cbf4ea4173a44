"""Compilers, CUDA graphs and sorting by counting on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

import tiny
from fourfold.experts import find_experts
from fourfold.experts.packed import pack_module_
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, layer, route
from fourfold.kernels.operators.define import stack_arguments
from fourfold.kernels.route_triton import route_triton
from fourfold.kernels.routing import route_sorted

pytestmark = pytest.mark.gpu
FORMATS = [PackFormat("nf4", 64, True), PackFormat("int8")]
KINDS = ["mixtral", "gpt_oss", "nemotron_h"]  # in one step; product by product
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


# T, k, E: decode, odd, several tiles of either way, Qwen3-Next's experts, a million rows
@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("one_launch", [True, False], ids=["one launch", "tiles"])
@pytest.mark.parametrize(
    "case",
    [(1, 8, 128), (37, 3, 6), (8192, 8, 128), (1000, 10, 512), (131072, 8, 128), (3000, 8, 1024)],
    ids=str,
)
def test_rows_are_sorted_as_torch_sorts_them(case: tuple[int, int, int], one_launch: bool) -> None:
    T, k, E = case
    scores = torch.randn(T, E, device=DEVICE) + 2 * torch.randn(E, device=DEVICE)
    index = scores.topk(k).indices
    wanted = route_sorted(index, E)
    names = ("order_S", "position_Tk", "expert_S", "offsets_E")
    for _ in range(3):
        for name, found in zip(names, route_triton(index, E, one_launch=one_launch), strict=True):
            assert torch.equal(found, getattr(wanted, name)), name


def packed_experts(kind: str, fmt: PackFormat = FORMATS[0]) -> Any:
    found = next(iter(find_experts(tiny.build(tiny.KINDS[kind]()).to(DEVICE, torch.bfloat16))))
    module = pack_module_(found.module, fmt, found.name)
    module.requires_grad_(False)
    module.compute_dtype = torch.bfloat16
    return module


class Step:
    """A module, its inputs and LoRA's factors, and what one step gives."""

    def __init__(self, module: Any, tokens: int = 48) -> None:
        self.module = module
        self.index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]).to(DEVICE)
        self.x = torch.randn(tokens, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        self.weights = torch.rand(tokens, 2, device=DEVICE, requires_grad=True)
        self.probe = torch.randn(tokens, 64, device=DEVICE)
        self.low_rank = {
            p.name: LowRank(
                (torch.randn(p.shape.experts, 5, p.shape.columns, device=DEVICE) * 0.1).requires_grad_(),
                (torch.randn(p.shape.experts, p.shape.rows, 5, device=DEVICE) * 0.1).requires_grad_(),
            )
            for p in module.fourfold_layout.projections
        }
        factors = [t for f in self.low_rank.values() for t in (f.a_ERK, f.b_ENR)]
        self.leaves = [self.x, self.weights, *factors]

    def results(self, run: Any = None) -> list[torch.Tensor]:
        run = self.module if run is None else run
        y = run(self.x, self.index, self.weights, low_rank=self.low_rank)
        return [y.detach(), *torch.autograd.grad((y * self.probe).sum(), self.leaves)]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(mine, theirs), f"result {number}"
        assert bool(theirs.any()), f"result {number}"


def close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Of a compiler that rounds between steps where eager does not, and the other way round."""
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error <= 0.01, f"result {number}: {error:.1e}"


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_with_equal_bits(kind: str, fmt: PackFormat) -> None:
    step = Step(packed_experts(kind, fmt))
    equal(step.results(torch.compile(step.module, fullgraph=True, backend="aot_eager")), step.results())


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_with_a_router_in_the_graph(tokens: int) -> None:
    """Numbers of rows that are no multiple of anything; the kernels for few rows an expert."""
    step = Step(packed_experts("mixtral"), tokens)
    router = torch.randn(64, 4, device=DEVICE, dtype=torch.bfloat16)

    def run(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, low_rank: Any) -> torch.Tensor:
        return step.module(x, (x.detach() @ router).topk(2).indices, weights, low_rank=low_rank)

    def results(run: Any) -> list[torch.Tensor]:
        return step.results(run)[:3]  # (experts without rows have no gradients)

    compiled = torch.compile(run, fullgraph=True)
    wanted = results(run)
    for _ in range(2):
        close(results(compiled), wanted)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(kind: str, mode: str) -> None:
    step = Step(packed_experts(kind))
    compiled = torch.compile(step.module, fullgraph=True, mode=mode)
    wanted = step.results()
    for _ in range(4):  # (warm-up, recording, and replaying of CUDA graphs)
        torch.compiler.cudagraph_mark_step_begin()
        close([t.clone() for t in step.results(compiled)], wanted)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_compiled_it_does_not_synchronise(kind: str) -> None:
    step = Step(packed_experts(kind))
    compiled = torch.compile(step.module, fullgraph=True)
    step.results(compiled)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.results(compiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [48, 3])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_captured_in_a_graph(kind: str, compiled: bool, tokens: int) -> None:
    """Forward and backward, sorting of rows included; replayed with other numbers and another routing."""
    step = Step(packed_experts(kind), tokens)
    run = torch.compile(step.module, fullgraph=True) if compiled else step.module
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step.results(run)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.results(run)
    with torch.no_grad():
        step.x.copy_(torch.randn_like(step.x))
        step.index.copy_(step.index.roll(5, 0))
    graph.replay()
    equal(captured, step.results(run))


@pytest.mark.parametrize("ranks", [(8, 16), (0, 0)], ids=str)
def test_fakes_of_a_whole_layer(ranks: tuple[int, int]) -> None:
    """Rows that grouped_mm pads among them."""
    E, T, H, I = 4, 40, 64, 42  # noqa: E741
    fmt, dtype = FORMATS[0], torch.bfloat16
    index = torch.stack([torch.randperm(E - 1)[:2] for _ in range(T)]).to(DEVICE)
    up = PackedStack.empty(fmt, StackShape(E, 2 * I, H, 2), DEVICE)
    down = PackedStack.empty(fmt, StackShape(E, H, I), DEVICE)
    pack_stack(up, torch.randn(E, 2 * I, H, device=DEVICE), "up")
    pack_stack(down, torch.randn(E, H, I, device=DEVICE), "down")
    leaves: list[Any] = [torch.randn(T, H, device=DEVICE, dtype=dtype), torch.rand(T, 2, device=DEVICE)]
    for rank, n, k in ((ranks[0], 2 * I, H), (ranks[1], H, I)):
        shapes = ((E, rank, k), (E, n, rank))
        leaves += [torch.randn(s, device=DEVICE, dtype=dtype) if rank else None for s in shapes]
    routing = route(index, E)
    places = (routing.order_S, routing.position_Tk, routing.expert_S, routing.offsets_E)
    wanted = [t is not None for t in leaves]
    tail = (*places, *stack_arguments(up), *stack_arguments(down), None, None, wanted)
    out, *kept = torch.ops.fourfold.silu_experts.default(*leaves, dtype, *tail)
    saved = [t if t.numel() else None for t in kept]
    backward = torch.ops.fourfold.silu_experts_backward.default
    opcheck(backward, (torch.randn_like(out), *saved, *leaves[1:], *tail))
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    opcheck(torch.ops.fourfold.silu_experts.default, (*leaves, dtype, *tail))
    assert layer.runs_on(torch.device(DEVICE), dtype)
