"""Matrices packed by one launch have the bytes that bitsandbytes makes of each alone."""

import pytest
import torch

import fourfold.formats.quantize as quantize
from bnb_reference import alone
from fourfold.errors import CheckpointError
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.quantize import Packer, pack_stack

FORMATS = [
    PackFormat("nf4"),
    PackFormat("nf4", 64, True),
    PackFormat("fp4", 128, True),
    PackFormat("fp4", 32),
    PackFormat("int8"),
]
# Rows, columns: 256 blocks a matrix of 128 x 128; 42 blocks, and rows that are padded.
SHAPES = [(128, 128), (42, 64), (24, 100)]


def assert_as_if_alone(stack: PackedStack, w_ENK: torch.Tensor) -> None:
    E, P = stack.shape.experts, stack.shape.parts
    for suffix, tensor in stack.tensors():
        slots = tensor.reshape(E * P, -1)
        for number, matrix in enumerate(m for w_NK in w_ENK for m in w_NK.chunk(P)):
            assert torch.equal(slots[number], alone(matrix, stack.fmt)[suffix].flatten()), (suffix, number)


def empty(fmt: PackFormat, shape: StackShape, device: str = "cpu") -> PackedStack:
    stack = PackedStack.empty(fmt, shape, device)
    for _, tensor in stack.tensors():
        tensor.fill_(77)
    return stack


@pytest.mark.parametrize("per_batch", [1, 3, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_batches_equal_bitsandbytes_matrix_by_matrix(
    fmt: PackFormat, shape: tuple[int, int], dtype: torch.dtype, per_batch: int, monkeypatch
) -> None:
    rows, columns = shape
    w = (torch.randn(5, 2 * rows, columns) * torch.logspace(-2, 1, 5)[:, None, None]).to(dtype)
    w[2, :3] = 0
    monkeypatch.setattr(quantize, "BATCH_BYTES_ELSEWHERE", per_batch * rows * columns * w.itemsize)
    packer = Packer(empty(fmt, StackShape(5, 2 * rows, columns, 2)), "w")
    for expert in range(5):
        for part, matrix in enumerate(w[expert].chunk(2)):
            packer.pack_(expert, part, matrix.clone())
    assert_as_if_alone(packer.finish(), w)
    assert_as_if_alone(pack_stack(empty(fmt, StackShape(5, 2 * rows, columns, 2)), w, "w"), w)
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_if_alone(pack_stack(empty(fmt, StackShape(5, 2 * rows, columns, 2)), transposed, "w"), w)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_matrices_may_come_in_any_order_and_dtype(fmt: PackFormat, mixed: bool) -> None:
    w = torch.randn(4, 16, 128).bfloat16()
    packer = Packer(empty(fmt, StackShape(4, 16, 128)), "w")
    for expert in (2, 3, 0, 1):
        packer.pack_(expert, 0, w[expert].float() if mixed and expert == 3 else w[expert])
    assert_as_if_alone(packer.finish(), w)


def test_launches_do_not_grow_with_the_number_of_experts(monkeypatch) -> None:
    """On a GPU each operation is a launch of some microseconds, and there are 18,000 matrices in a model."""
    fmt, w = PackFormat("nf4", 64, True), torch.randn(32, 256, 128)
    monkeypatch.setattr(quantize, "BATCH_BYTES_ELSEWHERE", 2**30)

    def operations(experts: int) -> int:
        packer = Packer(empty(fmt, StackShape(experts, 256, 128, 2)), "w")
        matrices = [m.clone() for w_NK in w[:experts] for m in w_NK.chunk(2)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for number, matrix in enumerate(matrices):
                packer.pack_(number // 2, number % 2, matrix)
            packer.finish()
        made = [e for e in profile.events() if e.cpu_parent is None and not is_view(e.name)]
        return len(made)

    def is_view(name: str) -> bool:
        return name in {
            f"aten::{n}" for n in ("view", "slice", "select", "unbind", "squeeze", "to", "reshape")
        }

    few, many = operations(4), operations(32)
    per_matrix = (many - few) / 56
    assert per_matrix == 1  # the mean of its absmax; before there were batches it was 18
    assert few - 8 * per_matrix < 40


@pytest.mark.parametrize("fmt", [PackFormat("nf4"), PackFormat("int8")], ids=str)
@pytest.mark.parametrize("bad", [(1, 9), (3, 0)])
def test_bad_experts_are_named_in_batches_too(fmt: PackFormat, bad: tuple[int, int]) -> None:
    expert, row = bad
    w = torch.randn(4, 16, 64)
    w[expert, row, 3] = float("nan")
    packer = Packer(empty(fmt, StackShape(4, 16, 64, 2)), "experts.w")
    for e in range(4):
        for part, matrix in enumerate(w[e].chunk(2)):
            packer.pack_(e, part, matrix)
    with pytest.raises(CheckpointError, match=rf"experts\.w: weights of expert\(s\) {expert} are"):
        packer.finish()
