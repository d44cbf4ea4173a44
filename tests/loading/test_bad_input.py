"""Damaged, incomplete and mismatched checkpoints: an error that names file or tensor, before weights are read
where that can be; never a model that is quietly wrong."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import foreign_checkpoints
import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.loading import headers
from tiny import load

Config = fourfold.MoeBitsAndBytesConfig
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """In high precision, in several files."""
    tiny.save(tiny.mixtral(), tmp_path / "model", max_shard_size="200KB")
    return tmp_path / "model"


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Path:
    """Linears and experts packed, in several files."""
    load(model, **NF4).save_pretrained(tmp_path / "packed", max_shard_size="60KB")
    return tmp_path / "packed"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def garble_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)


def claim_a_huge_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers are read, each time."""
    names: list[str] = []
    opened = headers._opened

    def note(file: str | Path):
        names.append(Path(file).name)
        return opened(file)

    monkeypatch.setattr(headers, "_opened", note)
    return names


def test_headers_are_read_once_a_load(read: list[str], model: Path, packed: Path, tmp_path: Path) -> None:
    mxfp4, _ = foreign_checkpoints.mxfp4(tmp_path / "gpt_oss")
    for folder in (model, packed, mxfp4):
        read.clear()
        load(folder, **({} if folder == packed else NF4))
        assert sorted(read) == [file.name for file in shards(folder)]


def test_files_that_change_between_two_loads_are_read_again(packed: Path) -> None:
    load(packed)
    right, wrong = (b'experts.gate_up_proj":{"dtype":"%s"' % dtype for dtype in (b"U8", b"I8"))
    file = next(file for file in shards(packed) if right in file.read_bytes())
    times = file.stat()
    file.write_bytes(file.read_bytes().replace(right, wrong))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # neither size nor time tells
    with pytest.raises(CheckpointError, match="I8"):
        load(packed)


@pytest.mark.parametrize("harm", [truncate, garble_header, claim_a_huge_header, empty])
@pytest.mark.parametrize("which", ["model", "packed"])
def test_a_damaged_file_is_named(request, which: str, harm: Callable[[Path], None]) -> None:
    folder = request.getfixturevalue(which)
    file = shards(folder)[-1]
    harm(file)
    with pytest.raises(CheckpointError, match=rf"{file.name} is truncated or damaged"):
        load(folder, **(NF4 if which == "model" else {}))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("which", ["model", "packed"])
def test_an_index_that_points_outside_its_folder(
    request, tmp_path: Path, which: str, absolute: bool, monkeypatch
) -> None:
    folder = request.getfixturevalue(which)
    outside = tmp_path / "outside.safetensors"
    shards(folder)[0].rename(outside)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = "model-00001-of"
    target = str(outside) if absolute else "../outside.safetensors"
    content["weight_map"] = {
        key: target if name.startswith(first) else name for key, name in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    settings = NF4 if which == "model" else {}
    with pytest.raises(CheckpointError, match=r"outside its folder: .*outside\.safetensors"):
        load(folder, **settings)
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(Path("../" + folder.name), **settings)


def test_folders_named_in_other_ways_are_no_outside(model: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    for name in (Path(), Path("../model"), tmp_path / "link", Path("../model/../model/")):
        load(name, **NF4)


def test_a_file_that_the_index_names_and_is_not_there(packed: Path) -> None:
    shards(packed)[0].unlink()
    with pytest.raises((OSError, CheckpointError), match="model-00001-of"):
        load(packed)


def test_nothing_is_unpickled(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="only safetensors"):
        load(model, **NF4)


def change(folder: Path, pattern: str, new: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Change (or, with None, drop) the last tensor whose name matches; returns its name."""
    found = ""
    for file in shards(folder):
        tensors = load_file(file)
        names = [name for name in tensors if re.search(pattern, name)]
        if names:
            found = names[-1]
            value = new(tensors.pop(found))
            if value is not None:
                tensors[found] = value.contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
    assert found
    return found


@pytest.mark.parametrize("suffix", ["", "_absmax", "_absmax_scale", "_absmax_offset"])
def test_packed_tensors_of_a_wrong_shape(packed: Path, suffix: str) -> None:
    change(packed, rf"layers\.1\..*experts\.gate_up_proj{suffix}$", lambda t: t[:-1])
    with pytest.raises(CheckpointError, match=rf"experts\.gate_up_proj{suffix} is .* is expected") as error:
        load(packed)
    assert ".safetensors: " in str(error.value)


@pytest.mark.parametrize("suffix", ["", "_absmax", "_absmax_scale", "_absmax_offset"])
def test_packed_tensors_that_are_missing(packed: Path, suffix: str) -> None:
    change(packed, rf"layers\.1\..*experts\.gate_up_proj{suffix}$", lambda _: None)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.experts\.gate_up_proj{suffix}[,\s]"):
        load(packed)


@pytest.mark.parametrize(
    "changed",
    [{"experts_blocksize": 32}, {"bnb_4bit_use_double_quant": False}, {"experts_quant_type": "int8"}],
)
def test_a_configuration_that_does_not_belong_to_the_files(packed: Path, changed: dict) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= changed
    if "experts_quant_type" in changed:
        config["quantization_config"]["bnb_4bit_use_double_quant"] = False
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.(gate_up|down)_proj.* is expected for"):
        load(packed)


@pytest.mark.parametrize("linears", ["none", "3bit", "4bit"])
def test_linears_in_int8_that_the_configuration_does_not_speak_of(
    model: Path, tmp_path: Path, linears: str
) -> None:
    """Their shape is that of the weights, and 127 would be read as a number."""
    packed = tiny.packed_folder(model, tmp_path / "packed", load_in_8bit=True)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= {"linears": linears, "experts_quant_type": "int8"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"self_attn\..*weight is I8|linears='3bit'"):
        load(packed)


@pytest.mark.parametrize("settings", [NF4, {"load_in_8bit": True}])
def test_linears_that_are_no_codes(model: Path, tmp_path: Path, settings: dict) -> None:
    packed = tiny.packed_folder(model, tmp_path / "packed", **settings)
    name = r"layers\.1\.self_attn\.k_proj\.weight"
    change(packed, rf"{name}$", lambda t: torch.ones(32, 64))
    if settings == NF4:
        change(packed, rf"{name}\.absmax$", lambda _: None)
    with pytest.raises(CheckpointError, match=rf"{name} is F32"):
        load(packed)


def test_int8_scales_of_a_wrong_shape(model: Path, tmp_path: Path) -> None:
    packed = tiny.packed_folder(model, tmp_path / "packed", load_in_8bit=True)
    change(packed, r"layers\.1\.self_attn\.k_proj\.SCB$", lambda t: t[:3])
    with pytest.raises(CheckpointError, match=r"of .*k_proj\.weight are 3 in the checkpoint"):
        load(packed)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("leaf", ["self_attn.k_proj", "experts.2.w3"])
def test_codes_without_a_configuration_are_no_numbers(model: Path, leaf: str, dtype: torch.dtype) -> None:
    name = change(model, rf"layers\.1\..*{re.escape(leaf)}\.weight$", lambda t: t.to(dtype))
    for settings in (NF4, {"load_in_8bit": True}):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is (I8|F8_E4M3), where"):
            load(model, **settings)


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.5])
def test_unknown_format_versions(packed: Path, version) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format version"):
        load(packed)


def test_unknown_settings_in_a_checkpoint(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["experts_rotation"] = "hadamard"
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="experts_rotation"):
        load(packed)


def refused(action: Callable[[], object], name: str, caplog: pytest.LogCaptureFixture) -> None:
    """By an error of ours that names the tensor, or by transformers' own, which names it in its report."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()  # commands turn it down
    transformers.utils.logging.enable_propagation()
    try:
        with pytest.raises((CheckpointError, RuntimeError)) as error:
            action()
    finally:
        transformers.utils.logging.disable_propagation()
        transformers.utils.logging.set_verbosity(verbosity)
    if not isinstance(error.value, CheckpointError):
        assert "above report" in str(error.value)
    assert re.search(re.escape(name).replace("1", ".*1.*"), str(error.value) + caplog.text)


@pytest.mark.parametrize("settings", [NF4, {"load_in_8bit": True}, {"experts_quant_type": "nf4"}])
@pytest.mark.parametrize("leaf", ["self_attn.k_proj.weight", "input_layernorm.weight"])
def test_other_tensors_of_a_wrong_shape(model: Path, leaf: str, settings: dict, caplog) -> None:
    """Quantized Linears are not compared by transformers at all, and up to 5.21 nothing is."""
    change(model, rf"layers\.1\.{re.escape(leaf)}$", lambda t: torch.cat([t, t]))
    refused(lambda: load(model, **settings), f"layers.1.{leaf}", caplog)


@pytest.mark.parametrize("suffix", ["absmax", "nested_absmax", "quant_map", "quant_state.bitsandbytes__nf4"])
def test_linears_that_lack_their_scales(packed: Path, suffix: str, caplog) -> None:
    change(packed, rf"layers\.1\.self_attn\.q_proj\.weight\.{suffix}$", lambda _: None)
    refused(lambda: load(packed), "layers.1.self_attn.q_proj.weight", caplog)


@pytest.mark.parametrize("which", ["model", "packed"])
@pytest.mark.parametrize("leaf", ["self_attn.k_proj", "input_layernorm", "gate"])
def test_other_tensors_that_are_missing(request, which: str, leaf: str) -> None:
    """transformers fills them with random numbers, and says so in a log that commands turn down."""
    folder = request.getfixturevalue(which)
    name = change(folder, rf"layers\.1\.(.*\.)?{re.escape(leaf)}\.weight$", lambda _: None)
    said = re.escape(name).replace("block_sparse_moe", "mlp")
    with pytest.raises(CheckpointError, match=rf"the checkpoint lacks {said}"):
        load(folder, **(NF4 if which == "model" else {}))


def test_a_packed_checkpoint_that_lacks_a_buffer(tmp_path: Path) -> None:
    tiny.save(foreign_checkpoints.deepseek_v3(), tmp_path / "model")
    packed = tiny.packed_folder(tmp_path / "model", tmp_path / "packed")
    name = change(packed, r"gate\.e_score_correction_bias$", lambda _: None)
    with pytest.raises(CheckpointError, match=rf"the checkpoint lacks {re.escape(name)}"):
        load(packed)


@pytest.mark.parametrize("which", ["model", "packed"])
def test_another_class_may_add_a_head(request, which: str) -> None:
    settings = {"quantization_config": Config(**NF4)} if which == "model" else {}
    kind = transformers.AutoModelForSequenceClassification
    loaded = kind.from_pretrained(request.getfixturevalue(which), num_labels=3, **settings)
    fourfold.verify(loaded)
    assert loaded.score.weight.isfinite().all()


@pytest.mark.parametrize("settings", [NF4, {"load_in_8bit": True}])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_linears_that_are_not_finite(model: Path, settings: dict, number: float) -> None:
    name = change(
        model, r"layers\.1\.self_attn\.k_proj", lambda t: t.index_fill(0, torch.tensor([3]), number)
    )
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: weights are NaN or infinite"):
        load(model, **settings)


def test_fewer_and_more_experts_than_the_configuration_says(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for count in (3, 5):
        config["num_local_experts"] = count
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"gate\.weight is \[4, 64\].* asks for \[{count}, 64\]"):
            load(model, experts_quant_type="nf4")


def test_experts_of_another_width_than_the_configuration_says(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["intermediate_size"] = 128
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.(gate_up|down)_proj.*configuration asks for"):
        load(model, experts_quant_type="nf4")
