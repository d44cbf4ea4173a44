"""``fourfold data CONFIG [key=value ...]``: the first examples as the model will see them, trained tokens
marked."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rich.console import Console
from rich.text import Text

from fourfold.cli.outcome import Outcome
from fourfold.cli.show import say
from fourfold.errors import ConfigurationError
from fourfold.training.read_config import load_config

# What stands around trained tokens where there are no colours.
MARKS = ("⟦", "⟧")
PLAIN_MARKS = ("[[", "]]")  # for a console that cannot write those
TRAINED = "bold green"
# Texts are shown, never obeyed: an escape sequence in one would act on the terminal.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="replace a key, e.g. sequence_len=64"
    )
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="how many to show (3)")


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Read and tokenize the data as `fourfold train` would."""
    if args.examples < 0:
        raise ConfigurationError(f"--examples {args.examples}: give a whole number, 0 for counts alone.")
    config = load_config(args.config, args.overrides)

    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.training.preview import preview

    found = preview(config, args.examples)
    marks = MARKS if _writes(console, MARKS) else PLAIN_MARKS
    coloured = console.is_terminal and not console.no_color
    for number, example in enumerate(found.examples, 1):
        heading = f"example {number}: {example.tokens} tokens, {example.trained_tokens} of them trained"
        console.print(heading, style="dim", highlight=False)
        line = Text()
        for raw, trained in example.runs:
            text = raw.translate(_CONTROLS)
            if coloured:
                line.append(text, style=TRAINED if trained else "")
            else:
                line.append(f"{marks[0]}{text}{marks[1]}" if trained else text)
        console.print(line, soft_wrap=True)
        console.print()
    say(console, *found.notes)
    say(console, f"trained on: {_counts(found.train)}")
    if found.held_out is not None:
        say(console, f"held out:   {_counts(found.held_out)}")
    data: dict[str, Any] = {
        "examples": [dataclasses.asdict(example) for example in found.examples],
        "train": found.train,
        "held_out": found.held_out,
        "bad_records": found.bad,
    }
    return Outcome(data=data)


def _writes(console: Console, marks: tuple[str, str]) -> bool:
    try:
        "".join(marks).encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _counts(counts: dict[str, int]) -> str:
    text = f"{counts['examples']} examples, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained"
    if "packed_rows" in counts:
        text += f"; in {counts['packed_rows']} rows"
    if counts["truncated"]:
        text += f"; {counts['truncated']} cut to sequence_len"
    if counts["dropped"]:
        text += f"; {counts['dropped']} dropped for their length"
    return text
