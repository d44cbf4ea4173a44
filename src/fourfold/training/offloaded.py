"""Experts of a run in host memory or on disk: the configuration that says so, and how many come back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import TrainerCallback

import fourfold
from fourfold.errors import ConfigurationError
from fourfold.offloading.disk import check_files
from fourfold.training import processes
from fourfold.training.schema import TrainConfig


def loading_there(config: TrainConfig, quantization_config: Any) -> Any:
    """The quantization configuration of a run, loading experts where ``experts_offload`` says.

    Args:
        config: the run's.
        quantization_config: as `preflight.make_quantization_config` makes it; None for a checkpoint that is
            packed already, whose own settings hold.

    Raises:
        ConfigurationError: the run has several processes, or experts are to be mapped from a checkpoint that
            is not packed.
    """
    where = config.experts_offload
    if where is None:
        return quantization_config
    if processes.count() > 1:
        how = "read all experts from disk" if where == "disk" else "hold all experts in host memory"
        raise ConfigurationError(
            f"experts_offload: {where} with {processes.count()} processes: each would {how}. Run one, or "
            "drop this key."
        )
    if quantization_config is None:
        made = fourfold.MoeBitsAndBytesConfig(config.load_in_8bit, config.load_in_4bit)
        made.or_disk = where == "auto"
    elif where == "disk":
        raise ConfigurationError(
            f"experts_offload: disk reads experts from a packed checkpoint, and {config.base_model} is not "
            f"packed. Pack it once, `fourfold quantize {config.base_model} FOLDER`, and set base_model to it."
        )
    else:
        made = copy.copy(quantization_config)
    made.experts_device = "disk" if where == "disk" else "cpu"
    return made


class UnchangedFiles(TrainerCallback):
    """Compares the files that experts are mapped from with what was mapped, before a run and its epochs.

    (Each use of a file looks at what the system says of it; this looks into it.)
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_files(kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_files(kwargs["model"])


def refuse_unpinnable(config: TrainConfig) -> None:
    """Before anything is loaded: memory that has to be pinned cannot be without a GPU.

    Raises:
        ConfigurationError: there is none.
    """
    if config.experts_pin_memory and not torch.cuda.is_available():
        raise ConfigurationError(
            "experts_pin_memory: there is no CUDA device to pin memory for. Drop this key to take pageable "
            "memory."
        )


def bring_back(model: Any, config: TrainConfig, reserve: int | None) -> fourfold.OffloadReport | None:
    """With ``experts_offload: auto``, the modules that the budget has room for, back to the device.

    Args:
        model: loaded, its experts in host memory.
        config: the run's.
        reserve: what the run is planned to need besides, with what is loaded now; None where no plan is made.

    Returns:
        Where experts lie; None where all are where the model computes.

    Raises:
        ConfigurationError: there is no GPU to ask for its memory, the budget is too small, or memory that has
            to be pinned is not.
    """
    if config.experts_offload is None:
        return None
    report = _brought_back(model, config, reserve)
    if config.experts_pin_memory and not report.pinned:
        raise ConfigurationError(
            f"experts_pin_memory: host memory for experts could not be pinned ({report.unpinned}). Raise the "
            "limit of locked memory (`ulimit -l unlimited`), or drop this key to take pageable memory."
        )
    return report


def _brought_back(model: Any, config: TrainConfig, reserve: int | None) -> fourfold.OffloadReport:
    loaded: fourfold.OffloadReport = model.hf_quantizer.offloaded
    if config.experts_offload != "auto":
        return loaded
    if config.gpu_budget is None and not torch.cuda.is_available():
        raise ConfigurationError(
            "experts_offload: auto asks the GPU how much memory is free, and there is none. Give gpu_budget, "
            "or set experts_offload: cpu."
        )
    budget = "auto" if config.gpu_budget is None else config.gpu_budget
    reserve = reserve if config.gpu_budget is None else None
    try:
        return fourfold.offload(model, budget, reserve=reserve)
    except ConfigurationError:
        if not loaded.disk_bytes:
            raise
    # Host memory does not hold what the budget leaves either.
    return fourfold.offload(model, budget, reserve=reserve, device="disk")
