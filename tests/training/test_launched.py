"""`accelerate launch` with a configuration file, and processes that die in the middle of a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fourfold.errors import ConfigurationError
from fourfold.training.launched import check_launched
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from tiny_chat import Settings, quiet

SECONDS = 60  # after a kill, on a machine with more to do; alone it is five
# As `accelerate config` writes it for two GPUs of one machine.
LAUNCH = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_machines": 1,
    "machine_rank": 0,
    "num_processes": 2,
    "mixed_precision": "no",
    "main_process_port": 0,
    "use_cpu": False,
}


def launched(launch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, str(launch), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump(LAUNCH | changes))
        return path

    return write


def test_accelerate_launch_is_one_process_with_twice_the_batch(
    settings: Settings,
    write_config: Callable[[dict[str, Any]], Path],
    launch: Callable[..., Path],
    tmp_path: Path,
) -> None:
    expected = run(TrainConfig(**settings(max_steps=6, output_dir=str(tmp_path / "alone"))), quiet())
    config = write_config(settings(max_steps=6, micro_batch_size=4))
    done = launched(launch(), "-m", "fourfold", "train", str(config), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = dict(json.loads(done.stdout)["loss_curve"]["train"])
    assert losses == pytest.approx(dict(expected.curve.train), rel=2e-4)
    assert len(losses) == 6


def test_what_accelerates_file_says_otherwise_is_an_error(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], launch: Callable[..., Path]
) -> None:
    config = write_config(settings(max_steps=2))
    done = launched(launch(mixed_precision="bf16"), "-m", "fourfold", "train", str(config))
    assert done.returncode != 0
    assert "told mixed_precision: bf16, and this run computes in fp32" in done.stderr


QLORA = {"adapter": "qlora", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("changes", "bf16", "environment", "said"),
    [
        ({}, False, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16.*computes in fp32"),
        ({}, True, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16.*computes in bf16"),
        ({}, True, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: inductor"),
        ({}, True, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"}, None),
        ({}, True, {"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"torch_compile": True}, True, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, None),
        ({"torch_compile": "auto"}, True, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, None),
        (
            {**QLORA, "torch_compile": "auto", "fsdp_version": 2, "fsdp_config": {"offload_params": False}},
            True,
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "dynamo_backend: inductor",
        ),
        ({}, False, {}, None),
    ],
)
def test_the_environment_is_compared(
    changes: dict[str, Any], bf16: bool, environment: dict[str, str], said: str | None
) -> None:
    values = {"base_model": "-", "adapter": "lora", "datasets": [{"path": "-"}], **changes}
    config = TrainConfig.model_validate(values)
    if said is None:
        check_launched(config, bf16, environment)
        return
    with pytest.raises(ConfigurationError, match=said):
        check_launched(config, bf16, environment)


DYING = """
import os, signal, sys, time
from pathlib import Path
import torch
from fourfold.cli import main
from fourfold.training.trainer import MoeTrainer

step = MoeTrainer.training_step

def training_step(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 2:
        if sys.argv[2] == "killed":
            Path(sys.argv[3]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return step(self, *args, **kwargs)

MoeTrainer.training_step = training_step
if __name__ == "__main__":
    sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize("how", ["killed", "out of memory"])
def test_a_process_that_dies_ends_the_run_and_is_named(
    how: str,
    settings: Settings,
    write_config: Callable[[dict[str, Any]], Path],
    launch: Callable[..., Path],
    tmp_path: Path,
) -> None:
    script, died = tmp_path / "dying.py", tmp_path / "died"
    script.write_text(DYING)
    config = write_config(settings(max_steps=10_000, save_steps=0.5))  # minutes, if it went on
    done = launched(launch(), str(script), str(config), how, str(died))
    assert done.returncode != 0
    if how == "killed":
        assert time.time() - float(died.read_text()) < SECONDS
        assert re.search(r"rank +: 1 ", done.stderr), done.stderr[-3000:]
        assert "SIGKILL" in done.stderr
    else:
        assert "process 1: Out of GPU memory at step 3" in done.stderr, done.stderr[-3000:]
