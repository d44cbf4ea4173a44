"""Losses reach W&B and MLflow, by way of stand-ins for both, and of the packages where they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from config_text import MINIMAL
from fourfold.errors import ConfigurationError
from fourfold.training.read_config import load_config
from fourfold.training.remarks import remarks
from fourfold.training.schema import TrainConfig
from fourfold.training.trackers import check_trackers
from tiny_chat import Settings
from tracker_standins import tracked, write_packages

Write = Callable[[dict[str, Any]], Path]
SHORT = {"max_steps": 3, "eval_steps": 2, "logging_steps": 1}
KEYS = {
    "wandb_project": "project",
    "wandb_name": "a run",
    "wandb_entity": "team",
    "wandb_mode": "offline",
    "mlflow_tracking_uri": "somewhere",
    "mlflow_experiment_name": "experiment",
    "mlflow_run_name": "a run",
}


def train(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what is installed is looked for once in each."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "fourfold", "train", str(path), "--json"],
        capture_output=True,
        text=True,
        env=known | environment,
    )


def test_both_are_told_the_losses_and_whose_run_it_is(
    settings: Settings, write_config: Write, tmp_path: Path
) -> None:
    path = write_config(settings(**SHORT, **KEYS))
    packages = str(write_packages(tmp_path / "site"))
    calls = tmp_path / "calls.jsonl"
    paths = os.pathsep.join([packages, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = train(path, PYTHONPATH=paths, TRACKED=str(calls))
    assert done.returncode == 0, done.stderr
    curve = json.loads(done.stdout)["loss_curve"]

    [(environment, named)] = tracked(calls, "wandb.init")
    assert named == {"project": "project", "name": "a run"}
    assert (environment["WANDB_ENTITY"], environment["WANDB_MODE"]) == ("team", "offline")
    logged = [values for values, _ in tracked(calls, "wandb.log")]
    losses = [(v["train/global_step"], v["train/loss"]) for v in logged if "train/loss" in v]
    assert losses == [tuple(point) for point in curve["train"]]
    held_out = [(v["train/global_step"], v["eval/loss"]) for v in logged if "eval/loss" in v]
    assert held_out == [tuple(point) for point in curve["held_out"] if point[0]]

    assert tracked(calls, "wandb.finish") == [[0, {}]]

    assert tracked(calls, "mlflow.set_experiment") == [["experiment", {}]]
    assert tracked(calls, "mlflow.start_run") == [["somewhere", {"run_name": "a run", "nested": False}]]
    logged = [(step, metrics) for metrics, step, _ in tracked(calls, "mlflow.log_metrics")]
    assert [(step, m["loss"]) for step, m in logged if "loss" in m] == losses
    assert [(step, m["eval_loss"]) for step, m in logged if "eval_loss" in m] == held_out
    assert len(tracked(calls, "mlflow.end_run")) == 1  # (the last held-out loss came before it)


@pytest.fixture
def standins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Importable in the test, and gone after it: a library asks whether wandb is there at any time."""

    def imported() -> dict[str, Any]:
        return {k: v for k, v in sys.modules.items() if k.partition(".")[0] in ("wandb", "mlflow")}

    before = imported()
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(write_packages(tmp_path)))
    yield
    for name in imported():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("standins")
def test_trackers_that_refuse_are_asked_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def config(**changes: Any) -> TrainConfig:
        return TrainConfig.model_validate({**MINIMAL, **changes})

    with pytest.raises(ConfigurationError, match=r"nobody is logged in to W&B. Run `wandb login`"):
        check_trackers(config(use_wandb=True))
    check_trackers(config(use_wandb=True, wandb_mode="offline"))
    check_trackers(config(use_wandb=False, wandb_project="p"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    check_trackers(config(use_wandb=True))
    with pytest.raises(ConfigurationError, match=r"to broken:db \(no such store\). Name another"):
        check_trackers(config(mlflow_tracking_uri="broken:db"))
    check_trackers(config(use_mlflow=True))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "broken:too")
    with pytest.raises(ConfigurationError, match="to broken:too"):
        check_trackers(config(use_mlflow=True))


def test_a_run_has_one_name(tmp_path: Path) -> None:
    """The trainer has one for all trackers: another would be left out."""
    path = tmp_path / "config.yaml"

    def names(**values: Any) -> dict[str, str]:
        path.write_text(yaml.safe_dump({**MINIMAL, **values}), encoding="utf-8")
        return load_config(path).run_names

    both = {"use_wandb": True, "use_mlflow": True}
    assert names(**both, mlflow_run_name="b") == {"mlflow_run_name": "b"}
    assert names(**both, mlflow_run_name="a", wandb_name="a") == {"wandb_name": "a", "mlflow_run_name": "a"}
    assert names(use_mlflow=True, use_wandb=False, mlflow_run_name="b", wandb_name="a") == {
        "mlflow_run_name": "b"
    }
    with pytest.raises(ConfigurationError, match="one name for all trackers, and here are wandb_name: a, m"):
        names(**both, mlflow_run_name="b", wandb_name="a")


def test_packages_are_named_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.model_validate({**MINIMAL, "use_wandb": True})
    for there in (None, object()):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there)
        assert ("use_wandb" in dict(remarks(config))) is (there is None)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_the_real_wandb_keeps_a_run_offline(settings: Settings, write_config: Write, tmp_path: Path) -> None:
    values = {name: value for name, value in KEYS.items() if name.startswith("wandb")}
    done = train(write_config(settings(**SHORT, **values)), WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    [stored] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    for name in (b"train/loss", b"eval/loss", b"a run", b"project"):
        assert name in content, name
    for _, loss in json.loads(done.stdout)["loss_curve"]["train"]:
        assert str(loss).encode() in content


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
def test_the_real_mlflow_stores_the_losses(settings: Settings, write_config: Write, tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    values = {name: value for name, value in KEYS.items() if name.startswith("mlflow")}
    values["mlflow_tracking_uri"] = store
    files = {"MLFLOW_ALLOW_FILE_STORE": "true"}  # (a data base needs more than mlflow-skinny)
    done = train(write_config(settings(**SHORT, **values)), **files)
    assert done.returncode == 0, done.stderr
    curve = json.loads(done.stdout)["loss_curve"]
    for metric, points in (("loss", curve["train"]), ("eval_loss", curve["held_out"][1:])):
        [path] = (tmp_path / "store").glob(f"*/*/metrics/{metric}")
        found = [line.split() for line in path.read_text().splitlines()]
        assert sorted((int(step), float(value)) for _, value, step in found) == [tuple(p) for p in points]
