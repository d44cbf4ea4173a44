"""A run whose model is sharded over its processes (`fsdp_keys`): loading, sharding, checkpoints.

The model is loaded in shards, given its adapters, and sharded before anything computes with it: evaluations
and answers go through it as training does. So the trainer finds it made, and leaves it as it is. Loss,
clipping and optimizer are those of any run; what is ours is that all processes take part in saving and
resuming.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from fourfold.distributed import load_checkpoint, load_sharded, save_checkpoint, shard
from fourfold.loading.skeleton import build_skeleton
from fourfold.training import processes
from fourfold.training.fsdp_keys import Sharding
from fourfold.training.resume import SHARDS
from fourfold.training.schema import TrainConfig
from fourfold.training.trainer import MoeTrainer


def load_shares(config: TrainConfig, wanted: Sharding, arguments: dict[str, Any]) -> Any:
    """The base model, of which this process reads, packs and keeps its share.

    Args:
        config: the run's.
        wanted: how it is sharded.
        arguments: of ``from_pretrained``, without a place.
    """
    device = None
    if wanted.offload and config.load_in_4bit:  # (8-bit Linears stay whole, where they are computed with)
        device = "cpu"
    skeleton = build_skeleton(config.base_model, None, config.trust_remote_code, causal=True)
    return load_sharded(config.base_model, device=device, model_class=type(skeleton), **arguments)


def shard_model(model: Any, wanted: Sharding) -> Any:
    """The model with its adapters, sharded."""
    return shard(
        model,
        reshard_after_forward=wanted.reshard_after_forward,
        offload=CPUOffloadPolicy() if wanted.offload else None,
    )


class ShardedTrainer(MoeTrainer):
    """`MoeTrainer` of a model that is sharded already."""

    def create_accelerator_and_postprocess(self) -> None:
        """An accelerator that wraps the model in nothing, and moves it nowhere."""
        super().create_accelerator_and_postprocess()
        stock = self.accelerator.prepare_model

        @functools.wraps(stock)
        def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            made: nn.Module = stock(model, device_placement=False, evaluation_mode=True)
            return made

        self.accelerator.prepare_model = prepare_model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole adapter, put together by all processes; the first one writes."""
        if not processes.is_first():
            self.model.save_pretrained(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if processes.is_first():  # (releases before 5.23 call it there only, later ones everywhere)
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_checkpoint(Path(output_dir) / SHARDS, self.model, _bare_optimizer(self.optimizer))
        if processes.is_first():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_checkpoint(Path(resume_from_checkpoint) / SHARDS, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_checkpoint(Path(checkpoint) / SHARDS, self.model, _bare_optimizer(self.optimizer))
        state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(state)


def _bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Without what accelerate puts around it."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
