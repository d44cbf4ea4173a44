"""Whether a plan fits a card, and the smallest changes that make it fit.

Each change is planned again before it is suggested. First every change by itself, as mild as suffices; where
none does, they are put together in the order of what they cost the result, and those that turn out to be
needless are taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fourfold.planning.card import CONTEXT_BYTES, room
from fourfold.planning.plan import Plan, Planner, Settings

IN_8BIT = {
    "adamw_torch": "adamw_8bit",
    "adamw_torch_fused": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit",
    "lion_32bit": "lion_8bit",
    "ademamix": "ademamix_8bit",
    "paged_ademamix_32bit": "paged_ademamix_8bit",
    "rmsprop_bnb": "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit": "rmsprop_bnb_8bit",
}
SMALLEST_RANK, SHORTEST = 4, 256

__all__ = ["CONTEXT_BYTES", "Suggestion", "room", "suggest"]


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a run fit, and the plan with them.

    Attributes:
        keys: of the configuration file, and their values.
        plan: with these.
    """

    keys: dict[str, Any]
    plan: Plan

    def __str__(self) -> str:
        return ", ".join(f"{key}: {_yaml(value)}" for key, value in self.keys.items())


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Step = tuple[Settings, dict[str, Any]]


def _checkpointing(settings: Settings) -> Iterator[Step]:
    if not settings.checkpointing:
        yield replace(settings, checkpointing=True), {"gradient_checkpointing": True}


def _optimizer(settings: Settings) -> Iterator[Step]:
    if settings.optimizer in IN_8BIT:
        name = IN_8BIT[settings.optimizer]
        yield replace(settings, optimizer=name), {"optimizer": name}


def _batch(settings: Settings) -> Iterator[Step]:
    """Halves, with as many more micro batches a step: the same examples in each."""
    batch, accumulation = settings.batch, settings.accumulation
    while batch % 2 == 0 or batch > 1:
        smaller = batch // 2 if batch % 2 == 0 else 1
        accumulation, batch = accumulation * batch // smaller, smaller
        padded = settings.padded and batch > 1
        keys = {"micro_batch_size": batch, "gradient_accumulation_steps": accumulation}
        yield replace(settings, batch=batch, accumulation=accumulation, padded=padded), keys


def _offload(settings: Settings) -> Iterator[Step]:
    """Experts that the card has no room for in host memory: the same numbers, and steps that may take longer
    (of a run that keeps them on the card now, and is of one process: `card` is known).
    """
    away = settings.experts_offload or getattr(settings.quantization, "experts_device", None)
    if away is None and settings.card is not None:
        yield replace(settings, experts_offload="auto"), {"experts_offload": "auto"}


def _rank(settings: Settings) -> Iterator[Step]:
    r = settings.r
    while r >= 2 * SMALLEST_RANK and not settings.rank_pattern:
        r //= 2
        yield replace(settings, r=r), {"lora_r": r}


def _length(settings: Settings) -> Iterator[Step]:
    length = settings.length
    while length >= 2 * SHORTEST:
        length //= 2
        yield replace(settings, length=length), {"sequence_len": length}


def _targets(settings: Settings) -> Iterator[Step]:
    if settings.target_parameters != () and settings.target_modules != ():
        yield replace(settings, target_parameters=()), {"lora_target_parameters": []}


# By what they cost the result: nothing, next to nothing, and then more and more.
CHANGES = (_checkpointing, _batch, _optimizer, _offload, _rank, _targets, _length)


def suggest(planner: Planner, settings: Settings, available: int) -> list[Suggestion]:
    """Changes that bring the peak down to ``available`` bytes: each alone, or else one set of several.

    Returns:
        Nothing where it fits as it is, or where no change suffices.
    """
    if planner.plan(settings).peak <= available:
        return []
    found = []
    for change in CHANGES:
        step = _mildest(planner, change(settings), available)
        if step is not None:
            found.append(Suggestion(step[1], planner.plan(step[0])))
    return found or _together(planner, settings, available)


def _mildest(planner: Planner, steps: Iterator[Step], available: int) -> Step | None:
    """The first of ever stronger steps that suffices; the strongest is tried first."""
    candidates = list(steps)
    if not candidates or planner.floor(candidates[-1][0]) > available:
        return None
    if planner.plan(candidates[-1][0]).peak > available:
        return None
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        settings = candidates[middle][0]
        if planner.floor(settings) <= available and planner.plan(settings).peak <= available:
            high = middle
        else:
            low = middle + 1
    return candidates[low]


def _together(planner: Planner, settings: Settings, available: int) -> list[Suggestion]:
    taken: list[Any] = []
    current = settings
    for change in CHANGES:
        steps = list(change(current))
        if not steps:
            continue
        taken.append(change)
        mildest = _mildest(planner, iter(steps), available)
        if mildest is None:
            current = steps[-1][0]
            continue
        # It suffices with this one. Which of those before are needless now?
        for other in list(taken[:-1]):
            fewer = [each for each in taken if each is not other]
            if _reach(planner, settings, fewer, available) is not None:
                taken = fewer
        reached = _reach(planner, settings, taken, available)
        assert reached is not None
        return [Suggestion(reached[1], planner.plan(reached[0]))]
    return []


def _reach(planner: Planner, settings: Settings, changes: list[Any], available: int) -> Step | None:
    """All of ``changes`` but the last at their strongest, the last as mild as suffices."""
    keys: dict[str, Any] = {}
    for change in changes[:-1]:
        steps = list(change(settings))
        if steps:
            settings = steps[-1][0]
            keys |= steps[-1][1]
    last = _mildest(planner, changes[-1](settings), available)
    return None if last is None else (last[0], keys | last[1])
