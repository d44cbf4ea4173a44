"""``fourfold VERB ...``: finds the verb's file, runs it, and turns exceptions into exit statuses in this one
place.

A verb's file has ``configure(parser)`` and ``execute(args, console) -> Outcome``. Files are imported by name
when their verb is asked for, and import what is heavy inside ``execute``: ``fourfold --help`` and a mistake
in a configuration file are answered before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from fourfold.cli.outcome import BROKEN, INTERRUPTED, WRONG_INPUT, Outcome
from fourfold.errors import FourfoldError
from fourfold.version import __version__

COMMANDS = {
    "train": "train an adapter as a YAML file says",
    "inspect": "experts of a model, their sizes and LoRA targets, from its configuration alone",
    "quantize": "write a packed checkpoint, streaming: the model is never in memory",
    "verify": "whether every expert of a checkpoint is packed",
    "generate": "answer a prompt",
}
OUT_OF_MEMORY_ADVICE = (
    "Lower micro_batch_size or sequence_len, set gradient_checkpointing: true, "
    "or hold the base model in 4 bit."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser(arguments).parse_args(arguments)
    except SystemExit as stop:  # argparse has said why: 0 after --help, 2 after wrong usage
        return int(stop.code or 0)
    stdout = sys.stdout
    # With --json standard output is for the result alone; whatever a library prints goes to standard error.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        outcome = _execute(args, Console(stderr=args.json))
    if args.json:
        print(json.dumps(outcome.data, ensure_ascii=False), file=stdout)
    return outcome.status


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the verb that is asked for."""
    parser = argparse.ArgumentParser(prog="fourfold", description="QLoRA of Mixture-of-Experts models.")
    parser.add_argument("--version", action="version", version=f"fourfold {__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="VERB", required=True)
    asked_for = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, purpose in COMMANDS.items():
        verb = verbs.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        verb.add_argument(
            "--json", action="store_true", help="the result as JSON on standard output, nothing else"
        )
        verb.add_argument(
            "--debug", action="store_true", help="show the traceback of an error, and library logs"
        )
        if name == asked_for:
            importlib.import_module(f"fourfold.cli.{name}").configure(verb)
    return parser


def _execute(args: argparse.Namespace, console: Console) -> Outcome:
    try:
        outcome: Outcome = importlib.import_module(f"fourfold.cli.{args.command}").execute(args, console)
        return outcome
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        status, message = explain(error)
        print(f"fourfold {args.command}: {message}", file=sys.stderr)
        problem = {"type": type(error).__name__, "message": message, "exit_status": status}
        return Outcome(status, {"error": problem})


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and message of an exception."""
    text = str(error).strip()
    if isinstance(error, FourfoldError):
        return error.exit_status, text
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if _is_out_of_memory(error):
        return BROKEN, f"out of memory ({_first_line(text)}). {OUT_OF_MEMORY_ADVICE}"
    if _is_missing_model(error):
        return WRONG_INPUT, f"{_first_line(text)} Name a folder that holds a model, or a model on the hub."
    return BROKEN, f"{type(error).__name__}: {_first_line(text)} (--debug shows the traceback)"


def _is_out_of_memory(error: BaseException) -> bool:
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _is_missing_model(error: BaseException) -> bool:
    """transformers raises a bare OSError for a model that is nowhere; one with an errno is the machine's (a
    full disk)."""
    if isinstance(error, FileNotFoundError) or type(error).__module__.startswith("huggingface_hub"):
        return True
    return isinstance(error, OSError) and error.errno is None


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "no message"
