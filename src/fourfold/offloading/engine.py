"""Copies from host memory into buffers, and their order among what is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

Copies = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Destination and source of each copy; both lie in one piece and are alike."""


# Waits whose times are kept as events at most, before those that are over are added up.
KEPT_WAITS = 256


class HostEngine:
    """Copies at once, within host memory: there is nothing to wait for, and no time of it to measure."""

    timed = False

    def fill(self, copies: Copies, after: list[Any]) -> None:
        with torch.no_grad():
            for place, source in copies:
                place.copy_(source)

    def lend(self, memory: torch.Tensor) -> None: ...

    def wait(self, event: None) -> None: ...

    def finish(self, event: None) -> None: ...

    def mark(self) -> None: ...

    def line(self) -> None: ...

    def waited_ms(self) -> None: ...


class CudaEngine:
    """Copies on a stream of its own; everything is computed on whatever stream is current.

    Args:
        device: where it copies to.
        timed: note how long computing waited for copies (`waited_ms`). Costs two events a use.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self.device, self.timed = device, timed
        self.stream = torch.cuda.Stream(device)
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._waited = 0.0

    def fill(self, copies: Copies, after: list[torch.cuda.Event]) -> torch.cuda.Event:
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for event in after:
                self.stream.wait_event(event)
            for place, source in copies:
                place.copy_(source, non_blocking=True)
            filled = torch.cuda.Event()
            filled.record(self.stream)
        return filled

    def lend(self, memory: torch.Tensor) -> None:
        """Copies write to ``memory`` from now on. (However it goes, a model being deleted with copies under
        way included, torch gives it to nobody before they have ended.)
        """
        memory.record_stream(self.stream)

    def wait(self, event: torch.cuda.Event) -> None:
        stream = torch.cuda.current_stream(self.device)
        if not self.timed:
            stream.wait_event(event)
            return
        before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(event)
        behind.record(stream)
        self._waits.append((before, behind))
        while len(self._waits) > KEPT_WAITS and self._waits[0][1].query():
            self._add_up()

    def finish(self, event: torch.cuda.Event) -> None:
        """Hold up the host until ``event``: what was copied from may be written to afterwards."""
        event.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def line(self) -> int:
        handle: int = torch.cuda.current_stream(self.device).cuda_stream
        return handle

    def waited_ms(self) -> float:
        """Since the last call, with ``timed``; waits for the device."""
        torch.cuda.synchronize(self.device)
        while self._waits:
            self._add_up()
        waited, self._waited = self._waited, 0.0
        return waited

    def _add_up(self) -> None:
        before, behind = self._waits.popleft()
        self._waited += before.elapsed_time(behind)


def engine_for(device: torch.device) -> HostEngine | CudaEngine:
    """The engine that copies to ``device``."""
    return CudaEngine(device) if device.type == "cuda" else HostEngine()
