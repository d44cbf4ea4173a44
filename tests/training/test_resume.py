"""Runs that go on from a checkpoint: the same numbers, the same settings, or one clear refusal."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourfold.errors import (
    ConfigurationError,
)
from fourfold.training.journal import KEPT, MOST_ROWS, Journal
from fourfold.training.preflight import check
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult, show
from tiny_chat import Settings, quiet


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    trained: tuple[RunResult, str], settings: Settings, step: int
) -> None:
    result, _ = trained
    checkpoint = Path(result.adapter) / f"checkpoint-{step}"
    torch.manual_seed(123)  # no help from a random state that happens to be the same
    resumed = run(TrainConfig(**settings(resume_from_checkpoint=str(checkpoint))), quiet())
    assert resumed.steps == 12
    losses, expected = dict(resumed.curve.train), dict(result.curve.train)
    assert losses == expected  # of the steps before the checkpoint too, as that remembers them
    assert resumed.curve.held_out == result.curve.held_out
    # The report is of the whole run: rows, gradients, experts, tokens and time.
    figures, of_whole = resumed.journal, result.journal
    assert (figures["resumed_at"], figures["counted_from_step"]) == ([step], 0)
    assert (of_whole["resumed_at"], figures["started"]) == ([], of_whole["started"])
    for key in ("step", "loss", "learning_rate", "grad_norm"):
        assert [row[key] for row in figures["series"]] == [row[key] for row in of_whole["series"]], key
    assert [row["seconds"] for row in figures["series"]] == sorted(r["seconds"] for r in figures["series"])
    assert figures["series"][:step] == of_whole["series"][:step]
    assert figures["gradient_norms"] == of_whole["gradient_norms"]
    assert figures["expert_load"] == of_whole["expert_load"]
    tokens = figures["tokens_per_second"] * figures["training_seconds"]
    assert tokens == pytest.approx(of_whole["tokens_per_second"] * of_whole["training_seconds"])
    whole, halves = (
        load_file(Path(folder) / "adapter_model.safetensors") for folder in (result.adapter, resumed.adapter)
    )
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(halves[name], tensor), name
    assert resumed.before is not None
    assert result.before is not None
    assert resumed.before.per_answer == result.before.per_answer  # "before" is the base model, here too


def test_a_checkpoint_without_figures_is_said(
    trained: tuple[RunResult, str], settings: Settings, tmp_path: Path
) -> None:
    """Those of earlier releases: what counts from there on only is named, on the page and on the terminal."""
    checkpoint = copied(trained, tmp_path, 8)
    (checkpoint / KEPT).unlink()
    stored = json.loads((checkpoint / "run.json").read_text())
    assert stored["files"].pop(KEPT) > 0  # (part of what makes a checkpoint whole)
    (checkpoint / "run.json").write_text(json.dumps(stored))
    resumed = run(TrainConfig(**settings(resume_from_checkpoint=str(checkpoint), save_steps=0)), quiet())
    assert [row["step"] for row in resumed.journal["series"]] == [9, 10, 11, 12]
    assert resumed.journal["counted_from_step"] == 8
    page = (Path(resumed.adapter) / "report.html").read_text()
    assert "speed, memory, gradients and expert load count from step 8 on" in page
    console = quiet()
    show(resumed, console)
    assert "resumed at step 8, time and speed from step 8 on" in " ".join(console.file.getvalue().split())


def test_what_a_checkpoint_keeps_of_a_long_run_is_bounded(tmp_path: Path) -> None:
    journal = Journal()
    journal.rows = [{"step": step, "loss": 1.0} for step in range(1, 100_001)]
    journal.gradient_norms = {"q_proj": [(step, 1.0) for step in range(1, 100_001)]}
    journal.keep(tmp_path)
    other = Journal()
    other.go_on_from(tmp_path, 100_000)
    steps = [row["step"] for row in other.rows]
    assert len(steps) == MOST_ROWS
    assert (steps[0], steps[-1]) == (50, 100_000)
    assert {b - a for a, b in itertools.pairwise(steps)} == {50}
    assert [step for step, _ in other.gradient_norms["q_proj"]] == steps
    assert other.resumed_at == [100_000]


def test_resume_true_takes_the_last_checkpoint(trained: tuple[RunResult, str], settings: Settings) -> None:
    result, _ = trained
    config = TrainConfig(**settings(output_dir=result.adapter, resume_from_checkpoint=True, max_steps=13))
    assert check(config).checkpoint == str(Path(result.adapter) / "checkpoint-12")
    with pytest.raises(ConfigurationError, match="is at step 12 of 12 already"):
        check(TrainConfig(**settings(output_dir=result.adapter, resume_from_checkpoint=True)))


def copied(trained: tuple[RunResult, str], tmp_path: Path, step: int = 4) -> Path:
    """A checkpoint of the run, to be spoilt."""
    result, _ = trained
    folder = tmp_path / f"checkpoint-{step}"
    shutil.copytree(Path(result.adapter) / folder.name, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model": "another"}, "base_model"),
        ({"lora_r": 4}, r"lora_r \(8 there\)"),
        ({"lora_alpha": 8}, r"lora_alpha \(16 there\)"),
        ({"peft_init_lora_weights": "loftq"}, r"peft_init_lora_weights \(True there\)"),
        ({"optimizer": "sgd"}, r"optimizer \(adamw_torch_fused there\)"),
        ({"learning_rate": 0.01}, r"learning_rate \(0.02 there\)"),
        ({"seed": 1}, r"seed \(42 there\)"),
        ({"micro_batch_size": 4}, r"micro_batch_size \(8 there\)"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps \(1 there\)"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules"),
        ({"lora_target_parameters": []}, "lora_target_parameters"),
        ({"bf16": True}, r"bf16 \(False there\)"),
        ({"adapter": "lora", "load_in_4bit": False}, r"load_in_4bit \(True there\)"),
        ({"test_datasets": None, "eval_steps": 0, "val_set_size": 4}, "datasets"),
        ({"max_steps": None, "num_epochs": 0.5}, r"is at epoch 0.66\d+ of 0.5 already"),
        ({"max_steps": 4}, "is at step 4 of 4 already"),
    ],
)
def test_a_run_resumes_with_the_settings_it_began_with(
    trained: tuple[RunResult, str],
    settings: Settings,
    moe_folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    if "base_model" in changes:  # of the same shapes
        shutil.copytree(moe_folder, tmp_path / "another")
        changes = {"base_model": str(tmp_path / "another")}
    checkpoint = str(copied(trained, tmp_path))
    with pytest.raises(ConfigurationError, match=said) as caught:
        check(TrainConfig(**settings(resume_from_checkpoint=checkpoint, **changes)))
    assert caught.value.exit_status == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("trainer_state.json", '{"global_st', "trainer_state.json is damaged"),
        ("trainer_state.json", "[]", "trainer_state.json is damaged"),
        ("trainer_state.json", '{"epoch": 1.0}', "it has no global_step"),
        ("run.json", "", "run.json is damaged"),
        ("run.json", None, "has no run.json"),
        ("optimizer.pt", None, "has no optimizer.pt"),
        ("adapter_config.json", None, "has no adapter_config.json"),
    ],
)
def test_a_torn_checkpoint(
    trained: tuple[RunResult, str], settings: Settings, tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    checkpoint = copied(trained, tmp_path)
    if text is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        check(TrainConfig(**settings(resume_from_checkpoint=str(checkpoint))))


def test_a_checkpoint_that_is_older_than_a_setting_is_resumed(
    trained: tuple[RunResult, str], settings: Settings, tmp_path: Path
) -> None:
    folder = copied(trained, tmp_path)
    stored = json.loads((folder / "run.json").read_text())
    assert stored.pop("peft_init_lora_weights") is True
    (folder / "run.json").write_text(json.dumps(stored))
    assert check(TrainConfig(**settings(resume_from_checkpoint=str(folder)))).checkpoint == str(folder)
    with pytest.raises(ConfigurationError, match=r"peft_init_lora_weights \(True there\)"):
        check(TrainConfig(**settings(resume_from_checkpoint=str(folder), peft_init_lora_weights="gaussian")))
