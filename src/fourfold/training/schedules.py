"""Settings of learning-rate schedules, and which schedule takes which.

Imports neither torch nor transformers; a test compares the table with transformers' functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fourfold.training.yaml_file import Problem, nearest

if TYPE_CHECKING:
    from fourfold.training.schema import TrainConfig

# Schedule -> its settings; those that are texts are in TEXTS, whole numbers in WHOLE.
SETTINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
TEXTS = ("warmup_type", "decay_type")
SHAPES = ("linear", "cosine", "1-sqrt")
WHOLE = ("timescale", "num_decay_steps", "num_stable_steps")
# Of each group one is needed.
NEEDED: dict[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def schedule_contradictions(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Settings that the schedule lacks or needs, and of a wrong kind."""
    keys = ("lr_scheduler_kwargs", "lr_scheduler")
    name, given = config.lr_scheduler, config.lr_scheduler_kwargs
    known = SETTINGS[name]
    for setting, value in given.items():
        key = f"lr_scheduler_kwargs.{setting}"
        if setting not in known:
            remedy = nearest(setting, known) if known else "Drop it, or choose another lr_scheduler."
            yield keys, Problem(key, f"lr_scheduler: {name} has no such setting", remedy)
        elif setting in TEXTS and value not in SHAPES:
            yield keys, Problem(key, f"{value} is no shape", f"Give {', '.join(SHAPES)}.")
        elif setting not in TEXTS and (isinstance(value, str) or value < 0):
            yield keys, Problem(key, f"{value} is no number from 0 on", "Give one.")
        elif setting in WHOLE and value != int(value):
            yield keys, Problem(key, f"{value} is no whole number", "Give one.")
    needed = NEEDED.get(name, ())
    chosen = [setting for setting in needed if setting in given]
    if needed and not chosen:
        what = f"lr_scheduler: {name} needs {' or '.join(needed)}"
        yield keys, Problem(keys[0], what, f"Write lr_scheduler_kwargs: {{{needed[-1]}: ...}}.")
    elif len(chosen) > 1:
        yield keys, Problem(keys[0], f"{' and '.join(chosen)} say the same twice", "Keep one of the two.")
    if config.cosine_min_lr_ratio is not None and (name != "cosine" or given):
        what = "is of lr_scheduler: cosine" if name != "cosine" else "given beside lr_scheduler_kwargs"
        remedy = "Drop it, or write lr_scheduler: cosine_with_min_lr with lr_scheduler_kwargs."
        every = ("cosine_min_lr_ratio", *keys)
        yield every, Problem(every[0], what, remedy)


def schedule_arguments(config: TrainConfig) -> dict[str, Any]:
    """The trainer's arguments for the schedule."""
    if config.cosine_min_lr_ratio:
        rate = {"min_lr_rate": config.cosine_min_lr_ratio}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": rate}
    kwargs = {
        setting: int(value) if isinstance(value, float) and value.is_integer() else value
        for setting, value in config.lr_scheduler_kwargs.items()
    }
    return {"lr_scheduler_type": config.lr_scheduler, "lr_scheduler_kwargs": kwargs or None}
