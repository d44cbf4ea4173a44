"""Two processes on one machine, as ``torchrun`` starts them: the numbers of one with twice the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from fourfold.training import processes
from fourfold.training.run import run
from fourfold.training.sampler import LengthGroupedSampler, reach_sampler
from fourfold.training.schema import TrainConfig
from fourfold.training.trainer import with_filler
from launching import torchrun
from tiny_chat import Settings, conversation, quiet, write_jsonl


def test_two_processes_are_one_with_twice_the_batch(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """Of 44 examples, so that each epoch ends with a batch of 4, which is one process's alone."""
    examples = write_jsonl(tmp_path / "train.jsonl", [conversation(index) for index in range(44)])
    changes = {"datasets": [{"path": str(examples)}], "save_steps": 6, "save_total_limit": 1}
    expected = run(TrainConfig(**settings(**changes, output_dir=str(tmp_path / "alone"))), quiet())
    config = write_config(settings(**changes, micro_batch_size=4))
    done = torchrun("-m", "fourfold", "train", str(config), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)  # of the first process alone: two would be no JSON
    losses, others = dict(result["loss_curve"]["train"]), dict(expected.curve.train)
    assert {int(step) for step in losses} == set(others)
    assert losses == pytest.approx(others, rel=2e-4)  # sums of floats in another order, over 12 steps
    assert expected.before is not None
    assert result["held_out_loss"]["before"]["per_answer"] == pytest.approx(
        expected.before.per_answer, rel=1e-5
    )
    assert done.stderr.count("loading and packing the model") == 1  # the other prints nothing
    out = tmp_path / "out"
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-12"]
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert (tensor - alone[name]).abs().max() < 2e-3, name  # of weights that moved by 0.1
    stored = json.loads((out / "checkpoint-12" / "run.json").read_text())
    assert stored["processes (torchrun --nproc_per_node)"] == 2


def test_two_processes_resumed_see_the_batches_of_a_run_that_went_on(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """In the second epoch, whose order is not the first's."""
    examples = write_jsonl(tmp_path / "train.jsonl", [conversation(index) for index in range(44)])
    changes = {"datasets": [{"path": str(examples)}], "save_steps": 8, "max_steps": 10}
    config = write_config(settings(**changes, micro_batch_size=4))
    whole = torchrun("-m", "fourfold", "train", str(config), "--json")
    assert whole.returncode == 0, whole.stderr[-3000:]
    middle = tmp_path / "out" / "checkpoint-8"
    arguments = (f"resume_from_checkpoint={middle}", f"output_dir={tmp_path / 'again'}")
    resumed = torchrun("-m", "fourfold", "train", str(config), "--json", *arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    losses = [dict(json.loads(done.stdout)["loss_curve"]["train"]) for done in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again")]
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().max() < 1e-6, name


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("skipped", [0, 2])
def test_a_sampler_is_told_each_epoch(processes: int, skipped: int) -> None:
    """However deep accelerate has wrapped it."""
    sampler = LengthGroupedSampler([3] * 16, 4, seed=1)
    batches: Any = BatchSampler(sampler, 2, drop_last=False)
    if processes > 1:
        batches = BatchSamplerShard(batches, processes, 0)
    loader = reach_sampler(DataLoaderShard(list(range(16)), batch_sampler=batches))
    assert loader.batch_sampler is batches
    loader = skip_first_batches(loader, skipped) if skipped else loader
    loader.set_epoch(3)
    assert sampler.epoch == 3


FAILING = """
import os, sys
from fourfold.cli import main
from fourfold.errors import TrainingError
from fourfold.training import run

def fail(*args):
    raise TrainingError("one card is gone")

if os.environ["RANK"] == "1":
    run.train = fail
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_process_that_fails_ends_the_job_and_is_named(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = torchrun(str(script), str(write_config(settings(max_steps=10_000))))  # minutes, if it went on
    assert done.returncode != 0
    assert "process 1: one card is gone" in done.stderr


def test_what_is_wrong_for_all_is_said_once_and_ends_the_job(
    settings: Settings, write_config: Callable[[dict[str, Any]], Path]
) -> None:
    config = write_config(settings(base_model="nowhere/at/all"))
    done = torchrun("-m", "fourfold", "train", str(config))
    assert done.returncode != 0
    # (the other says it with its number, if the launcher takes longer than usual to end it)
    assert done.stderr.count("fourfold train: base_model: there is no folder nowhere/at/all") == 1


def test_a_last_batch_is_filled_up_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(LengthGroupedSampler([3] * 10, 4, seed=1))
    filled = LengthGroupedSampler([3] * 10, 4, seed=1, filler=10)
    assert list(filled) == [*alone, 10, 10]
    assert len(filled) == 12
    assert list(LengthGroupedSampler([3] * 8, 4, seed=1, filler=8)) == list(
        LengthGroupedSampler([3] * 8, 4, seed=1)
    )
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert processes.count() == 1


def test_what_fills_up_has_no_labels() -> None:
    rows = [{"input_ids": [1] * n, "labels": [-100] + [1] * (n - 1), "length": n} for n in (5, 3, 4)]
    longer = with_filler(Dataset.from_list(rows))
    assert len(longer) == 4
    assert longer[3] == {"input_ids": [1] * 3, "labels": [-100] * 3, "length": 3}
