"""Experts of a run in host memory: the configuration that loads them there, and how many come back."""

from __future__ import annotations

import copy
from typing import Any

import torch

import fourfold
from fourfold.errors import ConfigurationError
from fourfold.training import processes
from fourfold.training.schema import TrainConfig


def loading_there(config: TrainConfig, quantization_config: Any) -> Any:
    """The quantization configuration of a run, loading experts where ``experts_offload`` says.

    Args:
        config: the run's.
        quantization_config: as `preflight.make_quantization_config` makes it; None for a checkpoint that is
            packed already, whose own settings hold.

    Raises:
        ConfigurationError: the run has several processes.
    """
    if config.experts_offload is None:
        return quantization_config
    if processes.count() > 1:
        raise ConfigurationError(
            f"experts_offload: {config.experts_offload} with {processes.count()} processes: each would hold "
            "all experts in host memory. Run one, or drop this key."
        )
    if quantization_config is None:
        return fourfold.MoeBitsAndBytesConfig(
            load_in_4bit=config.load_in_4bit, load_in_8bit=config.load_in_8bit, experts_device="cpu"
        )
    made = copy.copy(quantization_config)
    made.experts_device = "cpu"
    return made


def bring_back(model: Any, config: TrainConfig, reserve: int | None) -> fourfold.OffloadReport | None:
    """With ``experts_offload: auto``, the modules that the budget has room for, back to the device.

    Args:
        model: loaded, its experts in host memory.
        config: the run's.
        reserve: what the run is planned to need besides, with what is loaded now; None where no plan is made.

    Returns:
        Where experts lie; None where all are where the model computes.

    Raises:
        ConfigurationError: there is no GPU to ask for its memory, or the budget is too small.
    """
    if config.experts_offload is None:
        return None
    if config.experts_offload == "cpu":
        report: fourfold.OffloadReport = model.hf_quantizer.offloaded
        return report
    if config.gpu_budget is not None:
        return fourfold.offload(model, config.gpu_budget)
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "experts_offload: auto asks the GPU how much memory is free, and there is none. Give gpu_budget, "
            "or set experts_offload: cpu."
        )
    return fourfold.offload(model, "auto", reserve=reserve)
