"""`peft_init_lora_weights: loftq` in a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourfold.errors import ConfigurationError
from fourfold.training.preflight import check
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from tiny_chat import Settings, quiet


def test_a_run_begins_with_what_packing_lost_and_resumes(settings: Settings, tmp_path: Path) -> None:
    changes = {"peft_init_lora_weights": "loftq", "max_steps": 4, "save_steps": 2, "eval_steps": None}
    whole = run(TrainConfig(**settings(output_dir=str(tmp_path / "whole"), **changes)), quiet())
    out = Path(whole.adapter)
    assert json.loads((out / "fourfold.json").read_text())["init"] == "loftq"
    figures = json.loads((out / "report.json").read_text())["lora"]["loftq"]
    assert figures.keys() == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert all(0 < role["after"] < role["before"] for role in figures.values())
    # The checkpoint's factors are taken, not fitted anew.
    checkpoint = out / "checkpoint-2"
    assert json.loads((checkpoint / "fourfold.json").read_text())["init"] == "loftq"
    changes |= {"resume_from_checkpoint": str(checkpoint), "output_dir": str(tmp_path / "halves")}
    halves = run(TrainConfig(**settings(**changes)), quiet())
    adapters = [load_file(Path(r.adapter) / "adapter_model.safetensors") for r in (whole, halves)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    assert json.loads((Path(halves.adapter) / "fourfold.json").read_text())["init"] == "loftq"
    assert "loftq" not in json.loads((Path(halves.adapter) / "report.json").read_text())["lora"]


def test_gaussian_reaches_peft(settings: Settings, tmp_path: Path) -> None:
    config = TrainConfig(**settings(peft_init_lora_weights="gaussian", max_steps=2, eval_steps=None))
    result = run(config, quiet())
    said = json.loads((Path(result.adapter) / "adapter_config.json").read_text())
    assert said["init_lora_weights"] == "gaussian"


def test_dense_models_have_no_experts_to_begin_with(settings: Settings, dense_folder: Path) -> None:
    config = TrainConfig(**settings(base_model=str(dense_folder), peft_init_lora_weights="loftq"))
    with pytest.raises(ConfigurationError, match="is dense"):
        check(config)
