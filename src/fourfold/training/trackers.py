"""W&B and MLflow: what the keys tell them, and whether they can be logged to, asked before the run."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from fourfold.errors import ConfigurationError
from fourfold.training.resume import first_line
from fourfold.training.schema import TrainConfig


def set_tracker_environment(config: TrainConfig) -> None:
    """Pass the wandb_* and mlflow_* keys on: the trainer's callbacks read them from the environment."""
    named = {
        "WANDB_PROJECT": config.wandb_project,
        "WANDB_ENTITY": config.wandb_entity,
        "WANDB_NAME": config.wandb_name,
        "WANDB_RUN_ID": config.wandb_run_id,
        "WANDB_RESUME": "allow" if config.wandb_run_id else None,
        "WANDB_MODE": config.wandb_mode,
        "WANDB_WATCH": config.wandb_watch,
        "WANDB_LOG_MODEL": config.wandb_log_model,
        "MLFLOW_TRACKING_URI": config.mlflow_tracking_uri,
        "MLFLOW_EXPERIMENT_NAME": config.mlflow_experiment_name,
    }
    os.environ.update({name: value for name, value in named.items() if value is not None})


def check_trackers(config: TrainConfig) -> None:
    """Trackers refuse at the run's first step, after the model has been loaded; they are asked before.

    Raises:
        ConfigurationError: nobody is logged in to W&B, or MLflow cannot use its store.
    """
    if "wandb" in config.trackers:
        _check_wandb(importlib.import_module("wandb"), config.wandb_mode or os.environ.get("WANDB_MODE"))
    if "mlflow" in config.trackers:
        uri = config.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        try:
            client = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)
            client.get_experiment_by_name(config.mlflow_experiment_name or "Default")
        except Exception as error:  # of MLflow, of its store, of the network
            raise ConfigurationError(
                f"mlflow_tracking_uri: nothing can be logged to {uri or 'the default store'} "
                f"({first_line(error)}). Name another, or set use_mlflow: false."
            ) from error


def _check_wandb(wandb: Any, mode: str | None) -> None:
    if mode in ("offline", "disabled", "dryrun"):
        return
    try:
        logged_in = wandb.login(prompt=False)
    except TypeError:  # (older releases would ask for a key on the terminal)
        logged_in = bool(wandb.api.api_key)
    except Exception as error:  # a key that is none
        raise ConfigurationError(f"use_wandb: W&B refuses the login ({first_line(error)}).") from error
    if not logged_in:
        raise ConfigurationError(
            "use_wandb: nobody is logged in to W&B. Run `wandb login`, set WANDB_API_KEY, or write "
            "wandb_mode: offline."
        )


@contextlib.contextmanager
def ended_with_the_run(config: TrainConfig) -> Iterator[None]:
    """W&B ends its run here rather than when the process ends, where it would print behind the result."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # (it must not hide what went wrong)
            _finish(config, 1)
        raise
    _finish(config, 0)


def _finish(config: TrainConfig, exit_code: int) -> None:
    wandb = sys.modules.get("wandb")
    if "wandb" in config.trackers and wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)
