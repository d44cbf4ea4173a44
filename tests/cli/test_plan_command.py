"""`fourfold plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from fourfold.cli import main
from tiny_chat import Settings, data_files, moe_folder, settings, write_config

__all__ = ["data_files", "moe_folder", "settings", "write_config"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.qwen3_moe(architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["plan", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_model_without_weights_is_planned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "lora_r=4", "--gpu", "24GiB"]) == 0
    shown = capsys.readouterr().out
    assert "rank 4 on q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj" in shown
    for word in (
        "experts",
        "adapters",
        "gradients",
        "optimizer",
        "activations",
        "otherwise",
        "It fits 24.00",
    ):
        assert word in shown


def test_json_adds_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, data = _json(capsys, str(model), "--gpu", "24GiB")
    assert status == 0
    assert data["fits"] is True
    assert sum(data["parts"].values()) == data["peak"]
    assert data["weights"]["bytes"] == sum(row["bytes"] for row in data["weights"]["rows"])


def test_exit_status_1_with_suggestions_where_it_does_not_fit(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(model), "gradient_checkpointing=false", "sequence_len=4096", "micro_batch_size=8"]
    _, data = _json(capsys, *arguments)
    assert data["fits"] is None
    card = str(int(data["peak"] * 0.9 / 0.97) + 640 * 2**20)
    status, data = _json(capsys, *arguments, "--gpu", card)
    assert status == 1
    assert data["fits"] is False
    assert {"gradient_checkpointing": True} in [s["keys"] for s in data["suggestions"]]
    assert all(s["peak"] <= data["room"] for s in data["suggestions"])
    assert main(["plan", *arguments, "--gpu", card]) == 1
    shown = capsys.readouterr().out
    assert "It does not fit" in shown
    assert "gradient_checkpointing: true" in shown


def test_a_file_is_planned_with_its_settings(
    settings: Settings,
    write_config: Callable[[dict[str, Any]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(settings(lora_target_modules=r".*\.q_proj"))
    status, data = _json(capsys, str(config), "--cpu", "lora_r=2")
    assert status == 0
    assert data["settings"]["r"] == 2
    assert data["settings"]["batch"] == 8
    assert data["settings"]["bf16"] is False
    assert [name.rpartition(".")[2] for name in data["settings"]["target_modules"]] == ["q_proj"] * 2
    assert data["target"] == {"device": "cpu", "capability": None}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "big"], "'big' is no size of a card's memory"),
        (["--gpu", "24"], "'24' is no size of a card's memory. Write 24GiB"),
        (["--capability", "nine"], "'nine' is none"),
        (["--cpu", "--gpu", "1GiB"], "--cpu: contradicts --gpu"),
        (["lora_rr=4"], "lora_r"),
        (["lora_target_modules=[nothing]"], "'nothing' matches no module"),
    ],
)
def test_bad_input_is_answered(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", str(model), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "./nothing-here"]) == 2
    assert "base_model: there is no folder ./nothing-here" in capsys.readouterr().err


def test_a_dense_model_is_planned_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.dense().save_pretrained(tmp_path)
    status, data = _json(capsys, str(tmp_path))
    assert status == 0
    assert data["settings"]["target_parameters"] == []
    assert main(["plan", str(tmp_path), "lora_target_parameters=all"]) == 2
    assert "dense" in capsys.readouterr().err


def test_several_gpus(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "lora_r=4", "--gpu", "24GiB", "--gpus", "4"]) == 0
    shown = capsys.readouterr().out
    assert "each of 4 GPUs" in shown
    assert "fits by: FSDP2; FSDP2, layers stay; DDP" in " ".join(shown.split())
    status, found = _json(capsys, str(model), "lora_r=4", "--gpus", "4")
    assert status == 0
    assert [way["way"] for way in found["gpus"]] == ["FSDP2", "FSDP2, layers stay", "DDP"]
    sharded, _, replicated = found["gpus"]
    assert sharded["weights"] < replicated["weights"] == found["weights"]["bytes"]
    assert sharded["resident"] < found["resident"]
    assert sharded["gpus"] == 4
    # as much as FSDP2 takes is too little for all of it on one card
    tight = ["--gpu", str(sharded["peak"] + 2**30)]
    assert _json(capsys, str(model), "lora_r=4", "--gpus", "4", *tight)[1]["fits"] is True
    assert main(["plan", str(model), "--gpus", "1"]) == 2
    assert "Write 2 or more" in capsys.readouterr().err
