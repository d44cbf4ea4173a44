"""What is said and written when a run ends, or cannot be written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.cli import main
from fourfold.errors import TrainingError
from fourfold.training import run as run_module
from fourfold.training.preflight import check
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from tiny_chat import Settings, quiet


def test_the_last_evaluation_is_logged_while_trackers_listen(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's callback closes its run at the end of training: what is logged later opens another."""
    from transformers import TrainerCallback

    heard: list[Any] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.append(logs)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            heard.append("closed")

    plain = run_module.make_trainer

    def with_tracker(*args: Any) -> Any:
        trainer = plain(*args)
        trainer.callback_handler.callbacks.insert(0, Tracker())  # where report_to puts them
        return trainer

    monkeypatch.setattr(run_module, "make_trainer", with_tracker)
    result = run(TrainConfig(**settings(max_steps=2, eval_steps=0)), quiet())
    assert heard[-1] == "closed"
    assert result.after is not None
    assert heard[-2]["eval_loss"] == result.after.mean


def test_a_checkpoint_that_cannot_be_written_is_said(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"output_dir: the checkpoint .*checkpoint-4 cannot be") as caught:
        run(TrainConfig(**settings(save_steps=2)), quiet())
    said = str(caught.value)
    assert "No space left on device" in said
    assert "Make room there, or name another output_dir." in said
    assert said.endswith(f"The last checkpoint before that is {tmp_path / 'out' / 'checkpoint-2'}.")
    again = TrainConfig(**settings(save_steps=2, auto_resume_from_checkpoints=True))
    assert check(again).checkpoint == str(tmp_path / "out" / "checkpoint-2")


def test_a_run_that_is_over_keeps_the_figures_of_its_training(settings: Settings) -> None:
    config = TrainConfig(**settings(save_steps=2, auto_resume_from_checkpoints=True))
    report = Path(config.output_dir) / "report.json"
    run(config, quiet())
    first = json.loads(report.read_text())
    assert first["series"]
    assert first["expert_load"]
    run(config, quiet())
    again = json.loads(report.read_text())
    for key in (
        "series",
        "expert_load",
        "gradient_norms",
        "tokens_per_second",
        "training_seconds",
        "started",
    ):
        assert again[key] == first[key], key
    assert again["loss_curve"]["train"] == first["loss_curve"]["train"]
    report.write_text("{")
    run(config, quiet())
    assert json.loads(report.read_text())["status"] == "done"


def test_intervals_that_the_run_ends_before_are_said(settings: Settings) -> None:
    def notes(**changes: Any) -> list[str]:
        return check(TrainConfig(**settings(**changes))).notes

    [note] = notes(eval_steps=None, evals_per_epoch=1, max_steps=4)  # an epoch is 6 steps
    assert note.startswith(
        "evals_per_epoch: 1 is every 6 steps, and the run has 4, so there is an evaluation"
    )
    assert notes(eval_steps=None, evals_per_epoch=1, max_steps=6) == []
    [note] = notes(max_steps=None, num_epochs=1, save_steps=7)
    assert note.startswith("save_steps: 7, and the run has 6 steps, so the adapter is saved at the end only")


def test_notes_reach_the_terminal(
    settings: Settings, write_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(settings(max_steps=1, warmup_steps=0, eval_steps=None, evals_per_epoch=2))
    assert main(["train", str(path)]) == 0
    assert "evals_per_epoch: 2 is every 3 steps, and the run has 1" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to(settings: Settings, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    with pytest.raises(ValueError, match="output_dir: cannot write to"):
        run(TrainConfig(**settings(output_dir=str(blocked))), quiet())
