"""The quickstart's own check: it must say no where the reloaded model is not the one that was trained."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rich.console import Console

from fourfold.training import evaluate
from fourfold.training.read_config import load_config
from fourfold.training.run import run
from tiny_chat import conversation, write_jsonl

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quickstart = _load_script()
Finished = tuple[Path, dict[str, Any]]


def train(folder: Path, moe_folder: Path, data_files: tuple[Path, Path], **changes: Any) -> Finished:
    """A finished run: its configuration file and its report."""
    train_file, held_out = data_files
    values = {
        "base_model": str(moe_folder),
        "adapter": "qlora",
        "load_in_4bit": True,
        "datasets": [{"path": str(train_file)}],
        "test_datasets": [{"path": str(held_out)}],
        "sequence_len": 64,
        "micro_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 0.02,
        "warmup_steps": 1,
        "bf16": False,
        "eval_steps": 0,
        "save_steps": 0,
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    run(load_config(path), Console(file=io.StringIO()))
    return path, json.loads((folder / "out" / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(
    moe_folder: Path, data_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    return train(tmp_path_factory.mktemp("quickstart"), moe_folder, data_files)


def verdict(finished: Finished, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """What `check` says of a report that was tampered with."""
    path, report = finished
    doctored = json.loads(json.dumps(report))
    change(doctored)
    file = path.parent / "out" / "report.json"
    file.write_text(json.dumps(doctored))
    try:
        result: list[str] = quickstart.check([], path)
    finally:
        file.write_text(json.dumps(report))
    return result


def test_a_sound_run_passes(finished: Finished) -> None:
    assert verdict(finished, lambda report: None) == []


def off_by(when: str, by: float) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        report["held_out_loss"][when]["per_answer"][1] += by

    return change


def set_to(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (off_by("before", 2e-4), "loss before training: to 2.0e-04"),
        (off_by("after", 2e-4), "loss after training: to 2.0e-04"),
        (set_to("something else", "sample", "after"), "answers as the trained one"),
        (set_to(0.19, "held_out_loss", "improvement", "mean"), "fell by 0.2 nats"),
        (set_to(5.0, "held_out_loss", "improvement", "standard_error"), "by 3 standard errors"),
        (set_to(None, "held_out_loss", "improvement", "standard_error"), "gives no standard error"),
        (set_to(None, "held_out_loss"), "nothing was held out"),
    ],
)
def test_what_is_wrong_is_said(
    finished: Finished, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    failures = verdict(finished, change)
    assert len(failures) == 1
    assert said in failures[0]


def test_an_error_of_zero_is_no_division_by_zero(finished: Finished) -> None:
    assert verdict(finished, set_to(0.0, "held_out_loss", "improvement", "standard_error")) == []


def test_an_answer_that_did_not_change_is_said(finished: Finished) -> None:
    after = finished[1]["sample"]["after"]
    failures = verdict(finished, set_to(after, "sample", "before"))
    assert [failure.split(":")[0] for failure in failures] == ["and not as the base model"]


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "lora", "load_in_4bit": False},
        {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True},
        {"bf16": True},
    ],
)
def test_the_model_is_loaded_as_in_the_run(
    tmp_path: Path,
    moe_folder: Path,
    data_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    held_out = []
    for index in range(64):  # in two batches, of several lengths
        record = conversation(100 + index)
        record["messages"][0]["content"] += " the" * (index % 23)
        held_out.append(record)
    files = (data_files[0], write_jsonl(tmp_path / "held-out.jsonl", held_out))
    finished = train(tmp_path, moe_folder, files, **changes)
    seen: list[tuple[int, int]] = []

    def noted(model: Any, dataset: Any, collate: Any, batch_size: int) -> Any:
        seen.append((len(dataset), batch_size))
        return plain(model, dataset, collate, batch_size)

    plain = evaluate.evaluate_answers
    monkeypatch.setattr(evaluate, "evaluate_answers", noted)
    assert not [failure for failure in verdict(finished, lambda _: None) if "reloaded" in failure]
    # The run's own batches in bf16, where others would differ by more than is allowed.
    assert seen == [(64, 32) if "bf16" in changes else (8, 32)] * 2


def test_fewer_held_out_answers_than_are_compared(
    tmp_path: Path, moe_folder: Path, data_files: tuple[Path, Path]
) -> None:
    files = (data_files[0], write_jsonl(tmp_path / "few.jsonl", [conversation(100), conversation(101)]))
    finished = train(tmp_path, moe_folder, files)
    assert not [failure for failure in verdict(finished, lambda _: None) if "reloaded" in failure]


@pytest.mark.parametrize(("failures", "status"), [([], 0), (["the loss did not fall"], 1)])
def test_the_exit_status_is_the_verdict(
    failures: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(quickstart, "command", commands.append)
    monkeypatch.setattr(quickstart, "check", lambda overrides: failures)
    assert quickstart.main(["max_steps=3"]) == status
    assert [Path(command[1]).name for command in commands[:2]] == ["make_model.py", "make_data.py"]
    assert commands[2][1:] == ["train", "examples/quickstart/config.yaml", "max_steps=3"]
    assert all(failure in capsys.readouterr().err for failure in failures)


def test_a_step_that_fails_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: list[str]) -> None:
        raise subprocess.CalledProcessError(3, arguments)

    monkeypatch.setattr(quickstart, "command", fails)
    assert quickstart.main([]) == 3
