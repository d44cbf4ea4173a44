"""``fourfold validate CONFIG [key=value ...]``: whether `fourfold train` would take a file, in no time."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from fourfold.cli.outcome import DONE, SAYS_NO, Outcome
from fourfold.cli.show import say
from fourfold.training.read_config import examine
from fourfold.training.yaml_file import Problem


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="replace a key, e.g. max_steps=20"
    )


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Exit status 1 where anything is wrong or not yet; neither data nor model are looked at."""
    examined = examine(args.config, args.overrides)
    wrong = [problem for problem in examined.problems if not problem.not_yet]
    missing = [problem for problem in examined.problems if problem.not_yet]
    if examined.sound:
        say(console, f"{args.config}: valid")
    else:
        say(console, examined.complaint())
    if examined.at_start:
        say(console, "Accepted, but a run is refused:", *(f"  {problem}" for problem in examined.at_start))
    for title, notes in (("Given differently", examined.instead), ("Note", examined.remarks)):
        if notes:
            say(console, f"{title}:", *(f"  {note}" for note in notes_of(notes)))
    data: dict[str, Any] = {
        "valid": examined.sound,
        "problems": _rows(wrong),
        "not_yet": _rows(missing),
        "refused_at_start": _rows(examined.at_start),
        "given_differently": _rows(examined.instead),
        "remarks": _rows(examined.remarks),
        "config": None if examined.config is None else examined.config.model_dump(mode="json"),
    }
    return Outcome(DONE if examined.sound else SAYS_NO, data)


def notes_of(notes: Iterable[Problem]) -> list[str]:
    """A line for each thing to know; keys with the same to say share one."""
    together: dict[str, list[str]] = {}
    for note in notes:
        together.setdefault(note.what, []).append(f"{note.where}, {note.key}" if note.where else note.key)
    return [f"{'; '.join(dict.fromkeys(keys))}: {what}" for what, keys in together.items()]


def _rows(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    rows = []
    for problem in problems:
        row = dataclasses.asdict(problem)
        del row["path"]
        line = problem.where.removeprefix("line ")
        row["line"] = int(line) if line.isdigit() else None
        rows.append(row)
    return rows
