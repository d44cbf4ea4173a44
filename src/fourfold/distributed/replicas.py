"""Data parallelism with the packed model whole on every rank (DDP): only adapters' gradients travel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fourfold.distributed.alike import check_frozen_alike
from fourfold.errors import ConfigurationError
from fourfold.experts.part import refuse_spread


def replicate(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    """Wrap a model in DDP that sends no packed bytes.

    DDP by itself broadcasts every parameter and buffer of the first rank when it is made, and buffers at
    every forward. What is frozen has come from the same checkpoint on every rank, which is checked
    here instead.

    Args:
        model: with adapters, on this rank's device.
        settings: further ones of `DistributedDataParallel`.

    Raises:
        ConfigurationError: nothing is trained, there is no process group, or the ranks hold different
            weights.
    """
    if not dist.is_initialized():
        raise ConfigurationError(
            "no process group: start the program with `torchrun --nproc_per_node N` and call "
            "torch.distributed.init_process_group first"
        )
    refuse_spread(
        model,
        "DDP would average those of different experts",
        "Leave DDP away: gradients of what the ranks have in common are averaged without it",
    )
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigurationError(
            "nothing in the model is trained; add adapters before fourfold.distributed.replicate"
        )
    device = trained[0].device
    check_frozen_alike(model, settings.get("process_group") or dist.group.WORLD, device)
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    if device.type == "cuda":
        settings.setdefault("device_ids", [torch.device(device).index])
    return DistributedDataParallel(model, **settings)
