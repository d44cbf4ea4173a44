"""Which module lies in which buffer, and when a buffer may be filled again.

Bookkeeping alone. Copies and events are the engine's, so the same decisions are tested without a GPU.

A buffer is filled by the engine after everything that was computed with its last content, and is computed
with after it is filled; both are orders among the device's streams, and nothing waits on the host. It is
filled ahead of use as soon as the module in it has been used and is not among those that come next.

Uses nest, and may end by an exception: a buffer in use is never chosen, and one not in use always may be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fourfold.errors import ConfigurationError
from fourfold.offloading.order import Order


class Engine(Protocol):
    """What orders copies and computing on a device. Events are its own, and opaque.

    Attributes:
        timed: note how long computing waits for copies.
    """

    timed: bool

    def fill(self, copies: Any, after: list[Any]) -> Any:
        """Begin copies after all of ``after``; returns the event of their end."""

    def lend(self, memory: Any) -> None:
        """Copies write to ``memory`` from now on."""

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for ``event``."""

    def mark(self) -> Any:
        """The event of the end of what has been computed so far."""

    def waited_ms(self) -> float | None:
        """How long computing waited for copies since the last call, while ``timed``; None if unknown."""

    def line(self) -> Hashable:
        """Which line of computing is current (a stream): each event of one follows all earlier ones of it."""


@dataclass
class Slot:
    """A buffer.

    Attributes:
        number: which one.
        content: the module whose weights it holds, or is being filled with.
        filled: event of the end of filling.
        used: event of the end of its last use since, by line of computing (a model that has no more modules
            than buffers uses them for ever without filling them).
        users: uses that have not ended.
        part_of: the thread for which it holds a part of the module; None where it holds all of it.
    """

    number: int
    content: int | None = None
    filled: Any = None
    used: dict[Hashable, Any] = field(default_factory=dict)
    users: int = 0
    part_of: int | None = None


@dataclass
class Counts:
    """What the buffers did.

    Attributes:
        hits: uses that found their module there.
        misses: uses that did not.
        fills: copies of a module.
        parts: copies of a part of one.
        bytes: copied.
    """

    hits: int = 0
    misses: int = 0
    fills: int = 0
    parts: int = 0
    bytes: int = 0


class Schedule:
    """Buffers and the modules in them.

    Args:
        sizes: bytes of each module.
        slots: number of buffers.
        engine: orders copies and computing.
        copies: what the engine needs to copy a module (first argument) to a buffer (second).
        counts: what is counted on; None is from nothing.
    """

    def __init__(
        self,
        sizes: list[int],
        slots: int,
        engine: Engine,
        copies: Callable[[int, int], Any],
        counts: Counts | None = None,
    ) -> None:
        self.order = Order(len(sizes))
        self.counts = counts or Counts()
        # (a buffer may lie in memory that was something else's a moment ago)
        begun = engine.mark()
        self.slots = [Slot(number, used={engine.line(): begun}) for number in range(slots)]
        self._sizes, self._engine, self._copies = sizes, engine, copies
        self._lock = threading.RLock()
        self._closed = False

    def begin(self, module: int) -> int:
        """Number of the buffer that holds the module, for what is computed from now on.

        Raises:
            ConfigurationError: all buffers are in use.
        """
        with self._lock:
            slot = self._holding(module)
            if slot is None or not slot.users:
                self.order.note(module)
            if slot is None:
                self.counts.misses += 1
                slot = self._fill(module, self._free())
            elif not slot.users:
                self.counts.hits += 1
            self._wait(slot)
            slot.users += 1
            if slot.part_of is None and slot.users == 1:  # (whoever began the use around this one said so)
                try:
                    self._fill_ahead()
                except BaseException:
                    slot.users -= 1
                    raise
            return slot.number

    def begin_part(self, module: int, copies: Callable[[int], Any], nbytes: int) -> int:
        """As `begin`, where a part of the module is enough: brings that part, if the module is not there.

        Nothing is filled ahead, and nothing learned of the order: which part the next module needs is known
        when it is asked for. Until the end of the use the buffer counts as the module's for this thread.

        Args:
            module: which one.
            copies: what the engine needs to copy the part to a buffer (its argument).
            nbytes: of the part.
        """
        with self._lock:
            slot = self._holding(module)
            if slot is None:
                slot = self._free()
                slot.content, after = None, list(slot.used.values())
                slot.filled = self._engine.fill(copies(slot.number), after)
                slot.content, slot.used, slot.part_of = module, {}, threading.get_ident()
                self.counts.parts += 1
                self.counts.bytes += nbytes
            self._wait(slot)
            slot.users += 1
            return slot.number

    def end(self, number: int, *, fill_ahead: bool = True) -> None:
        """A use of buffer ``number`` has ended, by an exception or not."""
        with self._lock:
            slot = self.slots[number]
            slot.used[self._engine.line()] = self._engine.mark()
            slot.users -= 1
            if slot.users:
                return
            if slot.part_of is not None:
                slot.content = slot.part_of = None
            elif fill_ahead:
                self._fill_ahead()

    def forget(self, module: int) -> None:
        """What buffers hold of a module is no longer what it is; where it is in use it stays until then."""
        with self._lock:
            for slot in self.slots:
                if slot.content == module and not slot.users:
                    slot.content = None

    def close(self) -> None:
        """Begin no copy any more; uses that have not ended may end."""
        with self._lock:
            self._closed = True

    def _holding(self, module: int) -> Slot | None:
        me = threading.get_ident()
        return next((s for s in self.slots if s.content == module and s.part_of in (None, me)), None)

    def _free(self) -> Slot:
        """A buffer that is not in use: an empty one, or the one whose module is needed last."""
        upcoming = self.order.upcoming(len(self.slots))
        free = [s for s in self.slots if not s.users]

        def worth(slot: Slot) -> int:
            if slot.content is None:
                return -2
            return -1 if slot.content not in upcoming else len(upcoming) - upcoming.index(slot.content)

        if not free:
            raise ConfigurationError(
                f"all {len(self.slots)} buffers for offloaded experts are in use: more threads compute with "
                "the model at once than it was given buffers; pass fourfold.offload a larger `buffers`"
            )
        return min(free, key=worth)

    def _wait(self, slot: Slot) -> None:
        """(A copy that turns out to have failed leaves nothing in the buffer; the next use copies again.)"""
        try:
            self._engine.wait(slot.filled)
        except BaseException:
            slot.content = slot.part_of = None
            raise

    def _fill(self, module: int, slot: Slot) -> Slot:
        # (empty until the copy was begun: if that raises, nobody takes what is there for a module)
        slot.content, after = None, list(slot.used.values())
        slot.filled = self._engine.fill(self._copies(module, slot.number), after)
        slot.content, slot.used = module, {}
        self.counts.fills += 1
        self.counts.bytes += self._sizes[module]
        return slot

    def _fill_ahead(self) -> None:
        if self._closed:
            return
        upcoming = self.order.upcoming(len(self.slots))
        held = {s.content for s in self.slots if s.part_of is None}
        for module in upcoming:
            if module in held:
                continue
            free = [s for s in self.slots if not s.users and s.content not in upcoming]
            if not free:
                return
            self._fill(module, min(free, key=lambda s: s.content is not None))
