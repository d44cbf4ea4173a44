"""Tensors on a card that is not the current one: kernels must run there, in the order of its stream."""

import pytest
import torch

from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import combine, dispatch, route
from fourfold.kernels.cuda.few_rows import few_rows_product
from fourfold.kernels.decode import decode

pytestmark = [pytest.mark.multigpu]
A_WHILE = 200_000_000  # cycles; a tenth of a second


def late(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, written on the other card only after a while: who does not wait reads NaN."""
    result = torch.full_like(tensor, float("nan"), device="cuda:1")
    with torch.cuda.device(1):
        torch.cuda._sleep(A_WHILE)
        result.copy_(tensor, non_blocking=True)
    return result


@pytest.mark.parametrize("fmt", [PackFormat("nf4", 64, True), PackFormat("fp4"), PackFormat("int8")], ids=str)
def test_decoding_on_another_card(fmt: PackFormat) -> None:
    stack = pack_stack(PackedStack.empty(fmt, StackShape(4, 64, 256), "cpu"), torch.randn(4, 64, 256), "w")
    torch.cuda.set_device(0)
    moved = PackedStack.from_tensors(fmt, stack.shape, {s: t.to("cuda:1") for s, t in stack.tensors()})
    assert torch.equal(decode(moved, torch.bfloat16).cpu(), decode_stack(stack, torch.bfloat16))


def test_few_rows_on_another_card() -> None:
    torch.cuda.set_device(0)
    fmt, shape = PackFormat("nf4", 64, True), StackShape(4, 64, 256)
    stack = pack_stack(PackedStack.empty(fmt, shape, "cpu"), torch.randn(4, 64, 256), "w")
    moved = PackedStack.from_tensors(fmt, shape, {s: t.to("cuda:1") for s, t in stack.tensors()})
    x, offsets = torch.randn(4, 256).bfloat16(), torch.tensor([1, 2, 3, 4]).int()
    few_rows_product(x.to("cuda:1"), moved, offsets.to("cuda:1"))  # compiles it
    found = few_rows_product(late(x), moved, offsets.to("cuda:1")).cpu()
    wanted = torch.einsum("ek,enk->en", x.double(), decode_stack(stack, torch.bfloat16).double())
    assert (found.double() - wanted).norm() <= 0.003 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_on_another_card(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.cuda.set_device(0)
    x = torch.randn(64, 128).to(dtype)
    index = torch.randint(8, (64, 2))
    weights = torch.rand(64, 2)

    def run(x: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.requires_grad_()
        routing = route(index.to(device), 8)
        y = combine(dispatch(x, routing), weights.to(device), routing, x.dtype)
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach().cpu(), x.grad.cpu()

    wanted = run(x.clone(), "cpu")
    run(x.to("cuda:1"), "cuda:1")  # compiles the kernels
    for ours, right in zip(run(late(x), "cuda:1"), wanted, strict=True):
        off = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        assert torch.allclose(ours, right, **off)
