"""What watches a run: live progress, the loss curve, memory, held-out evaluations, the first gradients."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.errors import TrainingError
from fourfold.planning.units import format_bytes
from fourfold.training import collective
from fourfold.training.evaluate import AnswerLosses

SHOWN_NAMES = 8
# Between lines where there is no terminal: seconds, and later a share of the time gone by.
FIRST_PAUSE, PAUSE_SHARE = 5.0, 0.02


def peak_memory() -> int:
    """The most bytes held so far: on the GPU by torch, without one by the whole process (resident set)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high_water if sys.platform == "darwin" else high_water * 1024


@dataclass
class Curve:
    """What is measured along the run.

    Attributes:
        train: (step, loss) at each logging step, in nats per trained token.
        held_out: (step, loss) of each evaluation.
        training_seconds: time spent in training steps; loading, evaluations and checkpoints are not in it.
        tokens: tokens of the training batches in that time.
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    training_seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Training speed."""
        return self.tokens / self.training_seconds if self.training_seconds else 0.0


class Metrics(TrainerCallback):
    """Fills a ``Curve``: the loss from the trainer's log, the clock from the start of a step to its end."""

    def __init__(self, curve: Curve, tokens_seen: Callable[[], int]) -> None:
        self.curve = curve
        self.tokens_seen = tokens_seen
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock anew: what lay between two steps was no training."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.curve.training_seconds += time.perf_counter() - self.started
        self.curve.tokens = self.tokens_seen()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the training loss."""
        if logs and "loss" in logs:
            self.curve.train.append((state.global_step, float(logs["loss"])))


class FirstStepGradients(TrainerCallback):
    """Stops the run where a trainable parameter has no gradient at the first optimizer step.

    Such a parameter is never trained (an adapter beside the path of the data), and nothing else would say so.
    A LoRA factor whose gradient is zero throughout counts as one without, unless its partner is zero (A's
    gradient at the first step, while B still is what it begins with).
    """

    def __init__(self) -> None:
        self.checked = False

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Look at each gradient once.

        Raises:
            TrainingError: names the parameters without one.
        """
        if self.checked:
            return
        self.checked = True
        trainable = {name: p for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        without = _without_gradient(kwargs["model"], trainable)
        if without:
            raise never_trained(without, len(trainable))


def never_trained(without: list[str], count: int) -> TrainingError:
    """What is said where some of so many trainable parameters have no gradient."""
    more = f" and {len(without) - SHOWN_NAMES} more" if len(without) > SHOWN_NAMES else ""
    return TrainingError(
        f"{len(without)} of {count} trainable parameters have no gradient after the first step, so they "
        f"would never be trained: {', '.join(without[:SHOWN_NAMES])}{more}. Take their targets out of "
        "lora_target_modules or lora_target_parameters, or report this model."
    )


def _without_gradient(model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[str]:
    """Names of parameters that no gradient reaches; of a sharded model, in any process."""
    gradients = [p.grad is not None and bool(collective.here(p.grad).any()) for p in trainable.values()]
    values = [bool(collective.here(p.detach()).any()) for p in trainable.values()]
    if collective.is_sharded(model):
        flags = [float(flag) for flag in (*gradients, *values)]
        found = [flag > 0 for flag in collective.sum_of(flags, collective.device_of(model))]
        gradients, values = found[: len(gradients)], found[len(gradients) :]
    moves, weighs = dict(zip(trainable, gradients, strict=True)), dict(zip(trainable, values, strict=True))
    return [name for name, p in trainable.items() if p.grad is None or stays_zero(name, moves, weighs)]


def stays_zero(name: str, moves: dict[str, bool], weighs: dict[str, bool]) -> bool:
    """Whether a LoRA factor has a gradient of zeros alone although its partner passes one on.

    Args:
        name: of the factor.
        moves: of each parameter, whether its gradient is anything but zeros.
        weighs: the same of its values.
    """
    for own, other in (("lora_A.", "lora_B."), ("lora_B.", "lora_A.")):
        partner = name.replace(own, other)
        if own in name and partner in weighs:
            return not moves[name] and weighs[partner]
    return False


class FiniteGradients(TrainerCallback):
    """Stops the run before an optimizer step with a gradient that is not finite.

    The loss may be finite all the same, and one such step ruins every adapter whose gradients were clipped by
    the common norm.

    Args:
        batch: names the examples of this step, for the message.
        tolerated: how many steps in a row may have such a gradient: in fp16 the scaler skips a step that
            overflows and halves its scale, from 65,536 down.
    """

    def __init__(self, batch: Callable[[], str] = str, tolerated: int = 0) -> None:
        self.batch, self.tolerated, self.in_a_row = batch, tolerated, 0

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Look at the norm of each gradient, with one transfer from the device.

        Raises:
            TrainingError: a norm is NaN or infinite.
        """
        model = kwargs["model"]
        gradients = [collective.here(p.grad) for p in model.parameters() if p.grad is not None]
        if not gradients:
            return
        norms = torch.stack([norm.float().to(gradients[0].device) for norm in torch._foreach_norm(gradients)])
        sound = bool(torch.isfinite(norms).all())
        if collective.is_sharded(model):  # (all stop, or none)
            sound = collective.sum_of([float(not sound)], collective.device_of(model)) == [0.0]
        if sound:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row > self.tolerated:
            raise not_finite(state.global_step + 1, self.batch())


def not_finite(step: int, examples: str) -> TrainingError:
    """What is said of a gradient that is not finite, at a step (from 1) on examples."""
    return TrainingError(
        f"A gradient at step {step} is not finite; the step was not taken{examples}. Lower learning_rate, or "
        "look for damaged rows in the data."
    )


class HeldOut(TrainerCallback):
    """Evaluates at the steps asked for, with the same measure as before and after the run.

    Args:
        evaluate: the loss on the held-out answers as they stand.
        curve: where the losses go.
        every: a number of steps, a fraction of the run, 0 for never, None for each epoch.
        log: where losses go beside, as the trainer's own evaluation would log them.
    """

    def __init__(
        self,
        evaluate: Callable[[], AnswerLosses],
        curve: Curve,
        every: float | None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.curve = curve
        self.every = every
        self.log = log

    def _run(self, state: TrainerState, control: TrainerControl) -> None:
        # The last step is followed by the final evaluation: not twice.
        if state.global_step < state.max_steps:
            loss = self.evaluate().mean
            self.curve.held_out.append((state.global_step, loss))
            if self.log is not None:
                due = control.should_log
                self.log({"eval_loss": loss})
                control.should_log = due  # logging clears it, and this step's training loss is yet to come

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluate where the step is one of those asked for."""
        if not self.every:
            return
        steps = math.ceil(state.max_steps * self.every) if self.every < 1 else int(self.every)
        if state.global_step % steps == 0:
            self._run(state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluate where each epoch was asked for."""
        if self.every is None:
            self._run(state, control)


class Progressing(TrainerCallback):
    """A bar on a terminal, lines elsewhere: step, loss, tokens a second, memory, time left.

    The bar moves at every step, logged or not. Lines come at once for the first logged step, then at most one
    in `FIRST_PAUSE` seconds and later one in `PAUSE_SHARE` of the time gone by: a file of a day's run has
    some hundred of them.
    """

    def __init__(self, console: Console, curve: Curve) -> None:
        self.console = console
        self.curve = curve
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.first_step = 0
        self.started = self.printed = 0.0
        self.status = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self.first_step, self.started = state.global_step, time.perf_counter()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}", markup=False),
                TextColumn("{task.fields[left]}"),
                console=self.console,
                expand=True,
            )
            self.task = self.bar.add_task(
                "train", total=state.max_steps, completed=state.global_step, status="the first step", left=""
            )
            self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=state.global_step, left=f"{self._left(state)} left")

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Say the loss: beside the bar, or in a line."""
        if not logs or "loss" not in logs:
            return
        memory = format_bytes(peak_memory())
        self.status = (
            f"loss {float(logs['loss']):.3f}  {self.curve.tokens_per_second:,.0f} tokens/s  {memory}"
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=state.global_step, status=self.status)
            return
        now = time.perf_counter()
        pause = max(FIRST_PAUSE, PAUSE_SHARE * (now - self.started))
        if self.printed and now - self.printed < pause and state.global_step < state.max_steps:
            return
        self.printed = now
        self.console.print(
            f"step {state.global_step:,}/{state.max_steps:,}  {self.status}  {self._left(state)} left",
            soft_wrap=True,
            highlight=False,
        )

    def _left(self, state: TrainerState) -> str:
        """The time that the remaining steps take, evaluations and checkpoints as so far."""
        done = state.global_step - self.first_step
        if done < 1:
            return "?"
        gone = max(self.curve.training_seconds, time.perf_counter() - self.started)
        left = gone / done * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def close(self) -> None:
        """Take the bar down; also after an exception."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the bar down."""
        self.close()
