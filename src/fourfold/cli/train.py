"""``fourfold train CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse

from rich.console import Console

from fourfold.cli.outcome import Outcome
from fourfold.training.read_config import load_config


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key, e.g. max_steps=20")


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Validate the file (no torch yet), then run it."""
    config = load_config(args.config, args.overrides)

    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.training.run import run
    from fourfold.training.summary import show

    result = run(config, console)
    show(result, console)
    return Outcome(data=result.to_dict())
