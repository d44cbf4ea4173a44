"""What verbs show while they work and when they are done, in one place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress(console: Console, first: str) -> Iterator[Show]:
    """A bar that goes when the work is done.

    Args:
        console: where it is drawn.
        first: what is done until the first call.

    Yields:
        What to call with things done, their total, and the name of the next one.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(first, total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name or "writing")

        yield show


def say(console: Console, *lines: str) -> None:
    """Print lines as they are: not wrapped, nothing in them read as markup (paths and keys have brackets)."""
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings to standard error, ``--json`` or not."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def few(names: Iterable[str], count: int) -> str:
    """The first ``count`` of ``names``, and dots where there are more."""
    listed = list(names)
    return ", ".join(listed[:count] + ["..."] * (len(listed) > count))
