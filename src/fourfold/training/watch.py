"""What ends a run, and what is done when it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class EarlyStop(TrainerCallback):
    """Ends a run whose held-out loss has not fallen for a number of evaluations.

    The losses are read from the trainer's log, which a checkpoint keeps: a resumed run stops where the one it
    goes on with would have.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After an evaluation at this step, if there was one."""
        if self._is_over(state):
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The same."""
        return self.on_step_end(args, state, control)

    def _is_over(self, state: TrainerState) -> bool:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if len(losses) <= self.patience:
            return False
        best = min(range(len(losses)), key=losses.__getitem__)  # (the first of equal ones)
        return len(losses) - 1 - best >= self.patience


class AtTheEnd(TrainerCallback):
    """Does something when training is over, while trackers still take what is logged.

    It has to stand before the trackers' callbacks, some of which close their run at this point.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Do it."""
        self.action()


class Saved(TrainerCallback):
    """Remembers at which steps a checkpoint was written.

    Attributes:
        steps: those steps, the one resumed from included.
    """

    def __init__(self, resumed_at: int | None = None) -> None:
        self.steps = [] if resumed_at is None else [resumed_at]

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After each checkpoint."""
        self.steps.append(state.global_step)
