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
