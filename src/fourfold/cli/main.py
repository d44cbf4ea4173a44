"""``fourfold VERB ...``: finds the verb's file, runs it, and turns exceptions into exit statuses in this one
place.

A verb's file has ``configure(parser)`` and ``execute(args, console) -> Outcome``. Files are imported by name
when their verb is asked for, and import what is heavy inside ``execute``: ``fourfold --help`` and a mistake
in a configuration file are answered before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import select
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console

from fourfold.cli.outcome import BROKEN, INTERRUPTED, PIPE_CLOSED, WRONG_INPUT, Outcome
from fourfold.errors import FourfoldError
from fourfold.training import processes
from fourfold.training.strict_json import dumps
from fourfold.version import __version__

COMMANDS = {
    "train": "train an adapter as a YAML file says",
    "validate": "whether train would take a YAML file: every problem, with line and remedy",
    "schema": "the keys of the YAML file as JSON Schema, for editors",
    "data": "the first training examples as the model sees them, trained tokens coloured",
    "plan": "the memory of a run, whether it fits a card, and what would make it fit",
    "inspect": "experts of a model, their sizes and LoRA targets, from its configuration alone",
    "quantize": "write a packed checkpoint, streaming: the model is never in memory",
    "merge": "a checkpoint with an adapter added to its weights, streaming",
    "verify": "whether every expert of a checkpoint is packed",
    "export": "rewrite an adapter for servers that know experts one by one, or back",
    "generate": "answer a prompt",
    "conformance": "a tiny model of every type with experts through loading, saving and back",
}
OTHERS_WAIT_SECONDS = 2.0
OUT_OF_MEMORY_ADVICE = (
    "Lower micro_batch_size or sequence_len, set gradient_checkpointing: true, "
    "or hold the base model in 4 bit."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read standard output has gone (`fourfold schema | head`): nothing is left to be said,
        # neither here nor by the interpreter, which flushes once more when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _main(arguments: list[str]) -> int:
    stdout = sys.stdout
    try:
        args = parse(arguments)
    except SystemExit as stop:  # after --help or --version
        return int(stop.code or 0)
    except UsageError as error:
        print(error.usage, f"{error.program}: {error}", sep="", file=sys.stderr)
        if "--json" in arguments:
            print(dumps(_problem(error, WRONG_INPUT, str(error))), file=stdout)
        return WRONG_INPUT
    # With --json standard output is for the result alone; whatever a library prints goes to standard error.
    first = processes.is_first()
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        outcome = _execute(args, _Console(stderr=args.json, quiet=not first))
    if args.json and first:
        print(dumps(outcome.data), file=stdout)
    return outcome.status


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """(rich would leave the program here, with the status of a check that says no.)"""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class UsageError(Exception):
    """Arguments that cannot be understood; argparse itself would end the process there."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.usage = parser.format_usage()
        self.program = parser.prog


class Parser(argparse.ArgumentParser):
    """``argparse``'s parser, which raises instead of leaving: with ``--json`` there is something to print."""

    def error(self, message: str) -> NoReturn:
        """Raise ``UsageError``."""
        raise UsageError(self, message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments; ``key=value`` pairs may stand after options too.

    Raises:
        UsageError: they cannot be understood.
    """
    parser = build_parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    # argparse gives a verb's positional arguments out once, before or after the options: what is left of a
    # list of them is appended here.
    if rest and hasattr(args, "overrides") and not any(text.startswith("-") for text in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the verb that is asked for."""
    parser = Parser(prog="fourfold", description="QLoRA of Mixture-of-Experts models.")
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
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise
        if args.debug:
            traceback.print_exc()
        status, message = explain(error)
        who = ""
        if not processes.is_first():
            # What is wrong for all is said by the first one, whose launcher ends the others meanwhile.
            time.sleep(OTHERS_WAIT_SECONDS)
            who = f"process {processes.rank()}: "
        print(f"fourfold {args.command}: {who}{message}", file=sys.stderr)
        return Outcome(status, _problem(error, status, message))


def _reader_has_gone() -> bool:
    """Whether it is standard output that cannot be written to (and no connection of a library's)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # (no such call on this system; no file behind it)
        return True


def _problem(error: BaseException, status: int, message: str) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": message, "exit_status": status}}


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
