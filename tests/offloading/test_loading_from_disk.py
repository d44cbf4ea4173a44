"""``experts_device="disk"``: packed experts are mapped from the checkpoint's files, and read when used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.loading.ahead import AheadConverter
from fourfold.loading.mapping import MappedReader
from fourfold.offloading.mapped import region_of
from offloading import is_mapped, packed_modules

DISK = {"experts_quant_type": "nf4", "experts_device": "disk"}
FORMATS = {
    "nf4": {"experts_quant_type": "nf4"},
    "double-quantized": {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"experts_quant_type": "int8"},
}


@pytest.mark.parametrize("stored", list(FORMATS))
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_the_same_model_as_without(kind: str, stored: str, way: str, tmp_path: Path) -> None:
    """In several files; rows that are padded (nemotron_h) among them."""
    tiny.save(tiny.KINDS[kind](), tmp_path / "plain")
    packed = tiny.load(tmp_path / "plain", **FORMATS[stored])
    packed.save_pretrained(tmp_path / "packed", max_shard_size="60KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    resident = tiny.load(tmp_path / "packed")
    model = tiny.load(tmp_path / "packed", **DISK)  # (the stored format holds)
    assert is_mapped(model)
    report = model.hf_quantizer.offloaded
    assert len(report.streamed) == len(packed_modules(model))
    assert report.disk_bytes > 0
    assert model.hf_quantizer.read_ahead_bytes <= report.disk_bytes // 20  # (scales of scales)
    assert torch.equal(tiny.logits(model), tiny.logits(resident))
    ours, theirs = model.state_dict(), resident.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert fourfold.verify(model).to_dict() == fourfold.verify(resident).to_dict()


def packed_folder(tmp_path: Path) -> Path:
    tiny.save(tiny.qwen3_moe(), tmp_path / "plain")
    return tiny.packed_folder(tmp_path / "plain", tmp_path / "packed")


def test_what_the_loader_began_to_read_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(Its own threads may be quicker; without them it hands in functions.)"""
    folder = packed_folder(tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    assert is_mapped(tiny.load(folder, **DISK))
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
    original = MappedReader.takes_over

    def late(reader: MappedReader, future: object) -> bool:
        future.result()  # type: ignore[attr-defined]
        return original(reader, future)

    monkeypatch.setattr(MappedReader, "takes_over", late)
    assert is_mapped(tiny.load(folder, **DISK))


def test_saved_elsewhere_and_never_over_itself(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = tiny.load(folder, **DISK)
    expected = tiny.logits(model)
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link", str(folder) + "/"):
        with pytest.raises(ConfigurationError, match="the model's experts are mapped from; save into"):
            model.save_pretrained(place)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before["model.safetensors"]
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert "experts_device" not in written
    assert torch.equal(tiny.logits(tiny.load(tmp_path / "again")), expected)
    fourfold.onload(model)
    model.save_pretrained(folder)
    assert torch.equal(tiny.logits(model), expected)


def test_offloaded_to_its_files_it_is_not_saved_over_them(tmp_path: Path) -> None:
    """And an adapter may lie beside them."""
    folder = packed_folder(tmp_path)
    model = tiny.load(folder)
    expected = tiny.logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    report = fourfold.offload(adapted, device="disk")  # (it knows where it came from)
    assert report.disk_bytes > 0
    with pytest.raises(ConfigurationError, match="the model's experts are mapped from"):
        model.save_pretrained(folder)
    adapted.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
    assert torch.equal(tiny.logits(adapted), expected)


def test_what_is_not_packed_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path / "plain")
    with pytest.raises(ConfigurationError, match=r"not packed.*`fourfold quantize .*plain FOLDER`"):
        tiny.load(tmp_path / "plain", **DISK)


def test_files_stay_inside_their_folder(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    keys = tiny.load(tmp_path / "plain").state_dict()
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        tiny.load(folder, **DISK)


def test_a_file_that_changes_between_its_header_and_its_map(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    model = tiny.load(folder, **DISK)
    del model
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        tiny.load(folder, **DISK)


def test_experts_that_are_shared_are_mapped_once(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    one, other = tiny.load(folder, **DISK), tiny.load(folder, **DISK)
    a, b = (packed_modules(m)[0].gate_up_proj.data for m in (one, other))
    assert region_of(a).offset == region_of(b).offset
    assert torch.equal(tiny.logits(one), tiny.logits(other))


MEMORY = """
import sys, os, json, torch
sys.path.insert(0, sys.argv[1])
import tiny, fourfold

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

device = None if sys.argv[3] == "none" else sys.argv[3]
arguments = {"experts_quant_type": "nf4"} | ({} if device is None else {"experts_device": device})
tiny.load(sys.argv[4], **arguments)  # (what libraries take for themselves)
torch.set_num_threads(1)
before = anonymous()
model = tiny.load(sys.argv[2], **arguments)
loaded = anonymous()
tiny.logits(model)
nbytes = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n)
print(json.dumps([nbytes, loaded - before, anonymous() - before]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks the system for its pages")
def test_mapped_experts_take_no_memory(tmp_path: Path) -> None:
    config = tiny.qwen3_moe(num_experts=64, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=6)
    tiny.save(config, tmp_path / "plain")
    folder = tiny.packed_folder(tmp_path / "plain", tmp_path / "packed")
    small = tmp_path / "small"
    small.mkdir()
    other = packed_folder(small)
    found = {}
    for device in ("cpu", "disk"):
        command = [
            sys.executable,
            "-c",
            MEMORY,
            str(Path(tiny.__file__).parent),
            str(folder),
            device,
            str(other),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        found[device] = json.loads(done.stdout.splitlines()[-1])
    nbytes, loaded, computed = found["disk"]
    assert nbytes > 40 * 2**20
    assert found["cpu"][1] > 0.9 * nbytes
    assert loaded < 0.2 * nbytes
    assert computed < found["cpu"][2] - 0.8 * nbytes


def test_the_loader_makes_no_copy_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads may begin before a tensor is taken over: they look at the file then, and bring nothing."""
    folder = packed_folder(tmp_path)
    made: list[AheadConverter] = []
    original = MappedReader.converters
    monkeypatch.setattr(MappedReader, "converters", lambda reader: made.extend(original(reader)) or made)
    taken_over: list[bool] = []
    add = AheadConverter.add_tensor

    def add_tensor(self: AheadConverter, *arguments: object) -> None:
        before = getattr(self, "force_cpu", True)
        add(self, *arguments)
        taken_over.append(before and not getattr(self, "force_cpu", False))

    monkeypatch.setattr(AheadConverter, "add_tensor", add_tensor)
    assert is_mapped(tiny.load(folder, **DISK))
    if not hasattr(made[0], "force_cpu"):
        pytest.skip("this version's converters cannot say where a tensor is read to")
    assert all(converter.force_cpu for converter in made)
    assert taken_over
    assert all(taken_over)
