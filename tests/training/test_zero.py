"""``deepspeed``: what is read, refused and passed on; and runs on two processes, where it is installed.

The runs are DeepSpeed's own engine on CPUs; on GPUs it is started the same way.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from config_text import SOUND
from fourfold.errors import ConfigurationError
from fourfold.training.read_config import examine, load_config
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from fourfold.training.zero import check_start, read, stage_of, trainer_settings
from tiny_chat import Settings, conversation, quiet, write_jsonl

HELPER = Path(__file__).parents[1] / "helpers" / "deepspeed_on_cpu.py"
installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
ZERO2 = {"zero_optimization": {"stage": 2}}


def look(tmp_path: Path, value: Any, more: str = "") -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(SOUND + f"deepspeed: {json.dumps(value)}\n{more}", encoding="utf-8")
    return examine(path)


@pytest.mark.parametrize(
    ("value", "more", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "", "ZeRO-3: each process would first load the whole packed"),
        ({"zero_optimization": {"stage": "2"}}, "", "zero_optimization.stage is 2. Set it to 1 or 2"),
        ({"zero_optimization": True}, "", "zero_optimization.stage is True"),
        ({**ZERO2, "optimizer": {"type": "AdamW"}}, "", "optimizer takes the place of what this file says"),
        ({**ZERO2, "scheduler": {"type": "WarmupLR"}}, "", "scheduler takes the place of what this file"),
        ({**ZERO2, "tensor_parallel": {"autotp_size": 2}}, "", "tensor_parallel takes the place"),
        (
            {**ZERO2, "gradient_accumulation_steps": 4},
            "",
            "gradient_accumulation_steps is 4, and gradient_accumulation_steps is 1",
        ),
        ({**ZERO2, "train_micro_batch_size_per_gpu": 3}, "", "is 3, and micro_batch_size is 1. Write"),
        ({**ZERO2, "gradient_clipping": 0.5}, "", "gradient_clipping is 0.5, and max_grad_norm is 1"),
        ({**ZERO2, "bf16": {"enabled": True}}, "bf16: false\n", "bf16.enabled is True, and bf16 is false"),
        (ZERO2, "experts_offload: cpu\n", "sends every parameter from the first GPU when it starts"),
    ],
)
def test_what_cannot_be_is_said_by_validate(tmp_path: Path, value: Any, more: str, said: str) -> None:
    [problem] = look(tmp_path, value, more).problems
    assert problem.key == "deepspeed"
    assert said in f"{problem.what}. {problem.remedy}"
    assert problem.where.startswith("line ")


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    [problem] = look(tmp_path, str(file)).problems
    assert problem.what.startswith("ZeRO-3")
    file.write_text(json.dumps(ZERO2))
    examined = look(tmp_path, str(file))
    assert examined.sound
    assert examined.config is not None
    assert read(examined.config) == ZERO2
    file.write_text("{not: json")
    [problem] = look(tmp_path, str(file)).problems
    assert "holds no JSON" in problem.what
    file.write_text("[]")
    [problem] = look(tmp_path, str(file)).problems
    assert "holds a list" in problem.what


def test_a_missing_file_is_told_when_a_run_starts(tmp_path: Path) -> None:
    """(Examples of others name a file that lies where they are trained.)"""
    examined = look(tmp_path, "deepspeed_configs/zero2.json")
    assert examined.sound
    [problem] = examined.at_start
    assert "there is no file deepspeed_configs/zero2.json" in problem.what
    assert problem.where == "line 7"
    with pytest.raises(ConfigurationError, match=r"line 7, deepspeed: there is no file.*start at"):
        load_config(tmp_path / "config.yaml")


def made(**changes: Any) -> TrainConfig:
    values = {"base_model": "-", "adapter": "lora", "datasets": [{"path": "-"}], **changes}
    return TrainConfig.model_validate(values)


def test_what_is_not_written_is_as_the_configuration_says() -> None:
    """DeepSpeed's own defaults would be: no clipping, one micro batch a step, fp32."""
    settings = trainer_settings(made(deepspeed=ZERO2))
    assert settings == {
        **ZERO2,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }
    assert ZERO2 == {"zero_optimization": {"stage": 2}}
    settings = trainer_settings(made(deepspeed={"wall_clock_breakdown": False}))
    assert settings is not None
    assert stage_of(settings) == 0
    for nothing in (None, "", {}):
        assert trainer_settings(made(deepspeed=nothing)) is None


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"processes": "1"}, "torchrun --nproc_per_node N"),
        ({"installed": False}, "pip install deepspeed"),
        ({"has_gpu": False}, "there is no GPU"),
        ({"deepspeed": {**ZERO2, "bf16": {"enabled": True}}}, "bf16.enabled is true"),
        ({"deepspeed": None, "launched": "true"}, "Name DeepSpeed's configuration here"),
    ],
)
def test_what_a_run_needs(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], said: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", how.pop("processes", "2"))
    config = made(deepspeed=how.pop("deepspeed", ZERO2))
    fine: dict[str, Any] = {"bf16": False, "has_gpu": True, "installed": True, "launched": ""}
    if config.deepspeed == ZERO2:
        monkeypatch.setenv("WORLD_SIZE", "2")
        check_start(config, **fine)
        monkeypatch.setenv("WORLD_SIZE", "1" if "torchrun" in said else "2")
    with pytest.raises(ConfigurationError, match=said):
        check_start(config, **{**fine, **how})


def train(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    command = [*launcher, str(HELPER), "train", str(config), "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)


@installed
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_are_one_with_twice_the_batch(
    stage: int, settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """Losses and adapters after 20 steps; the checkpoint in the middle is gone on from, to the same end."""
    examples = write_jsonl(tmp_path / "train.jsonl", [conversation(index) for index in range(44)])
    changes = {
        "datasets": [{"path": str(examples)}],
        "max_steps": 20,
        "save_steps": 10,
        "adam_epsilon": 1e-4,  # (where a gradient is noise, Adam would make steps of full size of it)
        "gradient_accumulation_steps": 2,
        "optimizer": "adamw_torch",
        "max_grad_norm": 0.1,
    }
    expected = run(
        TrainConfig(**settings(**changes, micro_batch_size=4, output_dir=str(tmp_path / "alone"))), quiet()
    )
    zero = {"zero_optimization": {"stage": stage}}
    config = write_config(settings(**changes, micro_batch_size=2, deepspeed=zero))
    done = train(config)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout[done.stdout.index("{") :])
    losses, others = dict(result["loss_curve"]["train"]), dict(expected.curve.train)
    assert set(losses) == set(others)
    assert losses == pytest.approx(others, abs=1e-5)
    out, alone = tmp_path / "out", load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert (tensor - alone[name]).abs().max() < 1e-5, name
    middle = out / "checkpoint-10"
    packed = sum(path.stat().st_size for path in middle.rglob("*.pt"))
    assert packed < 40 * (middle / "adapter_model.safetensors").stat().st_size
    assert json.loads((middle / "run.json").read_text())["deepspeed"] == stage
    again = train(config, f"output_dir={tmp_path / 'again'}", f"resume_from_checkpoint={middle}")
    assert again.returncode == 0, again.stderr[-3000:]
    for name, tensor in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        assert (tensor - alone[name]).abs().max() < 1e-5, name
    other = train(config, f"resume_from_checkpoint={middle}", "deepspeed=null")
    assert other.returncode != 0
    assert "deepspeed (" in other.stderr


@installed
def test_a_gradient_that_is_not_finite_ends_the_run(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path]
) -> None:
    """(Its own step has been taken by the time the trainer's callbacks are asked.)"""
    config = write_config(settings(deepspeed=ZERO2, learning_rate=1e30, max_steps=4))
    done = train(config)
    assert done.returncode != 0
    assert "not finite" in done.stderr or "The loss at step" in done.stderr
