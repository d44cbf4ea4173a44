"""What a step copies, found by the very bookkeeping that copies (`schedule`), without tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.offloading.schedule import Schedule


@dataclass(frozen=True)
class Traffic:
    """Of one micro batch, once the order of uses is known.

    Attributes:
        fills: modules that are copied.
        bytes: copied.
    """

    fills: int
    bytes: int


class _NoDevice:
    """Copies nothing."""

    timed = False

    def fill(self, copies: Any, after: list[Any]) -> None: ...

    def lend(self, memory: Any) -> None: ...

    def wait(self, event: Any) -> None: ...

    def mark(self) -> None: ...

    def line(self) -> None: ...

    def waited_ms(self) -> None: ...


def traffic_of(sizes: Sequence[int], buffers: int, *, checkpointing: bool) -> Traffic:
    """What training copies: forward upwards, then each module again downwards, recomputed or not.

    Args:
        sizes: bytes of each module that is brought, in order.
        buffers: they are brought to.
        checkpointing: whether each module is computed once more before it is differentiated.
    """
    if not sizes:
        return Traffic(0, 0)
    schedule = Schedule(list(sizes), min(buffers, len(sizes)), _NoDevice(), lambda *_: None)
    before = (0, 0)
    for _ in range(3):  # (the order is learned in the first, and what the last one left is in the buffers)
        before = (schedule.counts.fills, schedule.counts.bytes)
        for module in [
            *range(len(sizes)),
            *(m for m in reversed(range(len(sizes))) for _ in range(1 + checkpointing)),
        ]:
            schedule.end(schedule.begin(module))
    return Traffic(schedule.counts.fills - before[0], schedule.counts.bytes - before[1])
