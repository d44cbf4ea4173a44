"""``fourfold schema``: JSON Schema of the configuration file, for editors."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from fourfold.cli.outcome import Outcome
from fourfold.training.json_schema import json_schema


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Print it; with ``--json`` the same, on one line."""
    schema = json_schema()
    if not args.json:
        print(json.dumps(schema, indent=2, ensure_ascii=False))
    return Outcome(data=schema)
