"""Products that decode inside, on CUDA: every tile and format, no less exact, and the host never waits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fourfold.errors import ConfigurationError
from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.plain import PlainStack
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, packed_linear, route, ways
from fourfold.kernels.grouped import grouped_outer, grouped_rows, grouped_sums
from fourfold.kernels.layer import silu_experts

pytestmark = pytest.mark.gpu
FORMATS = [
    PackFormat("nf4"),
    PackFormat("nf4", 64, True),
    PackFormat("nf4", 32, True),
    PackFormat("fp4", 128),
    PackFormat("fp4", 4096, True),
    PackFormat("int8"),
    None,
]
KINDS = [FORMATS[1], FORMATS[3], FORMATS[5], None]
HALF = [torch.bfloat16, torch.float16]
COUNTS = {"few": [1, 0, 7, 0, 3, 1], "many": [700, 1, 0, 129, 37, 256], "one": [0, 0, 5, 0]}


def made(fmt: PackFormat | None, E: int, N: int, K: int, dtype: torch.dtype) -> PackedStack | PlainStack:
    w_ENK = torch.randn(E, N, K, device="cuda") * K**-0.5
    shape = StackShape(E, N, K, parts=2)
    if fmt is None:
        return PlainStack(shape, w_ENK.to(dtype).transpose(1, 2).contiguous().transpose(1, 2))
    return pack_stack(PackedStack.empty(fmt, shape, "cuda"), w_ENK, "w")


def decoded(stack: PackedStack | PlainStack, dtype: torch.dtype) -> torch.Tensor:
    """What is multiplied by, rounded once to ``dtype``, in fp64."""
    return (stack.data if isinstance(stack, PlainStack) else decode_stack(stack, dtype)).double()


def exact(x, w_ENK, h, factor, counts: Sequence[int], *, transposed: bool) -> torch.Tensor:
    pieces = []
    for e, rows in enumerate(torch.arange(sum(counts), device="cuda").split(list(counts))):
        y = x[rows].double() @ (w_ENK[e] if transposed else w_ENK[e].T)
        if h is not None:
            f = factor[e].double()
            y = y + h[rows].double() @ (f if transposed else f.T)
        pieces.append(y)
    return torch.cat(pieces)


def operands(fmt, counts, rank, N, K, dtype, *, transposed):
    E, S = len(counts), sum(counts)
    stack = made(fmt, E, N, K, dtype)
    x = torch.randn(S, N if transposed else K, device="cuda").to(dtype)
    factor = torch.randn((E, rank, K) if transposed else (E, N, rank), device="cuda").to(dtype) * 0.1
    h = torch.randn(S, rank, device="cuda").to(dtype)
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
    return stack, x, (h, factor) if rank else (None, None), offsets


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS[:-1], ids=str)
def test_weights_are_the_bits_that_decoding_gives(fmt, dtype: torch.dtype, transposed: bool) -> None:
    """Rows of the identity pick single weights, by every tile."""
    from fourfold.kernels.product_triton import FP32_TILES, TILES, product_triton

    N, K = 200, 300
    stack = made(fmt, 2, N, K, dtype)
    eye = torch.eye(N if transposed else K, device="cuda", dtype=dtype)
    offsets = torch.tensor([len(eye), 2 * len(eye)], dtype=torch.int32, device="cuda")
    each = [FP32_TILES[transposed]] if dtype == torch.float32 else TILES[transposed, fmt.is_4bit]
    for tiles in each:
        found = product_triton(eye.repeat(2, 1), stack, offsets, transposed=transposed, tiles=tiles)
        picked = found.view(2, len(eye), -1)
        mine = picked if transposed else picked.transpose(1, 2)
        assert torch.equal(mine, decode_stack(stack, dtype)), tiles


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "rank"), [(1536, 2048, 16), (150, 1407, 5), (256, 512, 200), (256, 512, 0)], ids=str
)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_every_tile_rounds_once(fmt, dtype: torch.dtype, N: int, K: int, rank: int, transposed: bool) -> None:
    """Against fp64 on the same weights: no further off than the exact sum, rounded."""
    from fourfold.kernels.product_triton import TILES, product_triton

    counts = COUNTS["many"]
    stack, x, (h, factor), offsets = operands(fmt, counts, rank, N, K, dtype, transposed=transposed)
    wanted = exact(x, decoded(stack, dtype), h, factor, counts, transposed=transposed)
    rounding = off(wanted.to(dtype), wanted)
    for tiles in TILES[transposed, fmt is not None and fmt.is_4bit]:
        found = product_triton(x, stack, offsets, h, factor, transposed=transposed, tiles=tiles)
        assert off(found, wanted) <= 1.02 * rounding, tiles


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 5, 16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_fp32(fmt, counts: list[int], rank: int, transposed: bool) -> None:
    from fourfold.kernels.product_triton import product_triton

    stack, x, (h, factor), offsets = operands(
        fmt, counts, rank, 150, 600, torch.float32, transposed=transposed
    )
    wanted = exact(x, decoded(stack, torch.float32), h, factor, counts, transposed=transposed)
    assert off(product_triton(x, stack, offsets, h, factor, transposed=transposed), wanted) < 1e-6


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_no_less_exact_than_the_workspace(fmt, dtype: torch.dtype, counts: list[int], rank: int) -> None:
    """Result and all gradients of the product, as the rule's alternatives compute them."""
    E, N, K = len(counts), 256, 512
    stack = made(fmt, E, N, K, dtype)
    weights = decoded(stack, dtype)
    x = torch.randn(sum(counts), K, device="cuda").to(dtype)
    a = (torch.randn(E, rank, K, device="cuda") * K**-0.5).to(dtype)
    b = (torch.randn(E, N, rank, device="cuda") * 0.1).to(dtype)
    probe = torch.randn(sum(counts), N, device="cuda").to(dtype)
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()

    def gradients(y, *leaves):
        return [y.detach(), *torch.autograd.grad((y * probe.to(y.dtype)).sum(), leaves)]

    leaves = [t.double().requires_grad_() for t in (x, a, b)]
    pieces = [
        leaves[0][rows] @ weights[e].T + leaves[0][rows] @ leaves[1][e].T @ leaves[2][e].T
        for e, rows in enumerate(torch.arange(sum(counts), device="cuda").split(list(counts)))
    ]
    wanted = gradients(torch.cat(pieces), *leaves)
    errors = {}
    for way in ways.possible(ways.problem(x, stack, rank)):
        mine = [t.clone().requires_grad_() for t in (x, a, b)]
        y = packed_linear(mine[0], stack, offsets, LowRank(mine[1], mine[2]), way=way)
        errors[way] = [off(f, w) for f, w in zip(gradients(y, *mine), wanted, strict=True)]
    assert "in_product" in errors
    for way in errors.keys() & {"in_product", "hopper"}:
        for name, ours, theirs in zip(("y", "dx", "da", "db"), errors[way], errors["workspace"], strict=True):
            assert ours <= 1.05 * theirs, (way, name, errors)


@pytest.mark.parametrize("M", [5, 16, 130])
@pytest.mark.parametrize("dtype", HALF)
def test_grouped_products_that_grouped_mm_does_not_take(dtype: torch.dtype, M: int) -> None:
    """fp16, and bf16 rows of an odd length: rows times matrices, two sums, and sums over an expert's rows."""
    counts, K, N = COUNTS["many"], 333, 130
    x = torch.randn(sum(counts), K, device="cuda").to(dtype)
    w = torch.randn(len(counts), K, N, device="cuda").to(dtype)
    h, b = (
        torch.randn(sum(counts), M, device="cuda").to(dtype),
        torch.randn(len(counts), M, N, device="cuda").to(dtype),
    )
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
    spans = torch.arange(sum(counts), device="cuda").split(counts)

    def products() -> tuple[torch.Tensor, ...]:
        return grouped_rows(x, w, offsets), grouped_sums(x, w, h, b, offsets), grouped_outer(h, x, offsets)

    products()  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = products()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = torch.cat([x[s].double() @ w[e].double() for e, s in enumerate(spans)])
    sums = rows + torch.cat([h[s].double() @ b[e].double() for e, s in enumerate(spans)])
    outer = torch.stack([h[s].double().T @ x[s].double() for s in spans])
    for mine, exact_sum in zip(found, (rows, sums, outer), strict=True):
        assert off(mine, exact_sum) <= 1.02 * off(exact_sum.to(dtype), exact_sum)
    assert not found[2][2].any()  # an expert without rows


@pytest.mark.parametrize("way", [None, "in_product", "workspace"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_layer_without_host_synchronisation(dtype: torch.dtype, way: str | None) -> None:
    """Forward and backward with LoRA; fp16 by every way, and one that has to wait is noticed."""
    E, T, H, I = 8, 96, 256, 128  # noqa: E741
    up, down = made(FORMATS[1], E, 2 * I, H, dtype), made(FORMATS[1], E, H, I, dtype)
    x = torch.randn(T, H, device="cuda", dtype=dtype, requires_grad=True)
    weights, index = torch.softmax(torch.randn(T, E, device="cuda"), -1).topk(2)
    low = [
        LowRank(
            torch.randn(E, 8, K, device="cuda", requires_grad=True),
            torch.zeros(E, N, 8, device="cuda", requires_grad=True),
        )
        for N, K in ((2 * I, H), (H, I))
    ]

    def step(way: str | None) -> None:
        routing = route(index, E)
        silu_experts(x, weights, routing, up, down, *low, compute_dtype=dtype, way=way).sum().backward()

    step(way)  # kernels are compiled
    step("reference")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(way)
        with pytest.raises(RuntimeError, match="synchronizing"):
            step("reference")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert low[0].b_ENR.grad.abs().sum() > 0


def test_only_experts_with_rows_are_read() -> None:
    """The others' weights are no numbers here, and nobody notices."""
    counts = COUNTS["one"]
    stack, x, _, offsets = operands(FORMATS[0], counts, 0, 64, 128, torch.bfloat16, transposed=False)
    poisoned = PackedStack(stack.fmt, stack.shape, stack.data, stack.absmax.clone())
    poisoned.absmax.view(torch.float32)[[0, 1, 3]] = float("nan")
    mine = packed_linear(x, poisoned, offsets, way="in_product")
    assert torch.equal(mine, packed_linear(x, stack, offsets, way="in_product"))


def test_more_than_two_to_the_31_elements() -> None:
    shape = StackShape(80, 4096, 8192)  # 2.7e9 weights
    stack = PackedStack.empty(PackFormat("nf4"), shape, "cuda")
    stack.data.fill_(0x7F)  # zero and one, in turns
    stack.absmax.view(torch.float32).fill_(2.0)
    x = torch.randn(3, 8192, device="cuda").bfloat16()
    offsets = torch.zeros(80, dtype=torch.int32, device="cuda")
    offsets[79] = 3
    found = packed_linear(x, stack, offsets, way="in_product")
    wanted = 2 * x[:, 1::2].double().sum(1, keepdim=True).expand_as(found)
    assert off(found, wanted) < 0.01


def test_what_is_asked_for_and_cannot_be() -> None:
    stack, x, _, offsets = operands(FORMATS[0], COUNTS["one"], 0, 64, 128, torch.float32, transposed=False)
    with pytest.raises(
        ConfigurationError, match=r"not in torch\.float64. Possible here: reference, workspace"
    ):
        packed_linear(x.double(), stack, offsets, way="in_product")


def test_captured_in_a_graph_it_computes_the_same() -> None:
    """Offsets change between replays: the grid has room for any."""
    stack, x, _, offsets = operands(FORMATS[1], [16, 0, 16, 0], 0, 256, 512, torch.bfloat16, transposed=False)

    def step() -> torch.Tensor:
        return packed_linear(x, stack, offsets, way="in_product")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for counts in ([16, 0, 16, 0], [1, 30, 0, 1], [0, 0, 0, 32]):
        offsets.copy_(torch.tensor(counts).cumsum(0))
        graph.replay()
        assert torch.equal(captured, step()), counts
