"""``fourfold conformance``: a tiny model of every type with experts, through all that loading promises."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from fourfold.cli.outcome import DONE, SAYS_NO, Outcome
from fourfold.cli.show import say
from fourfold.errors import ConfigurationError


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "--model-type", nargs="+", metavar="T", help="only these; the file is then compared with, not written"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/conformance.md"),
        help="the table's file (default: %(default)s)",
    )
    parser.add_argument(
        "--accept", action="store_true", help="write the file though rows got worse, or there is none"
    )


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Exit status 1 where a row got worse than the one in the file, or a new one fails, or there is no file;
    it is then left as it is.
    """
    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    import torch

    from fourfold.planning.conformance import table
    from fourfold.planning.conformance.checks import check_model_type
    from fourfold.planning.conformance.row import Row
    from fourfold.planning.conformance.tiny_models import known_types, model_types

    known = known_types()
    unknown = [t for t in args.model_type or () if t not in known]
    if unknown:
        raise ConfigurationError(f"transformers knows no model type {', '.join(unknown)}")
    before = table.read(args.out) if args.out.is_file() else {}
    rows: list[Row] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for more
    try:
        for model_type in args.model_type or model_types():
            row = check_model_type(model_type)
            if row is None:
                continue
            rows.append(row)
            _print(console, row)
    finally:  # sums of other callers in this process depend on how many threads share them
        torch.set_num_threads(threads)
    got_worse = table.worse(before, rows, args.model_type or known)
    kept = [row for model_type, row in before.items() if model_type not in known]
    passed = sum(row.passed for row in rows)
    console.print(f"{passed} of {len(rows)} model types pass", highlight=False)
    if kept and not args.model_type:
        names = ", ".join(row.model_type for row in kept)
        said = f"kept as they were, for this transformers has no such type: {names}"
        say(console, said)
    if not before and not args.model_type:
        got_worse.append("there is no such file to compare with")
    for line in got_worse:
        say(console, f"worse than in {args.out}: {line}")
    written = not args.model_type and (args.accept or not got_worse)
    if written:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table.render(rows, kept))
    data = {
        "passed": passed,
        "rows": [row.to_dict() for row in rows],
        "worse": got_worse,
        "kept": [row.model_type for row in kept],
        "written": str(args.out) if written else None,
    }
    return Outcome(SAYS_NO if got_worse and not args.accept else DONE, data)


def _print(console: Console, row: object) -> None:
    from fourfold.planning.conformance.row import FORMATS, OK, Row

    assert isinstance(row, Row)
    noise = ", ".join(f"{name} {row.noise[name]:.2g}" for name in FORMATS if name in row.noise)
    others = ", ".join(f"{check} {cell}" for check, cell in row.cells.items() if cell != OK)
    text = f"{row.model_type:<32} {row.kind}{f' ({noise})' if noise else ''}{f': {others}' if others else ''}"
    say(console, text)
    for problem in row.problems:
        say(console, f"    {problem}")
