"""A run that is killed with SIGKILL, at any point, and started again: the numbers of one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fourfold.training.resume import checkpoints, commit, find_checkpoint, keep_newest
from fourfold.training.schema import TrainConfig
from tiny_chat import Settings

# Killed where the environment says: ``NAME:COUNT`` is the COUNT-th call of what NAME stands for.
DRIVER = """
import os, signal, sys, pathlib
import torch, shutil
from fourfold.cli import main
from fourfold.training import resume, run, trainer

name, count = os.environ["KILL_AT"].split(":")
calls = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def wrap(function, before):
    def called(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(count):
            before(*args)
            die()
        return function(*args, **kwargs)
    return called

def tear(value, path, *rest):
    pathlib.Path(path).write_bytes(b"half of it")

if name == "step":
    kept = trainer.MoeTrainer.training_step
    trainer.MoeTrainer.training_step = wrap(kept, lambda *args: None)
if name == "torn":
    torch.save = wrap(torch.save, tear)
if name == "commit":
    trainer.commit = wrap(trainer.commit, lambda *args: None)
if name == "delete":
    trainer.keep_newest = wrap(trainer.keep_newest, lambda *args: None)
if name == "end":
    run.save = wrap(run.save, lambda *args: None)
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start(config: Path, kill_at: str) -> subprocess.CompletedProcess[str]:
    script = config.parent / "driver.py"
    script.write_text(DRIVER)
    # Sums come out the same, bit by bit, only where as many threads share them.
    environment = {**os.environ, "KILL_AT": kill_at, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), str(config), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


def test_killed_again_and_again_it_ends_where_the_uninterrupted_run_does(
    settings: Settings,
    write_config: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    whole_run = start(write_config(settings(eval_steps=0, output_dir=str(tmp_path / "whole"))), "never:1")
    assert whole_run.returncode == 0, whole_run.stderr[-2000:]
    expected = json.loads(whole_run.stdout)
    changes = {"auto_resume_from_checkpoints": True, "save_steps": 2, "save_total_limit": 1, "eval_steps": 0}
    config = write_config(settings(**changes))
    out = tmp_path / "out"
    # Where it is killed, and the whole checkpoint that is left: in a step before there is any; while the
    # optimizer's state is half written; before the mark of a whole checkpoint, with an older one beside it;
    # before the older one is deleted; after the last checkpoint, before the adapter is saved.
    points = [
        ("step:2", None),
        ("torn:6", "checkpoint-2"),
        ("commit:2", "checkpoint-4"),
        ("delete:2", "checkpoint-8"),
        ("end:1", "checkpoint-12"),
    ]
    for point, left in points:
        assert start(config, point).returncode == -signal.SIGKILL, point
        found = find_checkpoint(TrainConfig(**settings(**changes)))
        assert found == (None if left is None else str(out / left)), point
    assert not (out / "adapter_model.safetensors").exists()
    done = start(config, "never:1")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["steps"] == 12
    assert [step for step, _ in result["loss_curve"]["train"]] == list(range(1, 13))
    assert result["loss_curve"]["train"] == expected["loss_curve"]["train"]
    assert [path.name for _, path in checkpoints(out)] == ["checkpoint-12"]
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    halves = load_file(out / "adapter_model.safetensors")
    assert whole.keys() == halves.keys()
    assert all(bool((halves[name] == tensor).all()) for name, tensor in whole.items())
    assert result["held_out_loss"]["after"] == expected["held_out_loss"]["after"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"checkpoint-{step}" for step in (4, 8, 12)]
    for age, folder in enumerate(made):
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"12345")
        commit(folder, {"seed": 1})
        os.utime(folder / "run.json", (age, age))
    return made


def test_the_newest_whole_checkpoints_are_kept(tmp_path: Path, folders: list[Path]) -> None:
    (folders[2] / "run.json").unlink()  # torn: not among those that count, and not in the way
    keep_newest(tmp_path, None)
    assert all(folder.is_dir() for folder in folders)
    keep_newest(tmp_path, 1)
    assert [folder.is_dir() for folder in folders] == [False, True, True]


def test_the_mark_of_a_whole_checkpoint_names_its_files(folders: list[Path]) -> None:
    stored = json.loads((folders[0] / "run.json").read_text())
    assert stored == {"seed": 1, "files": {"optimizer.pt": 5}}
    assert sorted(path.name for path in folders[0].iterdir()) == ["optimizer.pt", "run.json"]
