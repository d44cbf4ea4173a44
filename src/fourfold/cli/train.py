"""``fourfold train CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse

from rich.console import Console

from fourfold.cli.outcome import Outcome
from fourfold.cli.show import say
from fourfold.cli.validate import notes_of
from fourfold.errors import ConfigurationError
from fourfold.training.read_config import examine


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="replace a key, e.g. max_steps=20"
    )


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Validate the file (no torch yet), then run it."""
    examined = examine(args.config, args.overrides)
    if examined.config is None or examined.problems or examined.at_start:
        raise ConfigurationError(examined.refusal())
    say(console, *notes_of([*examined.instead, *examined.remarks]))

    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.training.run import run
    from fourfold.training.summary import show

    result = run(examined.config, console)
    show(result, console)
    return Outcome(data=result.to_dict())
