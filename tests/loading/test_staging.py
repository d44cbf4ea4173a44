"""Slices that a loader hands out as functions are recognised, grouped, and read in order."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import spawn_materialize

from fourfold.loading import reading, staging
from fourfold.loading.staging import deferred, groups_of, read_staged


def test_a_loaders_function_is_recognised(tmp_path) -> None:
    """Under every supported transformers; without it loading is right, and slower."""
    save_file({"w": torch.ones(3, 5)}, tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        found = deferred(spawn_materialize(None, file.get_slice("w"), "cuda:1", torch.bfloat16))
        assert found is not None
        assert (found.device, found.dtype) == (torch.device("cuda:1"), torch.bfloat16)
        assert (found.shape, found.nbytes) == ((3, 5), 30)


@pytest.mark.parametrize(
    "source",
    [
        lambda: torch.ones(2),
        torch.ones(2),
        spawn_materialize(None, torch.ones(2), None, torch.float32),
        spawn_materialize(None, torch.ones(2), "cpu", None),
        spawn_materialize(None, torch.ones(2, device="meta"), "cpu", torch.float32),
        spawn_materialize(None, torch.ones(2), "cpu", torch.float32, sharding_op=object()),
    ],
    ids=["own", "tensor", "no device", "no dtype", "elsewhere", "sharded"],
)
def test_what_does_something_else_is_called(source) -> None:
    assert deferred(source) is None


def test_groups_are_neighbours_of_one_kind() -> None:
    def slices(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
        sources = (spawn_materialize(None, torch.ones(shape), "cpu", dtype) for _ in range(count))
        return [deferred(source) for source in sources]

    assert list(groups_of([], 48)) == []
    mixed = slices(7, (4,)) + slices(2, (2, 2)) + slices(2, (2, 2), torch.bfloat16) + slices(2, (64,))
    groups = list(groups_of(mixed, 3 * 16))
    assert [len(group) for group in groups] == [3, 3, 1, 2, 2, 1, 1]
    assert [item for group in groups for item in group] == mixed


def test_slices_come_in_order_in_their_dtype_a_bounded_number_ahead(tmp_path, monkeypatch) -> None:
    tensors = {f"w{i:02}": torch.randn(8, 16) for i in range(40)}
    save_file(tensors, tmp_path / "f.safetensors")
    monkeypatch.setattr(staging, "SLICES_GROUP_BYTES", 3 * 8 * 16 * 2)
    begun, lock, read_group = [0], threading.Lock(), staging.read_group

    def counted(group, stream):
        with lock:
            begun[0] += len(group)
        return read_group(group, stream)

    monkeypatch.setattr(staging, "read_group", counted)
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        sources = [spawn_materialize(None, file.get_slice(name), "cpu", torch.bfloat16) for name in tensors]
        known = [deferred(source) for source in sources]
        for number, tensor in enumerate(read_staged(known, 4)):
            assert torch.equal(tensor, tensors[f"w{number:02}"].bfloat16())
            with lock:
                assert begun[0] <= number + 3 * staging.GROUPS_AHEAD
    assert number == 39


def test_what_reading_raises_comes_out() -> None:
    class Broken:
        def get_shape(self) -> list[int]:
            return [2]

        def __getitem__(self, _) -> torch.Tensor:
            raise OSError("the disk is gone")

    good = spawn_materialize(None, torch.ones(2), "cpu", torch.float32)
    bad = spawn_materialize(None, Broken(), "cpu", torch.float32)
    with pytest.raises(OSError, match="the disk is gone"):
        list(read_staged([deferred(good), deferred(bad)], 2))


def test_parameters_are_read_without_their_gradients() -> None:
    """As from a state dict that a caller hands in; threads know nothing of the caller's `no_grad`."""
    sources = [spawn_materialize(None, torch.nn.Parameter(torch.ones(2)), "cpu", torch.float16)] * 3
    read = list(read_staged([deferred(source) for source in sources], 2))
    assert len(read) == 3
    assert not any(tensor.requires_grad for tensor in read)


def test_a_cpu_reads_views_of_the_file(monkeypatch) -> None:
    monkeypatch.setattr(reading, "read_staged", lambda *_: pytest.fail("copied"))
    w = torch.ones(4)
    (read,) = reading.read_slices([spawn_materialize(None, w, "cpu", torch.float32)])
    assert read.data_ptr() == w.data_ptr()


def test_a_host_without_pinned_memory_reads_all_the_same(monkeypatch) -> None:
    empty = torch.empty

    def refuse(*args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    w = torch.randn(3, 4)
    group = [deferred(spawn_materialize(None, w, "cpu", torch.bfloat16))]
    assert torch.equal(staging.read_group(group, object())[0], w.bfloat16())
