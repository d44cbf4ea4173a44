"""The Hopper kernel: its weights bit for bit, its products no further off than a workspace's."""

import itertools
import threading

import pytest
import torch

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import ways
from fourfold.kernels.cuda.hopper import hopper_product
from fourfold.kernels.decode import decode
from fourfold.kernels.linear import empty_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="not a Hopper GPU"
    ),
]
NF4 = PackFormat("nf4", 64, True)
FORMATS = [NF4, PackFormat("nf4"), PackFormat("fp4", 128), PackFormat("nf4", 256, True), PackFormat("int8")]
KINDS = [*FORMATS, "plain", "plain, stored transposed"]
# Rows of each expert: none, one, around the sizes of tiles, more than a tile, no multiple of anything.
SKEWED = [0, 1, 63, 64, 65, 200, 0, 257, 600, 3, 0, 128]
ONE = [*[0] * 11, 5]


def made(kind: PackFormat | str, N: int, K: int, dtype: torch.dtype) -> PackedStack | PlainStack:
    E = len(SKEWED)
    w_ENK = torch.randn(E, N, K, device="cuda") * K**-0.5
    if isinstance(kind, PackFormat):
        return pack_stack(PackedStack.empty(kind, StackShape(E, N, K, 2), "cuda"), w_ENK, "w")
    data = w_ENK.to(dtype)
    if "transposed" in kind:
        data = data.transpose(1, 2).contiguous().transpose(1, 2)
    return PlainStack(StackShape(E, N, K), data)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products(kind: PackFormat | str, transposed: bool) -> None:
    torch.manual_seed(0)
    # Last: columns of the result that fill half a tile, or one block of a cluster's two.
    sizes = [(256, 512, SKEWED), (192, 768, SKEWED), (320, 256, ONE)]
    for (N, K, counts), dtype, R in itertools.product(
        sizes, (torch.bfloat16, torch.float16), (0, 8, 16, 72, 136)
    ):
        stack = made(kind, N, K, dtype)
        offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
        S, (C, M) = int(offsets[-1]), (N, K) if transposed else (K, N)
        x = empty_rows(torch.empty(0, device="cuda", dtype=dtype), S, C, R).fill_(float("nan"))[:, : C + R]
        x.copy_(torch.randn(S, C + R, device="cuda"))
        shape = (len(counts), R, K) if transposed else (len(counts), N, R)
        factor = (torch.randn(shape, device="cuda") * max(R, 1) ** -0.5).to(dtype) if R else None
        problem = ways.problem(x, stack, R, transposed=transposed)
        assert ways.choose(problem, "hopper") == "hopper"
        found = hopper_product(x, stack, offsets, factor, transposed=transposed)
        if factor is not None:  # low-rank columns that are a matrix of their own
            own, low = x[:, :C].clone(), x[:, C:].clone()
            apart = hopper_product(own, stack, offsets, factor, transposed=transposed, low_SR=low)
            assert torch.equal(apart, found)
        found = found.double()
        w = decode(stack, dtype).double()
        start = 0
        for e, stop in enumerate(offsets.tolist()):
            rows = x[start:stop].double()
            wanted = rows[:, :C] @ (w[e] if transposed else w[e].T)
            if factor is not None:
                wanted += rows[:, C:] @ (factor[e].double() if transposed else factor[e].double().T)
            rounded = wanted.to(dtype).double()
            error, allowed = (found[start:stop] - wanted).norm(), (rounded - wanted).norm()
            # fp32 sums add a little to the one rounding of the result
            assert error <= 1.02 * allowed, (N, K, dtype, R, e, float(error / allowed))
            start = stop
        assert found.shape == (S, M)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_weights_are_the_decoded_ones_bit_for_bit(kind: PackFormat, transposed: bool) -> None:
    stack = made(kind, 256, 256, torch.bfloat16)
    E = stack.shape.experts
    offsets = torch.arange(256, 256 * E + 1, 256, device="cuda").int()
    eye = torch.eye(256, device="cuda", dtype=torch.bfloat16).repeat(E, 1)
    found = hopper_product(eye, stack, offsets, transposed=transposed).view(E, 256, 256)
    wanted = decode(stack, torch.bfloat16)
    assert torch.equal(found, wanted if transposed else wanted.transpose(1, 2))


def test_no_rows() -> None:
    stack = made(NF4, 256, 512, torch.bfloat16)
    none = torch.zeros(stack.shape.experts, device="cuda", dtype=torch.int32)
    x = torch.empty(0, 512, device="cuda", dtype=torch.bfloat16)
    assert hopper_product(x, stack, none, transposed=False).shape == (0, 256)


def test_more_experts_than_a_warp_counts_at_a_time() -> None:
    torch.manual_seed(0)
    E = 300
    w = torch.randn(E, 64, 64, device="cuda", dtype=torch.bfloat16) / 8
    counts = torch.randint(0, 90, (E,), device="cuda")
    offsets = counts.cumsum(0).int()
    x = torch.randn(int(offsets[-1]), 64, device="cuda", dtype=torch.bfloat16)
    found = hopper_product(x, PlainStack(StackShape(E, 64, 64), w), offsets, transposed=False)
    expert = torch.repeat_interleave(torch.arange(E, device="cuda"), counts)
    wanted = torch.bmm(x.float().unsqueeze(1), w[expert].float().transpose(1, 2)).squeeze(1)
    assert (found - wanted).norm() < 0.003 * wanted.norm()


def few_rows():
    """Experts 2 and 5 have rows, the others are poisoned."""
    stack = made(NF4, 256, 512, torch.bfloat16)
    counts = [0, 0, 3, 0, 0, 70, *[0] * 6]
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
    return stack, offsets, torch.randn(73, 512, device="cuda").bfloat16()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_without_rows_are_not_read(transposed: bool) -> None:
    stack, offsets, x = few_rows()
    x = torch.randn(73, 256, device="cuda").bfloat16() if transposed else x
    wanted = hopper_product(x, stack, offsets, transposed=transposed)
    stack.absmax_offset[[0, 1, 3, 4, 6, 11]] = torch.tensor(float("nan"), device="cuda").view(torch.int32)
    assert torch.equal(hopper_product(x, stack, offsets, transposed=transposed), wanted)


def test_a_thread_without_a_context_of_its_own() -> None:
    stack, offsets, x = few_rows()
    wanted = hopper_product(x, stack, offsets, transposed=False)
    torch.cuda.synchronize()
    found: list[torch.Tensor | BaseException] = []

    def work() -> None:
        try:
            found.append(hopper_product(x, stack, offsets, transposed=False))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert isinstance(found[0], torch.Tensor), found
    assert torch.equal(found[0], wanted)


def test_rows_that_lie_apart() -> None:
    stack, offsets, x = few_rows()
    wanted = hopper_product(x, stack, offsets, transposed=False)
    apart = torch.zeros(73, 1024, device="cuda", dtype=torch.bfloat16)[:, ::2].copy_(x)
    assert torch.equal(hopper_product(apart, stack, offsets, transposed=False), wanted)


def test_in_a_graph_with_other_offsets() -> None:
    stack, offsets, x = few_rows()
    hopper_product(x, stack, offsets, transposed=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = hopper_product(x, stack, offsets, transposed=False)
    offsets.copy_(torch.tensor([0, 40, 40, 40, 41, *[73] * 7], device="cuda"))
    graph.replay()
    assert torch.equal(found, hopper_product(x, stack, offsets, transposed=False))
