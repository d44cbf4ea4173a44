"""Experts on disk: files that change or cannot be read, what is refused, processes that are forked."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fourfold
import offloading
import own_forward
import tiny
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.offloading import mapped
from fourfold.offloading.disk import check_files, mapped_files
from fourfold.offloading.engine import HostEngine
from fourfold.offloading.host import HostMemory
from fourfold.offloading.mapped import MappedFile
from fourfold.offloading.read_ahead import ReadingEngine
from offloading import assert_equal, buffered, on_disk, packed_modules, steps


@pytest.mark.parametrize("how", ["shorter", "written over", "replaced", "another length"])
def test_a_file_that_changes_is_found_before_it_is_read(how: str, way: str, tmp_path: Path) -> None:
    """In place or by renaming; cut short it would end the process. Put back, the next pass is right."""
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    on_disk(model, tmp_path)
    assert torch.equal(tiny.logits(model), expected)
    file = sorted(tmp_path.iterdir())[1]
    stored = file.read_bytes()
    half = len(stored) // 2
    if how == "shorter":
        os.truncate(file, 4096)
    elif how == "written over":
        file.write_bytes(stored[:half] + bytes(len(stored) - half))
    else:
        other = tmp_path / "other"
        other.write_bytes(stored[:half] + bytes(len(stored) - half + (how == "another length")))
        other.replace(file)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{file.name} was changed while .*put the file back"):
            tiny.logits(model)
        with pytest.raises(CheckpointError, match="was changed"):
            check_files(model)
    file.write_bytes(stored)
    assert torch.equal(tiny.logits(model), expected)
    assert check_files(model) == 2


def test_a_file_that_changed_is_not_brought_back_saved_or_sent_on(way: str, tmp_path: Path) -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    on_disk(model, tmp_path / "files")
    file = sorted((tmp_path / "files").iterdir())[1]
    stored = file.read_bytes()
    file.write_bytes(stored[: len(stored) // 2] + bytes(len(stored) - len(stored) // 2))
    for use in (
        fourfold.onload,
        fourfold.offload,
        lambda model: fourfold.offload(model, budget="1GiB", device="disk"),
        lambda model: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(CheckpointError, match=rf"{file.name} was changed"):
            use(model)
    assert not (tmp_path / "saved").exists()
    file.write_bytes(stored)
    fourfold.onload(model)
    assert torch.equal(tiny.logits(model), expected)


def test_buffers_that_go_while_a_thread_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the disk gets what it waits for, or an error; never a buffer that nothing filled."""
    buffered(monkeypatch, late=False)
    model = offloading.packed_model("qwen3_moe", layers=4)
    expected = tiny.logits(model)
    (made,) = on_disk(model, tmp_path).streamers
    found, over = [], threading.Event()

    def compute() -> None:
        try:
            found.extend(torch.equal(tiny.logits(model), expected) for _ in range(10))
        finally:
            over.set()

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    closed = 0
    while not over.wait(0.001):
        made.close()
        closed += 1
        assert closed < 50_000, "it hangs"
    thread.join()
    assert closed > 1
    assert found == [True] * 10


def test_what_was_read_of_another_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written over while the thread reads, after the file was looked at, and put back."""
    buffered(monkeypatch)
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    files = offloading.write_experts(model, tmp_path)
    stored = [file.read_bytes() for file in files]
    fourfold.offload(model, device="disk", checkpoint=tmp_path)
    original, spoiled = MappedFile.read_into, threading.Event()

    def read_into(file: MappedFile, place: memoryview, offset: int) -> None:
        if not spoiled.is_set():
            spoiled.set()
            for path, content in zip(files, stored, strict=True):
                path.write_bytes(content[:2000] + bytes(len(content) - 2000))
        original(file, place, offset)

    monkeypatch.setattr(MappedFile, "read_into", read_into)
    with pytest.raises(CheckpointError, match="was changed while"):
        tiny.logits(model)
    assert spoiled.is_set()
    for path, content in zip(files, stored, strict=True):
        path.write_bytes(content)
    assert torch.equal(tiny.logits(model), expected)


def test_what_does_not_change_the_numbers_is_no_error(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    monkeypatch.chdir(tmp_path)
    on_disk(model, Path("here"))
    tmp_path = tmp_path / "here"
    one, other = sorted(tmp_path.iterdir())
    one.touch()
    one.chmod(0o600)
    again = tmp_path / "again"
    again.write_bytes(other.read_bytes())
    again.replace(other)  # (downloaded a second time)
    assert torch.equal(tiny.logits(model), expected)
    monkeypatch.chdir(again.parent.parent)
    one.unlink()  # (what is mapped stays as long as it is)
    assert torch.equal(tiny.logits(model), expected)
    assert check_files(model) == 2


def test_each_epoch_looks_closer_than_the_system_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offloading.packed_model("qwen3_moe")
    on_disk(model, tmp_path)
    file = sorted(tmp_path.iterdir())[0]
    monkeypatch.setattr(
        mapped, "_stamp", lambda stat: (0, 0, 0, 0, 0)
    )  # (the system says that nothing changed)
    for each in mapped_files(model):
        each._known = (0, 0, 0, 0, 0)
    content = bytearray(file.read_bytes())
    header = header_of(file)
    start, stop = header["model.layers.2.mlp.experts.down_proj"]["data_offsets"]
    begin = len(content) - max(entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__")
    content[begin + start : begin + stop] = bytes(stop - start)
    file.write_bytes(content)
    tiny.logits(model)
    with pytest.raises(CheckpointError, match="its header or its numbers are others"):
        check_files(model)


@pytest.mark.parametrize("at", [0, 1, 4, 9])
@pytest.mark.parametrize("what", ["EIO", "short"])
def test_a_read_that_fails_reaches_the_step_and_the_next_one_is_right(
    what: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffered(monkeypatch)
    model = own_forward.lora(offloading.packed_model("qwen3_moe"))
    own_forward.checkpoint_layers_(model, False)
    expected = steps(copy.deepcopy(model))
    files = offloading.write_experts(model, tmp_path)
    report = fourfold.offload(model, device="disk", checkpoint=tmp_path, buffers=1)
    count, original = -1, os.preadv

    def preadv(fd: int, places: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count < 20 * at:
            return original(fd, places, offset)
        if what == "short":
            return 0
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    said = "it ends at byte" if what == "short" else "cannot be read.*Input/output error"

    def three_steps() -> None:
        for _ in range(3):
            own_forward.output(model, tiny.IDS).sum().backward()

    with pytest.raises(CheckpointError, match=said) as raised:
        three_steps()
    assert any(str(file) in str(raised.value) for file in files)
    monkeypatch.setattr(os, "preadv", original)
    model.zero_grad()
    (schedule,) = (s.schedule() for s in report.streamers)
    assert all(not slot.users for slot in schedule.slots)
    assert_equal(steps(model), expected)


def test_an_exception_inside_a_step_leaves_the_next_one_right(way: str, tmp_path: Path) -> None:
    model = own_forward.lora(offloading.packed_model("qwen3_moe"))
    own_forward.checkpoint_layers_(model, False)
    expected = steps(copy.deepcopy(model))
    on_disk(model, tmp_path)

    def broken(*_: Any) -> Any:
        raise FloatingPointError("on the way")

    for gate in packed_modules(model)[::2]:
        apply = gate._apply_gate
        gate._apply_gate = broken
        with pytest.raises(FloatingPointError):
            own_forward.output(model, tiny.IDS)
        gate._apply_gate = apply
        y = own_forward.output(model, tiny.IDS)
        gate._apply_gate = broken
        with pytest.raises(FloatingPointError):
            y.sum().backward()
        gate._apply_gate = apply
    model.zero_grad()
    assert_equal(steps(model), expected)


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def rewritten(file: Path, header: dict[str, Any]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(64, dtype=torch.uint8), "b": torch.arange(8, dtype=torch.int32)}, file)
    whole, header = file.read_bytes(), header_of(file)
    assert torch.equal(MappedFile(file).tensor("b"), torch.arange(8, dtype=torch.int32))

    def refused() -> None:
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
            MappedFile(file)

    for length in (0, 5, 20, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused()
    file.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    refused()
    file.write_bytes(whole)
    for offsets, shape in (([0, 10**9], [10**9]), ([-64, 0], [64]), ([0, 64], [63]), ("no", [64])):
        changed = copy.deepcopy(header)
        changed["a"] |= {"data_offsets": offsets, "shape": shape}
        rewritten(file, changed)
        refused()
        file.write_bytes(whole)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        MappedFile(tmp_path / "absent.safetensors")


def test_numbers_that_straddle_words_are_read(tmp_path: Path) -> None:
    """(Written by others: safetensors' own files are aligned.)"""
    file = tmp_path / "model.safetensors"
    save_file({"b": torch.arange(8, dtype=torch.int32)}, file)
    header = header_of(file)
    file.write_bytes(b"")
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 4 + 4)
    file.write_bytes(
        struct.pack("<Q", len(text)) + text + torch.arange(8, dtype=torch.int32).numpy().tobytes()
    )
    made = MappedFile(file)
    assert made.regions["b"].offset % 4
    assert torch.equal(made.tensor("b"), torch.arange(8, dtype=torch.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda"}, "device='cuda'; valid are 'cpu'"),
        ({"checkpoint": "here"}, "checkpoint='here' has no meaning without device='disk'"),
        ({"device": "disk"}, "the model names no folder. Name one.*fourfold quantize"),
        ({"device": "disk", "checkpoint": "nowhere"}, "nowhere is no folder with safetensors files"),
        ({"device": "disk", "budget": 0}, r"budget of 0\.000 GiB"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments: dict[str, Any], message: str) -> None:
    model = offloading.packed_model("qwen3_moe", layers=2)
    with pytest.raises(ConfigurationError, match=message):
        fourfold.offload(model, **arguments)
    assert all(m.fourfold_host is None for m in packed_modules(model))


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = (offloading.packed_model("qwen3_moe", layers=2) for _ in range(2))
    with torch.no_grad():
        packed_modules(other)[1].down_proj_absmax[3, 0, 0] ^= 1
    offloading.write_experts(other, tmp_path / "other")
    with pytest.raises(
        ConfigurationError, match=r"other numbers for model\.layers\.1\.mlp\.experts\.down_proj_a"
    ):
        fourfold.offload(model, device="disk", checkpoint=tmp_path / "other")
    offloading.write_experts(packed_modules(model)[0], tmp_path / "part")
    with pytest.raises(ConfigurationError, match=r"no file of the checkpoint holds model\.layers\.1\.mlp"):
        fourfold.offload(model, device="disk", checkpoint=tmp_path / "part")
    assert all(m.fourfold_host is None for m in packed_modules(model))


def _fill_in_child(engine: ReadingEngine, file: MappedFile, results: Any) -> None:
    place = torch.zeros(64, dtype=torch.uint8)
    engine.wait(engine.fill([(place, file.regions["a"])], []))
    results.put(place.tolist())


def test_a_forked_process_reads_with_a_thread_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(64, dtype=torch.uint8)}, file)
    made, engine = MappedFile(file), ReadingEngine(HostEngine(), HostMemory())
    place = torch.zeros(64, dtype=torch.uint8)
    engine.wait(engine.fill([(place, made.regions["a"])], []))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_fill_in_child, args=(engine, made, results))
    child.start()
    assert results.get(timeout=60) == list(range(64))
    child.join(60)
    assert child.exitcode == 0
    place.zero_()
    engine.wait(engine.fill([(place, made.regions["a"])], []))  # (and this one's goes on)
    assert place.tolist() == list(range(64))
    engine.close()


def test_a_reader_that_was_stopped_keeps_nobody_waiting(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(64, dtype=torch.uint8)}, file)
    made, engine = MappedFile(file), ReadingEngine(HostEngine(), HostMemory())
    place = torch.zeros(64, dtype=torch.uint8)
    engine.wait(engine.fill([(place, made.regions["a"])], []))
    engine.close()
    late = engine.fill([(torch.zeros_like(place), made.regions["a"])], [])
    assert late.cancelled()
    engine.wait(late)


def test_workers_that_load_data_leave_the_reader_alone(way: str, tmp_path: Path) -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    on_disk(model, tmp_path)
    tiny.logits(model)
    loader = torch.utils.data.DataLoader(
        tiny.IDS, batch_size=1, num_workers=2, multiprocessing_context="fork"
    )
    for number, ids in enumerate(loader):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(tiny.IDS[number : number + 1]).logits)
    assert torch.equal(tiny.logits(model), expected)
