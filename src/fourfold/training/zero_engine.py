"""What a run under DeepSpeed needs of its engine: gradients looked at in time, and small checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from fourfold.training.callbacks import never_trained, not_finite, stays_zero


class EngineGradients(TrainerCallback):
    """What `FirstStepGradients` and `FiniteGradients` do, where the engine takes gradients away.

    ZeRO shares them out and takes its step before the trainer's callbacks are asked. So each gradient of this
    process is looked at as it comes, and judged just before the engine's step.

    Args:
        trainer: the one it is a callback of.
        tolerated: how many steps in a row may have a gradient that is not finite (fp16: the engine skips
            them, and lowers its scale).
    """

    def __init__(self, trainer: Any, tolerated: int = 0) -> None:
        self.trainer, self.tolerated, self.in_a_row = trainer, tolerated, 0
        self.names: dict[str, nn.Parameter] = {}
        self.norms: dict[str, torch.Tensor] = {}
        self.checked = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """The engine is there from now on."""
        engine, model = self.trainer.model_wrapped, kwargs["model"]
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in self.names.items():
            parameter.register_hook(self._see(name))
        step = engine.step

        def checked_step(*arguments: Any, **keywords: Any) -> Any:
            self._judge(state)
            return step(*arguments, **keywords)

        engine.step = checked_step
        # Stock copies the whole model's state, packed experts too, to choose the adapters among it; left to
        # itself, `save_pretrained` takes them alone (stages 0 to 2 leave them whole).
        self.trainer.accelerator.get_state_dict = lambda *_, **__: None

    def _see(self, name: str) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            known = self.norms.get(name)
            self.norms[name] = norm if known is None else known + norm

        return hook

    def _judge(self, state: TrainerState) -> None:
        """Look at what came since the last step, with one transfer from the device.

        Raises:
            TrainingError: a norm is NaN or infinite, or something has no gradient at the first step.
        """
        norms, self.norms = self.norms, {}
        found = torch.stack(list(norms.values())).cpu() if norms else torch.zeros(0)
        if not bool(torch.isfinite(found).all()):
            self.in_a_row += 1
            if self.in_a_row > self.tolerated:
                raise not_finite(state.global_step + 1, self.trainer.name_examples())
            return
        self.in_a_row = 0
        if not self.checked:
            self.checked = True
            moves = {name: norm > 0 for name, norm in zip(norms, found.tolist(), strict=True)}
            weighs = {name: bool(parameter.detach().any()) for name, parameter in self.names.items()}
            without = [n for n in self.names if n not in moves or stays_zero(n, moves, weighs)]
            if without:
                raise never_trained(without, len(self.names))
