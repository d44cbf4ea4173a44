"""`fourfold train` with the keys of FSDP, on two processes: the numbers of one with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fourfold.errors import ConfigurationError
from fourfold.training.resume import check_unchanged, commit, run_settings
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from launching import torchrun
from tiny_chat import Settings, conversation, quiet, write_jsonl

FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {
        "offload_params": True,
        "cpu_ram_efficient_loading": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "MixtralDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "sharding_strategy": "FULL_SHARD",
        "reshard_after_forward": True,
        "activation_checkpointing": True,
    },
}


def train(config: Path, *overrides: str, processes: int = 2) -> dict[str, Any]:
    done = torchrun("-m", "fourfold", "train", str(config), "--json", *overrides, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_shards_are_one_process_with_twice_the_batch(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """Of 44 examples: each epoch ends with a batch that one process has nothing of; so do held-out ones."""
    examples = write_jsonl(tmp_path / "train.jsonl", [conversation(index) for index in range(44)])
    changes = {
        "datasets": [{"path": str(examples)}],
        "save_steps": 6,
        "eval_batch_size": 2,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.1,
    }
    alone = tmp_path / "alone"
    expected = run(TrainConfig(**settings(**changes, output_dir=str(alone))), quiet())
    config = write_config(settings(**changes, **FSDP, micro_batch_size=4, merge_lora=True))
    result = train(config)
    losses, others = dict(result["loss_curve"]["train"]), dict(expected.curve.train)
    assert losses == pytest.approx(others, rel=1e-5)
    assert expected.before is not None
    assert expected.after is not None
    held_out = result["held_out_loss"]
    assert held_out["before"]["per_answer"] == pytest.approx(expected.before.per_answer, rel=1e-5)
    assert held_out["after"]["per_answer"] == pytest.approx(expected.after.per_answer, rel=1e-4)
    norms = [row["grad_norm"] for row in result["series"]]
    assert norms == pytest.approx([row["grad_norm"] for row in expected.journal["series"]], rel=1e-4)
    kinds = {kind: dict(values) for kind, values in result["gradient_norms"].items()}
    for kind, values in expected.journal["gradient_norms"].items():
        assert kinds[kind] == pytest.approx(dict(values), rel=1e-4)
    out = tmp_path / "out"
    wanted = load_file(alone / "adapter_model.safetensors")
    stored = load_file(out / "adapter_model.safetensors")
    assert stored.keys() == wanted.keys()
    for name, tensor in stored.items():
        assert (tensor - wanted[name]).abs().max() < 1e-4, name
        assert ((tensor.abs().sum(dim=1) > 0) == (wanted[name].abs().sum(dim=1) > 0)).all(), name
    assert (out / "merged" / "config.json").is_file()
    assert (out / "report.html").is_file()
    checkpoint = out / "checkpoint-6"
    assert (checkpoint / "shards" / "checkpoint.json").is_file()
    assert not (checkpoint / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        pytest.param(2, ()),
        pytest.param(4, ("gradient_accumulation_steps=1",), marks=pytest.mark.slow),
    ],
)
def test_resumed_on_as_many_processes_and_on_others(
    settings: Settings,
    write_config: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    processes: int,
    overrides: tuple[str, ...],
) -> None:
    changes = {"save_steps": 3, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    config = write_config(settings(**changes, **FSDP))
    whole = train(config)
    out, again = tmp_path / "out", tmp_path / "again"
    start = f"resume_from_checkpoint={out / 'checkpoint-3'}"
    result = train(config, start, f"output_dir={again}", *overrides, processes=processes)
    losses, others = dict(result["loss_curve"]["train"]), dict(whole["loss_curve"]["train"])
    assert losses == pytest.approx(others, rel=1e-5)
    wanted = load_file(out / "adapter_model.safetensors")
    for key, tensor in load_file(again / "adapter_model.safetensors").items():
        assert (tensor - wanted[key]).abs().max() < 1e-5, key


def test_a_resumed_run_has_batches_as_large_and_shards_as_well(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def settings_of(processes: int, micro: int, accumulation: int, **changes: Any) -> dict[str, Any]:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        return run_settings(TrainConfig(**settings(**sizes, **changes)), [], [], False, "")

    commit(tmp_path, settings_of(2, 2, 2, **FSDP))
    check_unchanged(str(tmp_path), settings_of(4, 2, 1, **FSDP))
    check_unchanged(str(tmp_path), settings_of(1, 1, 8, **FSDP))
    with pytest.raises(ConfigurationError, match=r"micro_batch_size \(2 there\)"):
        check_unchanged(str(tmp_path), settings_of(2, 1, 2, **FSDP))
    with pytest.raises(ConfigurationError, match=r"fsdp_version \(sharded\) \(True there\)"):
        check_unchanged(str(tmp_path), settings_of(2, 2, 2))
    commit(tmp_path, settings_of(2, 2, 2))
    with pytest.raises(ConfigurationError, match=r"fsdp_version \(sharded\) \(False there\)"):
        check_unchanged(str(tmp_path), settings_of(2, 2, 2, **FSDP))


OTHER_WAYS = {
    "int8": {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True, "gradient_checkpointing": True},
    "packed": {"sample_packing": True, "eval_sample_packing": True, "micro_batch_size": 1},
    "whole modules": {"lora_modules_to_save": ["embed_tokens"], "loraplus_lr_ratio": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_settings_are_those_of_replicas(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path, way: str
) -> None:
    """FSDP2 against DDP, both on two processes."""
    config = write_config(settings(**OTHER_WAYS[way], max_steps=6, eval_steps=3))
    wanted = train(config, f"output_dir={tmp_path / 'ddp'}")
    result = train(config, "fsdp_config={reshard_after_forward: false}")
    losses, others = dict(result["loss_curve"]["train"]), dict(wanted["loss_curve"]["train"])
    assert losses == pytest.approx(others, rel=1e-5)
    held_out, expected = result["held_out_loss"], wanted["held_out_loss"]
    for when in ("before", "after"):
        assert held_out[when]["per_answer"] == pytest.approx(expected[when]["per_answer"], rel=1e-4)
    stored = load_file(tmp_path / "ddp" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert (tensor - stored[name]).abs().max() < 1e-4, name


def test_one_process_is_told(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match=r"this run has one\. Start it by `torchrun"):
        run(TrainConfig(**settings(**FSDP)), quiet())


DYING = """
import os, signal, sys
from fourfold.cli import main
from fourfold.training.callbacks import FirstStepGradients

def die(self, *args, **kwargs):
    if os.environ["RANK"] == "1":
        {what}

FirstStepGradients.on_pre_optimizer_step = die
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ("rank      : 1", "SIGKILL")),
        (
            "import torch; raise torch.OutOfMemoryError('no room')",
            ("process 1: Out of GPU memory at step 1",),
        ),
    ],
)
def test_a_process_that_dies_ends_the_job_and_is_named(
    settings: Settings,
    write_config: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    what: str,
    said: tuple[str, ...],
) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(what=what))
    started = time.monotonic()
    done = torchrun(str(script), str(write_config(settings(**FSDP, max_steps=10_000))))
    assert done.returncode != 0
    for words in said:
        assert words in done.stderr
    assert time.monotonic() - started < 120


def test_accelerates_file_alone_is_not_enough(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigurationError, match="Write fsdp_version: 2"):
        run(TrainConfig(**settings()), quiet())


@pytest.mark.slow
def test_accelerates_file_beside_the_keys(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """`accelerate launch` with a file that shards, of a run whose keys do."""
    launch = tmp_path / "launch.yaml"
    launch.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nnum_processes: 2\n"
        "mixed_precision: 'no'\nfsdp_config:\n  fsdp_version: 2\n"
    )
    config = write_config(settings(**FSDP, max_steps=3))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(launch), "-m", "fourfold"]
    done = subprocess.run(
        [sys.executable, *command, "train", str(config), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 3
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
