"""The order of training examples: a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Shuffled indices with examples of similar length side by side; padding costs time.

    Like transformers' sampler of that name (shuffle, cut into runs of 50 batches, sort within each by length,
    longest batch first), but from its own generator seeded with seed and epoch: transformers' draws from
    torch's global one, whose state a resumed run does not share, so that it would see other batches than the
    run it continues.

    Args:
        lengths: of the examples.
        batch_size: examples in a step, of all processes and accumulated batches.
        seed: of the run.
        filler: the index of an example without labels. Where it is given, the last batch is filled up with
            it: processes share batches evenly, and would otherwise train some examples twice.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, filler: int | None = None) -> None:
        self.lengths = list(lengths)
        self.filler = filler
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths) + self._missing()

    def _missing(self) -> int:
        return 0 if self.filler is None else -len(self.lengths) % self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        run = self.batch_size * 50
        runs = [
            sorted(order[i : i + run], key=lambda index: -self.lengths[index])
            for i in range(0, len(order), run)
        ]
        indices = [index for part in runs for index in part]
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        # Sorted batches would train from long to short: shuffle them, but begin with the longest, so that a
        # run that will exhaust memory does so at once. A smaller last batch stays last.
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []
        longest = max(batches, key=lambda batch: self.lengths[batch[0]], default=[])
        others = [batch for batch in batches if batch is not longest]
        shuffled = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
        filled = [self.filler] * self._missing() if self.filler is not None else []
        return iter([index for batch in (longest, *shuffled, rest, filled) for index in batch])


def reach_sampler(loader: Any) -> Any:
    """Let accelerate tell the sampler each epoch; returns the same loader.

    Of several processes each has the sampler two wrappers deep, and where a resumed run skips batches there
    is a third, beyond which accelerate does not look: the rest of that epoch would be in the order of the
    first.
    """
    shared: Any = getattr(loader, "batch_sampler", None)
    sampler = getattr(getattr(shared, "batch_sampler", None), "sampler", None)
    if sampler is not None and not hasattr(shared, "sampler"):
        shared.sampler = sampler
    return loader
