"""Products of few rows an expert: weights bit for bit, sums rounded once, whatever the numbers of rows."""

import itertools

import pytest
import torch

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import ways
from fourfold.kernels.cuda.few_rows import few_rows_product
from fourfold.kernels.decode import decode

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_memory")]
NF4 = PackFormat("nf4", 64, True)
FORMATS = [
    NF4,
    PackFormat("nf4"),
    PackFormat("nf4", 32),
    PackFormat("fp4", 128),
    PackFormat("nf4", 256, True),
    PackFormat("int8"),
]
# Rows of each expert: none, one, a tile and more, more than share what is decoded; fewer rows than experts.
COUNTS = [[0, 1, 8, 9, 24, 25, 0, 60], [1], [*[0] * 300, 1, *[0] * 40, 2]]


def made(fmt: PackFormat, E: int, N: int, K: int) -> PackedStack:
    w_ENK = torch.randn(E, N, K, device="cuda") * K**-0.5
    return pack_stack(PackedStack.empty(fmt, StackShape(E, N, K, 2), "cuda"), w_ENK, "w")


@pytest.mark.parametrize("counts", COUNTS, ids=("skewed", "one row", "many experts"))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products(fmt: PackFormat, counts: list[int]) -> None:
    torch.manual_seed(0)
    # Columns of W: several pieces of every warp; one piece alone; blocks that are padded behind the row.
    sizes = [(64, 2048), (100, 64), (36, 1104)]
    for (N, K), dtype, R in itertools.product(sizes, (torch.bfloat16, torch.float16), (0, 2, 10, 24, 72)):
        stack = made(fmt, len(counts), N, K)
        offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
        S = int(offsets[-1]) + 3  # the last are of no expert
        around = torch.full((S, K + R + -(K + R) % 8 + 16), float("nan"), device="cuda", dtype=dtype)
        x = around[:, : K + R]
        x.copy_(torch.randn(S, K + R, device="cuda"))
        factor = (torch.randn(len(counts), N, R, device="cuda") * R**-0.5).to(dtype) if R else None
        assert ways.choose(ways.problem(x, stack, R), "few_rows") == "few_rows"
        found = few_rows_product(x, stack, offsets, factor)
        assert found.shape == (S, N)
        if factor is not None:  # low-rank columns that are a matrix of their own
            own, low = x[:, :K].clone(), x[:, K:].clone()
            apart = few_rows_product(own, stack, offsets, factor, low)
            assert torch.equal(apart[:-3], found[:-3])
        assert found[-3:].isnan().all()  # (memory is poisoned) not written
        w, start = decode(stack, dtype), 0
        for e, stop in enumerate(offsets.tolist()):
            if stop > start:
                rows = x[start:stop].double()
                wanted = rows[:, :K] @ w[e].double().T
                if factor is not None:
                    wanted += rows[:, K:] @ factor[e].double().T
                error = (found[start:stop].double() - wanted).norm()
                allowed = (wanted.to(dtype).double() - wanted).norm()
                # fp32 sums add a little to the one rounding of the result
                assert error <= 1.02 * allowed + 2e-6 * wanted.norm(), (
                    N,
                    K,
                    dtype,
                    R,
                    e,
                    float(error / allowed),
                )
            start = stop


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_weights_are_the_decoded_ones_bit_for_bit(fmt: PackFormat) -> None:
    E, N, K = 3, 256, 256
    stack = made(fmt, E, N, K)
    offsets = torch.arange(K, K * E + 1, K, device="cuda").int()
    eye = torch.eye(K, device="cuda", dtype=torch.bfloat16).repeat(E, 1)
    found = few_rows_product(eye, stack, offsets).view(E, K, N)
    assert torch.equal(found, decode(stack, torch.bfloat16).transpose(1, 2))


def test_experts_without_rows_are_not_read() -> None:
    E, N, K = 8, 128, 512
    stack = made(NF4, E, N, K)
    offsets = torch.tensor([0, 0, 3, 3, 3, 4, 4, 4], device="cuda").int()
    x = torch.randn(4, K, device="cuda", dtype=torch.bfloat16)
    before = few_rows_product(x, stack, offsets)
    assert stack.absmax_offset is not None
    for e in (0, 1, 3, 4, 6, 7):
        stack.absmax_offset.view(torch.int32)[e] = 0x7FC00000  # NaN
    assert torch.equal(few_rows_product(x, stack, offsets), before)


def test_no_rows() -> None:
    stack = made(NF4, 4, 128, 64)
    none = torch.zeros(4, device="cuda", dtype=torch.int32)
    assert few_rows_product(torch.empty(0, 64, device="cuda", dtype=torch.bfloat16), stack, none).shape == (
        0,
        128,
    )


def test_what_does_not_fit_is_refused() -> None:
    stack = made(NF4, 4, 128, 64)
    x = torch.zeros(4, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"int32, not torch\.int64"):
        few_rows_product(x, stack, torch.arange(1, 5, device="cuda"))
    with pytest.raises(ValueError, match="on cpu"):
        few_rows_product(x, stack, torch.arange(1, 5).int())
