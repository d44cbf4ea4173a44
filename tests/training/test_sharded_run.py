"""`fourfold train` with the keys of FSDP, on two processes: the numbers of one with twice the batch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fourfold.errors import ConfigurationError
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


def test_resumed_on_as_many_processes_and_on_others(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    changes = {"save_steps": 6, "micro_batch_size": 2, "gradient_accumulation_steps": 2, **FSDP}
    config = write_config(settings(**changes))
    whole = train(config)
    wanted = load_file(tmp_path / "out" / "adapter_model.safetensors")
    start = f"resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-6'}"
    for name, more, count in (("two", (), 2), ("four", ("gradient_accumulation_steps=1",), 4)):
        out = tmp_path / name
        result = train(config, start, f"output_dir={out}", *more, processes=count)
        losses, others = dict(result["loss_curve"]["train"]), dict(whole["loss_curve"]["train"])
        assert losses == pytest.approx(others, rel=1e-5), name
        for key, tensor in load_file(out / "adapter_model.safetensors").items():
            assert (tensor - wanted[key]).abs().max() < 1e-4, (name, key)
    done = torchrun("-m", "fourfold", "train", str(config), start, "micro_batch_size=1")
    assert "micro_batch_size (2 there)" in done.stderr
    alone = torchrun("-m", "fourfold", "train", str(config), start, "fsdp_version=null", "fsdp_config=null")
    assert "fsdp_version (sharded) (True there)" in alone.stderr


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
