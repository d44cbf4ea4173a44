"""The product with decoding inside against plain torch (on the CPU through Triton's interpreter)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import needs
from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.plain import PlainStack
from fourfold.formats.quantize import pack_stack

triton = needs.triton()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    PackFormat("nf4"),
    PackFormat("nf4", 64, True),
    PackFormat("nf4", 32, True),
    PackFormat("fp4", 128),
    PackFormat("fp4", 4096, True),
    PackFormat("int8"),
    None,
]
COUNTS = {
    "odd": [17, 1, 0, 37],
    "one expert": [0, 0, 5, 0],
    "one row": [0, 1, 0, 0],
}


def made(fmt: PackFormat | None, E: int, N: int, K: int) -> PackedStack | PlainStack:
    w_ENK = torch.randn(E, N, K, device=DEVICE) * 0.1
    shape = StackShape(E, N, K, parts=2)
    if fmt is None:
        return PlainStack(shape, w_ENK.transpose(1, 2).contiguous().transpose(1, 2))  # (stored in by out)
    return pack_stack(PackedStack.empty(fmt, shape, DEVICE), w_ENK, "w")


def weights(stack: PackedStack | PlainStack) -> torch.Tensor:
    return stack.data if isinstance(stack, PlainStack) else decode_stack(stack, torch.float32)


def wanted(x, w_ENK, h, factor, counts: Sequence[int], *, transposed: bool) -> torch.Tensor:
    pieces, start = [], 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        y = x[rows] @ (w_ENK[e] if transposed else w_ENK[e].T)
        if h is not None:
            y = y + h[rows] @ (factor[e] if transposed else factor[e].T)
        pieces.append(y)
        start += count
    return torch.cat(pieces)


def case(fmt, counts: Sequence[int], rank: int, *, transposed: bool, N: int = 70, K: int = 200):
    E, S = len(counts), sum(counts)
    stack = made(fmt, E, N, K)
    x = torch.randn(S, N if transposed else K, device=DEVICE)
    factor = torch.randn((E, rank, K) if transposed else (E, N, rank), device=DEVICE)
    h = torch.randn(S, rank, device=DEVICE)
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    return stack, x, (h, factor) if rank else (None, None), offsets


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 5, 16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equals_plain_torch(fmt, counts: list[int], rank: int, transposed: bool) -> None:
    from fourfold.kernels.product_triton import product_triton

    stack, x, (h, factor), offsets = case(fmt, counts, rank, transposed=transposed)
    found = product_triton(x, stack, offsets, h, factor, transposed=transposed)
    exact = wanted(x, weights(stack), h, factor, counts, transposed=transposed)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fmt", FORMATS[:-1], ids=str)
def test_weights_are_the_bits_that_decoding_gives(fmt: PackFormat, transposed: bool) -> None:
    """Rows of the identity pick single weights: nothing is summed, so nothing but decoding can differ."""
    from fourfold.kernels.product_triton import product_triton

    stack = made(fmt, 2, 40, 100)
    w_ENK = decode_stack(stack, torch.float32)
    eye = torch.eye(40 if transposed else 100, device=DEVICE)
    offsets = torch.tensor([len(eye), 2 * len(eye)], dtype=torch.int32, device=DEVICE)
    found = product_triton(eye.repeat(2, 1), stack, offsets, transposed=transposed)
    picked = found.view(2, len(eye), -1)
    assert torch.equal(picked if transposed else picked.transpose(1, 2), w_ENK)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fmt", [FORMATS[1], FORMATS[5], None], ids=str)
def test_every_tile(fmt: PackFormat | None, transposed: bool) -> None:
    """Each set of tiles, on sizes that none of them divides; low-rank sums of several steps."""
    from fourfold.kernels.product_triton import FP32_TILES, TILES, product_triton

    counts = [131, 0, 3]
    stack, x, (h, factor), offsets = case(fmt, counts, 40, transposed=transposed, N=150, K=280)
    exact = wanted(x, weights(stack), h, factor, counts, transposed=transposed)
    is_4bit = fmt is not None and fmt.is_4bit
    for tiles in (*TILES[transposed, is_4bit], FP32_TILES[transposed]):
        found = product_triton(x, stack, offsets, h, factor, transposed=transposed, tiles=tiles)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=5e-5, msg=lambda m, t=tiles: f"{t}: {m}")


@pytest.mark.parametrize("transposed", [False, True])
def test_operands_may_lie_apart(transposed: bool) -> None:
    """Rows with room behind them, low-rank columns in that room, factors of any strides, no rows at all."""
    from fourfold.kernels.product_triton import product_triton

    stack, x, (h, factor), offsets = case(FORMATS[1], COUNTS["odd"], 5, transposed=transposed)
    columns = x.shape[1]
    wide = torch.full((len(x), columns + 9), float("nan"), device=DEVICE)
    wide[:, :columns], wide[:, columns : columns + 5] = x, h
    strided = factor.transpose(1, 2).contiguous().transpose(1, 2)
    found = product_triton(
        wide[:, :columns], stack, offsets, wide[:, columns : columns + 5], strided, transposed=transposed
    )
    assert torch.equal(found, product_triton(x, stack, offsets, h, factor, transposed=transposed))
    none = product_triton(x[:0], stack, offsets * 0, h[:0], factor, transposed=transposed)
    assert none.shape == (0, found.shape[1])


def test_scales_of_the_neighbouring_expert_show() -> None:
    """The comparisons above can fail."""
    from fourfold.kernels.product_triton import product_triton

    stack, x, _, offsets = case(FORMATS[0], COUNTS["odd"], 0, transposed=False)
    rolled = PackedStack(stack.fmt, stack.shape, stack.data, stack.absmax.roll(1, 0))
    exact = wanted(x, weights(stack), None, None, COUNTS["odd"], transposed=False)
    assert (product_triton(x, rolled, offsets, transposed=False) - exact).norm() > 1e-2 * exact.norm()


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize(("M", "N"), [(5, 130), (130, 16), (70, 70)])
@pytest.mark.parametrize("counts", [*COUNTS.values(), [0, 0, 0, 0]])
def test_sums_over_an_experts_rows(counts: list[int], M: int, N: int) -> None:
    from fourfold.kernels.grouped import grouped_outer
    from fourfold.kernels.grouped_triton import grouped_outer_triton

    x, y = torch.randn(sum(counts), M + 3, device=DEVICE)[:, :M], torch.randn(sum(counts), N, device=DEVICE)
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    found = grouped_outer_triton(x, y, offsets)
    torch.testing.assert_close(found, grouped_outer(x, y, offsets), rtol=1e-5, atol=2e-5)
