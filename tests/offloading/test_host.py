"""Host memory: whole pages, pinned or said not to be, and enough of it or an error with the figures."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import offloading
import own_forward
import tiny
from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.offloading import host
from fourfold.offloading.api import offload, onload
from fourfold.offloading.host import HostMemory, available_bytes, check_room
from offloading import Driver

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a driver")


@without_cuda
def test_pinned_pages_are_released_with_the_last_tensor(driver: Driver) -> None:
    memory = HostMemory()
    whole = memory.empty((3, 5), torch.int32)
    part = whole[1:]
    assert whole.is_pinned()
    assert memory.unpinned is None
    assert list(driver.pages.values()) == [60]
    del whole
    gc.collect()
    assert driver.pages
    assert part.shape == (2, 5)
    del part
    gc.collect()
    assert not driver.pages


@without_cuda
def test_a_model_goes_to_pinned_memory_and_back(driver: Driver) -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = offload(model)
    assert report.pinned
    assert sum(driver.pages.values()) == report.host_bytes
    assert report.to_dict()["pinned"]
    assert torch.equal(tiny.logits(model), expected)
    found = model.state_dict()
    assert list(found) == list(stored)
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    offload(model, budget=report.host_bytes)  # (again, in place: what is pinned is not moved)
    assert sum(driver.pages.values()) == report.host_bytes


@without_cuda
def test_where_pinning_fails_pageable_memory_is_taken_and_said_so(driver: Driver) -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    driver.limit = 20_000
    report = offload(model)
    assert not report.pinned
    assert 0 < len(driver.pages) < 5 * 8
    assert "cudaHostRegister returned 2 (out of memory)" in str(report)
    assert torch.equal(tiny.logits(model), expected)


@without_cuda
def test_pageable_experts_need_no_room_a_second_time(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloading.packed_model("qwen3_moe")
    driver.limit = 0
    report = offload(model)
    monkeypatch.setattr(host, "available_bytes", lambda: report.host_bytes // 2)
    assert offload(model).host_bytes == report.host_bytes


@without_cuda
def test_pinned_memory_or_none(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    offload(model, pin=False)
    driver.limit = 60_000
    with pytest.raises(ConfigurationError, match=r"pin=True: .* could not be pinned.*ulimit -l"):
        offload(model, pin=True)
    assert not driver.pages
    assert all(m.fourfold_host is not None for m in model.modules() if isinstance(m, PackedExperts))
    assert torch.equal(tiny.logits(model), expected)
    onload(model)
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match="pin=True: there is no CUDA device"):
        offload(model, pin=True)
    assert all(m.fourfold_host is None for m in model.modules() if isinstance(m, PackedExperts))
    tiny.logits(model)


@pytest.mark.parametrize("shape", [(), (0,), (7, 3), (1, 4096)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_memory_is_written_and_read_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with torch.inference_mode():
        tensor = HostMemory(pin=False).empty(shape, dtype)
    assert tensor.shape == shape
    assert not tensor.is_inference()
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))
    assert torch.equal(tensor.clone(), tensor)


def test_the_smallest_of_what_is_free_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)

    (tmp_path / "info").write_text("MemTotal: 900 kB\nMemAvailable:   700 kB\n")
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "info")
    group = (tmp_path, "memory.max", "memory.current", ("inactive_file", "active_file"))
    monkeypatch.setattr(host, "_GROUPS", (group,))
    assert available_bytes() == 700 * 1024  # (there is no group)
    write(memory_max="max\n", memory_current="5\n", memory_stat="anon 5\n")
    assert available_bytes() == 700 * 1024
    write(memory_max="600000\n", memory_current="400000\n")
    assert available_bytes() == 200_000
    # What the group has read of files counts as its use, and is dropped when memory is asked for.
    write(memory_stat="anon 5\ninactive_file 20000\nactive_file 1000\n")
    assert available_bytes() == 221_000
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(host, "_GROUPS", ())
    assert available_bytes() is None
    check_room(2**60, "they")  # (nobody knows better)


def test_too_little_host_memory_is_found_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourfold.offloading import api

    monkeypatch.setattr(host, "available_bytes", lambda: 3 * 2**29)
    with pytest.raises(ConfigurationError, match=r"they take 2\.00 GiB .* 1\.50 GiB can be had.*budget"):
        check_room(2**31, "they")
    model = offloading.packed_model("qwen3_moe")
    asked: list[int] = []
    monkeypatch.setattr(api, "check_room", lambda nbytes, what: asked.append(nbytes))
    offload(model)
    assert asked == [0]  # (on a CPU they are there already)
    onload(model)


@without_cuda
def test_memory_of_a_deleted_model_is_not_counted_as_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloading.packed_model("qwen3_moe", layers=2)
    offload(model)
    tiny.logits(model)
    gone = weakref.ref(next(m for m in model.modules() if isinstance(m, PackedExperts)))
    monkeypatch.setattr(host, "available_bytes", lambda: 1000 if gone() is not None else 2**40)
    del model
    host.check_room(10_000, "other experts")
    assert gone() is None


def test_what_is_to_be_copied_is_asked_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from fourfold.offloading import api

    asked: list[int] = []
    monkeypatch.setattr(api, "check_room", lambda nbytes, what: asked.append(nbytes))
    model = offloading.packed_model("qwen3_moe")
    for _ in range(2):
        report = offload(model)
    assert asked == [report.host_bytes, 0]
    monkeypatch.setattr(host, "available_bytes", lambda: report.host_bytes - 1)
    monkeypatch.setattr(api, "check_room", check_room)
    another = offloading.packed_model("qwen3_moe")
    with pytest.raises(ConfigurationError, match="packed experts that are to be copied there take"):
        offload(another)
    assert all(m.fourfold_host is None for m in another.modules() if isinstance(m, PackedExperts))


def test_adapters_and_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors made after offloading lie where experts are computed, not where their tensors are."""
    model = offloading.packed_model("qwen3_moe")
    offload(model)
    for module in model.modules():
        if isinstance(module, PackedExperts):
            host_experts: Any = module.fourfold_host
            host_experts.streamer.device = torch.device("meta")
    adapted = own_forward.lora(model)
    factors = [p for n, p in adapted.named_parameters() if "experts" in n and "lora_" in n]
    assert factors
    assert all(p.is_meta for p in factors)


@without_cuda
def test_torch_pins_what_the_system_does_not(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []

    def by_torch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        given.append(torch.empty(shape, dtype=dtype))
        driver.pages[given[-1].data_ptr()] = given[-1].nbytes
        return given[-1]

    driver.limit = 0
    monkeypatch.setattr(host, "_pinned_by_torch", by_torch)
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    assert offload(model, pin=True).pinned
    packed = [p for m in model.modules() if isinstance(m, PackedExperts) for p in m.parameters(recurse=False)]
    assert {p.data_ptr() for p in packed} == {t.data_ptr() for t in given}
    assert torch.equal(tiny.logits(model), expected)


def test_torch_is_not_asked_where_its_rounding_leaves_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 1999)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("it was asked"))
    assert host._pinned_by_torch((1000,), torch.uint8) is None
