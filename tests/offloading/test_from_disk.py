"""Experts that stay in the files of their checkpoint give the very bits of a model that is on its device."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fourfold
import needs
import offloading
import own_forward
import tiny
from fourfold.errors import ConfigurationError
from fourfold.formats import PackFormat
from fourfold.offloading import mapped, read_ahead, streamer
from fourfold.offloading.disk import DiskStreamer
from fourfold.offloading.mapped import region_of
from offloading import Driver, assert_equal, buffered, is_mapped, on_disk, packed_modules, steps

needs.triton()
FORMATS = [PackFormat("nf4"), PackFormat("nf4", 64, True), PackFormat("fp4", 32), PackFormat("int8")]


def compare(
    model: nn.Module, folder: Path, checkpointing: str | None = "non-reentrant", **arguments: Any
) -> None:
    models = [own_forward.lora(m) for m in (copy.deepcopy(model), model)]
    if checkpointing is not None:
        for each in models:
            own_forward.checkpoint_layers_(each, checkpointing == "reentrant")
    resident, ours = models
    on_disk(ours, folder, **arguments)
    assert_equal(steps(ours), steps(resident))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_every_layout_in_every_format(kind: str, fmt: PackFormat, way: str, tmp_path: Path) -> None:
    compare(offloading.packed_model(kind, fmt), tmp_path)


@pytest.mark.parametrize(
    ("checkpointing", "buffers"),
    [(None, 2), ("non-reentrant", 1), ("non-reentrant", 3), ("reentrant", 2), ("reentrant", 1)],
)
def test_every_kind_of_checkpointing(
    checkpointing: str | None, buffers: int, way: str, tmp_path: Path
) -> None:
    compare(offloading.packed_model("qwen3_moe"), tmp_path, checkpointing, buffers=buffers)


@pytest.mark.parametrize("model_type", own_forward.TYPES)
def test_experts_that_keep_their_forward(model_type: str, way: str, tmp_path: Path) -> None:
    if not own_forward.is_known(model_type):
        pytest.skip("this version of transformers has no such model")
    model, _ = own_forward.pair(model_type)
    checkpointing = "non-reentrant" if model.supports_gradient_checkpointing else None
    compare(model.requires_grad_(False), tmp_path, checkpointing, buffers=1)


def test_some_modules_stay_on_the_device(way: str, tmp_path: Path) -> None:
    model = offloading.packed_model("qwen3_moe", layers=7)
    budget = int(0.7 * sum(streamer.Unit([m]).nbytes for m in packed_modules(model)))
    resident = copy.deepcopy(model)
    report = on_disk(model, tmp_path, budget=budget)
    assert report.resident
    assert [is_mapped(m) for m in packed_modules(model)] == [
        m.fourfold_name in report.streamed for m in packed_modules(model)
    ]
    assert torch.equal(tiny.logits(model), tiny.logits(resident))
    every = fourfold.offload(model, device="disk", checkpoint=tmp_path)
    assert not every.resident
    assert is_mapped(model)
    assert torch.equal(tiny.logits(model), tiny.logits(resident))


def test_evaluation_and_generation(way: str, tmp_path: Path) -> None:
    model = own_forward.lora(offloading.packed_model("qwen3_moe")).eval()
    plain = copy.deepcopy(model)
    on_disk(model, tmp_path)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(model(tiny.IDS).logits, plain(tiny.IDS).logits)
    ours, theirs = (m.generate(tiny.IDS, max_new_tokens=5, do_sample=False) for m in (model, plain))
    assert torch.equal(ours, theirs)
    assert_equal(steps(model), steps(plain))


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
def test_decoding_reads_the_experts_that_are_hit(
    fmt: PackFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffered(monkeypatch)
    monkeypatch.setattr(streamer, "WHOLE_BYTES", 16)
    model = tiny.build(tiny.qwen3_moe(num_experts=24, num_experts_per_tok=2, num_hidden_layers=4))
    plain = copy.deepcopy(offloading.pack_(model, fmt))
    report = on_disk(model, tmp_path)
    (made,) = report.streamers
    assert isinstance(made, DiskStreamer)
    with torch.no_grad():
        for ids in (tiny.IDS[:1, :1], tiny.IDS[:1, 4:7], tiny.IDS[1:, 2:4]):
            before = made.read_bytes
            assert torch.equal(model(ids).logits, plain(ids).logits)
            assert 0 < made.read_bytes - before <= report.disk_bytes // 4
        assert report.counts()["parts"] == 3 * 4
        assert torch.equal(model(tiny.IDS).logits, plain(tiny.IDS).logits)
    ours, theirs = (m.generate(tiny.IDS[:, :1], max_new_tokens=6, do_sample=False) for m in (model, plain))
    assert torch.equal(ours, theirs)


def test_modules_are_read_before_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step the order is known: each file is read once a pass, and nothing is guessed wrong."""
    buffered(monkeypatch, late=False)
    model = offloading.packed_model("qwen3_moe", layers=8)
    report = on_disk(model, tmp_path)
    (made,) = report.streamers
    assert isinstance(made, DiskStreamer)
    asked: list[int] = []
    ahead = read_ahead._Reader._ahead
    monkeypatch.setattr(
        read_ahead._Reader, "_ahead", lambda r, regions: (asked.append(1), ahead(r, regions))[1]
    )
    for _ in range(3):
        tiny.logits(model)
    before = made.read_bytes
    for _ in range(4):
        tiny.logits(model)
    assert asked
    assert made.read_bytes - before <= 4 * report.disk_bytes * 1.2
    assert made.engine.staged_bytes <= read_ahead.STAGES * max(unit.nbytes for unit in made.units)


def test_waits_for_the_disk_are_measured_while_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffered(monkeypatch, late=False)
    model = offloading.packed_model("qwen3_moe", layers=6)
    report = on_disk(model, tmp_path)
    original = mapped.MappedFile.read_into

    def slowly(file: mapped.MappedFile, place: memoryview, offset: int) -> None:
        time.sleep(0.002)
        original(file, place, offset)

    monkeypatch.setattr(mapped.MappedFile, "read_into", slowly)
    report.time_waits(True)
    tiny.logits(model)
    waited = report.waited_ms()
    assert waited is not None
    assert waited > 2
    report.time_waits(False)
    tiny.logits(model)
    assert report.waited_ms() == 0


def test_where_there_is_nothing_to_wait_for_nothing_is_said(tmp_path: Path) -> None:
    model = offloading.packed_model("qwen3_moe")
    report = on_disk(model, tmp_path)
    report.time_waits(True)
    tiny.logits(model)
    assert report.waited_ms() is None


def test_on_a_cpu_the_system_is_told_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloading.packed_model("qwen3_moe", layers=4)
    report = on_disk(model, tmp_path)
    assert report.buffer_bytes == report.buffers == 0
    told: list[tuple[Path, int]] = []
    original = mapped.MappedFile.will_need

    def will_need(file: mapped.MappedFile, region: mapped.Region) -> None:
        told.append((file.path, region.offset))
        original(file, region)

    monkeypatch.setattr(mapped.MappedFile, "will_need", will_need)
    tiny.logits(model)
    (made,) = report.streamers
    assert isinstance(made, DiskStreamer)
    later = {(r.file.path, r.offset) for regions in made._regions[1:] for r in regions if r is not None}
    assert later <= set(told)


def test_what_is_written_to_the_model_is_what_the_next_pass_computes_with(way: str, tmp_path: Path) -> None:
    """And never goes to the file."""
    model, other = (offloading.packed_model("qwen3_moe", layers=4) for _ in range(2))
    with torch.no_grad():
        for module in packed_modules(other)[1:3]:
            module.gate_up_proj.random_(0, 256)
    plain = copy.deepcopy(model)
    on_disk(model, tmp_path)
    stored = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    model.load_state_dict(other.state_dict())
    expected = tiny.logits(other)
    assert torch.equal(tiny.logits(model), expected)
    fourfold.offload(model, device="disk")  # (again: what was written to is not taken for the file's)
    assert torch.equal(tiny.logits(model), expected)
    fourfold.offload(model)
    assert not any(is_mapped(m) for m in packed_modules(model))
    assert torch.equal(tiny.logits(model), expected)
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == stored


def test_there_and_back(way: str, tmp_path: Path) -> None:
    model = offloading.packed_model("gpt_oss", layers=4)
    expected, stored = tiny.logits(model), copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    report = on_disk(model, tmp_path)
    assert is_mapped(model)
    packed = [m._parameters[n].data for m in packed_modules(model) for n in m.packed_names()]
    assert report.disk_bytes == sum(tensor.nbytes for tensor in packed if region_of(tensor))
    assert f"experts of {len(report.streamed)} modules on disk" in str(report)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(tiny.logits(model), expected)
    again = fourfold.offload(model)
    assert (again.disk_bytes, is_mapped(model)) == (0, False)
    assert torch.equal(tiny.logits(model), expected)
    fourfold.offload(model, device="disk", checkpoint=tmp_path)
    fourfold.onload(model)
    assert not is_mapped(model)
    assert all(m.fourfold_host is None for m in packed_modules(model))
    assert torch.equal(tiny.logits(model), expected)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_copies_have_memory_of_their_own(way: str, tmp_path: Path) -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    on_disk(model, tmp_path)
    tiny.logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_mapped(twin)
        assert all(m.fourfold_host is None for m in packed_modules(twin))
        assert torch.equal(tiny.logits(twin), expected)
    assert torch.equal(tiny.logits(model), expected)


def test_a_model_that_is_let_go_of_ends_its_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    buffered(monkeypatch, late=False)
    model = offloading.packed_model("qwen3_moe")
    report = on_disk(model, tmp_path)
    tiny.logits(model)
    (made,) = report.streamers
    assert isinstance(made, DiskStreamer)
    thread = made.engine._thread
    assert thread is not None
    assert thread.is_alive()
    del model, report, made
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert not [file for file in mapped._files if file.path.is_relative_to(tmp_path)]


def test_dequantized_from_its_files(way: str, tmp_path: Path) -> None:
    tiny.save(tiny.gpt_oss(num_hidden_layers=4), tmp_path / "plain")
    tiny.packed_folder(tmp_path / "plain", tmp_path / "packed")
    resident = tiny.load(tmp_path / "packed").dequantize()
    model = tiny.load(tmp_path / "packed", experts_quant_type="nf4", experts_device="disk")
    tiny.logits(model)
    model = model.dequantize()
    assert not packed_modules(model)
    assert torch.equal(tiny.logits(model), tiny.logits(resident))
    model.save_pretrained(tmp_path / "packed")  # (nothing is mapped from there any more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a driver")
def test_buffers_that_cannot_be_pinned_are_known_before_anything_moves(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread makes them at the first use, after the report."""
    buffered(monkeypatch, late=False)
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    driver.limit = 0
    offloading.write_experts(model, tmp_path)
    with pytest.raises(ConfigurationError, match=r"pin=True: .* could not be pinned"):
        fourfold.offload(model, device="disk", checkpoint=tmp_path, pin=True)
    assert not any(m.fourfold_host for m in offloading.packed_modules(model))
    report = fourfold.offload(model, device="disk", checkpoint=tmp_path)
    assert not report.pinned
    assert "cudaHostRegister" in str(report.unpinned)
    assert torch.equal(tiny.logits(model), expected)
    assert not driver.pages
