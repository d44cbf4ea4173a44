"""Packages `wandb` and `mlflow` that write down what they are told, as far as the trainer's callbacks ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_RECORD = """\
import json, os
def record(what, *values, **named):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps([what, *values, named], default=str) + "\\n")
"""
_WANDB = (
    _RECORD
    + """\
__version__ = "0.20.0"
run = None
class Run:
    id, name, url, entity, project, summary = "1", "run", "", "", "", {}
    def _label(self, **named): pass
    def log(self, values, **named): record("wandb.log", values)
config = {}
class Config(dict):
    def update(self, *a, **k): dict.update(self, *a)
config = Config()
summary = {}
def login(prompt=True): return bool(os.environ.get("WANDB_API_KEY"))
def init(**named):
    global run
    names = [n for n in os.environ if n.startswith("WANDB_")]
    record("wandb.init", {n: os.environ[n] for n in names}, **named)
    run = Run()
    return run
def define_metric(*a, **k): pass
def log(values, **named): record("wandb.log", values)
def watch(*a, **k): record("wandb.watch", log=k.get("log"))
def finish(exit_code=None): record("wandb.finish", exit_code)
"""
)
_MLFLOW = (
    _RECORD
    + """\
from types import SimpleNamespace
__version__ = "3.0.0"
utils = SimpleNamespace(
    validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
)
_state = {"uri": None, "run": None}
class MlflowClient:
    def __init__(self, tracking_uri=None):
        if str(tracking_uri).startswith("broken:"):
            raise RuntimeError("no such store\\nmore")
    def get_experiment_by_name(self, name): return None
def is_tracking_uri_set(): return _state["uri"] is not None
def set_tracking_uri(uri): _state["uri"] = uri
def get_tracking_uri(): return _state["uri"]
def active_run(): return _state["run"]
def set_experiment(name): record("mlflow.set_experiment", name)
def start_run(**named):
    record("mlflow.start_run", _state["uri"], **named)
    _state["run"] = SimpleNamespace(info=SimpleNamespace(run_id="1"))
def log_params(values, **named): pass
def log_metrics(metrics, step=None, **named): record("mlflow.log_metrics", metrics, step)
def end_run():
    record("mlflow.end_run")
    _state["run"] = None
"""
)


def write_packages(folder: Path) -> Path:
    """Write both; ``folder`` is to be put into PYTHONPATH."""
    inner = folder / "wandb" / "sdk" / "lib"
    inner.mkdir(parents=True)
    for package in (inner, inner.parent):
        (package / "__init__.py").write_text("")
    (inner / "config_util.py").write_text("class ConfigError(Exception): pass\n")
    (folder / "wandb" / "__init__.py").write_text(_WANDB)
    (folder / "mlflow").mkdir()
    (folder / "mlflow" / "__init__.py").write_text(_MLFLOW)
    return folder


def tracked(path: Path, what: str) -> list[Any]:
    """The calls of that name, in order: positional arguments, and the named ones last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line[1:] for line in lines if line[0] == what]
