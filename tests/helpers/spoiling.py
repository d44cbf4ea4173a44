"""A GPU's engine that shows a buffer which is used too early, or too late."""

from __future__ import annotations

from typing import Any

import torch

from fourfold.offloading.engine import CudaEngine
from offloading import POISON


class Spoiling(CudaEngine):
    """Spoils a buffer as soon as it may be filled again, and fills it late."""

    def fill(self, copies: Any, after: list[torch.cuda.Event]) -> torch.cuda.Event:
        copies = list(copies)
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for event in after:
                self.stream.wait_event(event)
            for place, _ in copies:
                place.view(torch.uint8).fill_(POISON)
            torch.cuda._sleep(3_000_000)  # (about 2 ms: longer than anything that is computed here)
        return super().fill(copies, [])
