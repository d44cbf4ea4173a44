"""What a verb gives back, and the exit statuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DONE = 0
SAYS_NO = 1
WRONG_INPUT = 2
BROKEN = 3
INTERRUPTED = 130
PIPE_CLOSED = 141  # as of a program that the system ends for it


@dataclass
class Outcome:
    """Exit status, and what ``--json`` prints."""

    status: int = DONE
    data: dict[str, Any] = field(default_factory=dict)
