"""``fourfold quantize``: flags, exit statuses, what lies there afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foreign_checkpoints
import tiny
from fourfold.cli import main


def stored(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_quantize(capsys: pytest.CaptureFixture[str], moe_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert main(["quantize", str(moe_folder), str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["packed_experts"], data["quant_method"], data["ignored_keys"]) == (2, "fourfold", [])
    assert "tokenizer.json" in data["copied"]
    settings = stored(out)
    assert (settings["linears"], settings["bnb_4bit_quant_type"]) == ("4bit", "nf4")
    assert settings["bnb_4bit_use_double_quant"]
    assert main(["verify", str(out)]) == 0
    assert main(["generate", str(out), "--prompt", "what is red", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["quantize", str(moe_folder), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    flags = ["--bits", "8", "--experts-quant-type", "fp4", "--experts-blocksize", "32", "--force"]
    flags += ["--skip-modules", "q_proj"]
    assert main(["quantize", str(moe_folder), str(out), *flags, "--max-shard-size", "40KB"]) == 0
    assert "2 experts modules packed" in capsys.readouterr().out
    settings = stored(out)
    assert (settings["linears"], settings["experts_quant_type"]) == ("8bit", "fp4")
    assert settings["experts_blocksize"] == 32
    assert not settings["bnb_4bit_use_double_quant"]
    assert "q_proj" in settings["llm_int8_skip_modules"]
    assert (out / "model.safetensors.index.json").is_file()


def test_no_double_quant(moe_folder: Path, tmp_path: Path) -> None:
    flags = ["--no-double-quant", "--quant-type", "fp4"]
    assert main(["quantize", str(moe_folder), str(tmp_path / "out"), *flags]) == 0
    settings = stored(tmp_path / "out")
    assert (settings["bnb_4bit_use_double_quant"], settings["bnb_4bit_quant_type"]) == (False, "fp4")


def test_a_dense_model(capsys: pytest.CaptureFixture[str], dense_folder: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(dense_folder), str(tmp_path / "out")]) == 0
    assert "no experts" in capsys.readouterr().out
    assert stored(tmp_path / "out")["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bits", "3"], "invalid choice"),
        (["--quant-type", "int4"], "invalid choice"),
        (["--bits", "8", "--quant-type", "nf4"], "no meaning with load_in_8bit"),
        (["--bits", "8", "--double-quant"], "nothing is quantized to 4 bit"),
        (["--bits", "8", "--experts-blocksize", "32"], "experts_blocksize"),
        (["--max-shard-size", "much"], "is no size"),
        (["--device", "tpu:7"], "device 'tpu:7' cannot be used here"),
        (["--no-such-flag"], "unrecognized"),
    ],
)
def test_wrong_flags(
    capsys: pytest.CaptureFixture[str], moe_folder: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    assert main(["quantize", str(moe_folder), str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def per_expert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every expert in NF4 by itself, as transformers v4 saved them."""
    config = tiny.qwen3_moe(moe_intermediate_size=64)
    stored, _, _ = foreign_checkpoints.bitsandbytes(
        config, tmp_path_factory.mktemp("v4"), double=request.param
    )
    return stored


@pytest.mark.parametrize(
    "wrong", [["--quant-type", "fp4"], ["--bits", "8"], ["--experts-blocksize", "128"], ["opposite"]]
)
def test_a_stored_format_is_named_by_the_flags_that_ask_for_it(
    capsys: pytest.CaptureFixture[str], per_expert: Path, tmp_path: Path, wrong: list[str]
) -> None:
    double = "double" if stored(per_expert)["bnb_4bit_use_double_quant"] else "no-double"
    if wrong == ["opposite"]:
        wrong = ["--no-double-quant" if double == "double" else "--double-quant"]
    command = ["quantize", str(per_expert), str(tmp_path / "out"), *wrong]
    assert main(command) == 2
    advice = capsys.readouterr().err.partition("Pass what is stored: ")[2].split()
    assert advice == ["--experts-quant-type", "nf4", "--experts-blocksize", "64", f"--{double}-quant"]
    if main([*command, *advice]) != 0:  # its Linears are asked for in another format as well
        advice += capsys.readouterr().err.partition("Pass what is stored: ")[2].split()
        assert main([*command, *advice]) == 0


def test_a_missing_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["quantize", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "there is no model folder" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path)]) == 2
