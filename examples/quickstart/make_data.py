"""Make question and answer pairs out of the docstrings of the running Python's standard library.

    python examples/quickstart/make_data.py                       # examples/quickstart/out/data/*.jsonl
    python examples/quickstart/make_data.py --max-train 2000 --max-answer-words 30

Nothing is downloaded and nobody's text is shipped: the text is read from the Python that runs this file. Each
line of ``train.jsonl`` and ``held_out.jsonl`` is one chat,

    {"messages": [{"role": "system", "content": "You explain Python."},
                  {"role": "user", "content": "What does `shlex.quote(s)` in Python's standard library do?"},
                  {"role": "assistant", "content": "Return a shell-escaped version of the string *s*."}]}

- **Nothing is executed.** Source files are parsed with ``ast``, never imported, so a module that opens a
  browser or a window when imported is harmless. Modules written in C have no source and are left out.
- **The answer** is the first paragraph of the docstring on one line. Dropped are those that are too short or
  too long, hold doctests, tables or other markup, do not end like a sentence, or belong to private names.
- **Held out** is decided by the SHA-256 of the answer, not by chance or by order: a docstring is on the same
  side under every Python version that has it. Answers are unique over both files, whatever function they
  belong to, so no held-out text was ever trained on. (Hashing the function's name instead would put the many
  docstrings that several functions share on both sides.)
- **The system prompt** is short and fixed. Without one, the chat template of the quickstart's model inserts
  its own, 12 tokens longer in every record.

Exit status: 0 done, 2 the input is wrong, 3 it broke.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_OUT = Path(__file__).resolve().parent / "out" / "data"
SYSTEM_PROMPT = "You explain Python."
QUESTION = "What does `{call}` in Python's standard library do?"
MIN_WORDS = 4
MAX_SIGNATURE = 80  # characters; longer ones are abbreviated to `name(...)`
# Tests and demonstrations, whose docstrings describe themselves, and a twin of posixpath.
SKIPPED = {"antigravity", "idlelib", "lib2to3", "ntpath", "test", "tests", "this", "tkinter"}
SKIPPED |= {"turtle", "turtledemo"}
RENAMED = {"posixpath": "os.path", "genericpath": "os.path"}  # the name under which people know them
# Not sentences: doctest prompts; reST directives, roles, fields and literal blocks; rules and table borders;
# lists; indented or aligned text; templates; signatures.
MARKUP = re.compile(
    r">>>|\.\. |:[a-z]+:`|^[:@]\w+|^[-*]|::|\s[|+*=-]{2,}\s|[-=~+*]{4,}|\s{3,}|[{}<>]{2}|->", re.MULTILINE
)
BOUND = {"self", "cls", "mcls", "metacls"}  # first arguments of methods, which the caller does not write
SENTENCE_END = re.compile(r"[.!?]['\")`]?$")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Record:
    """One documented function, class or method.

    Attributes:
        name: qualified name, such as ``os.path.join``.
        call: the name with its signature, as asked in the question.
        answer: first paragraph of the docstring on one line.
    """

    name: str
    call: str
    answer: str

    @property
    def key(self) -> str:
        """SHA-256 of the answer, case apart, in hexadecimal: decides the split and the selection."""
        return hashlib.sha256(self.answer.casefold().encode()).hexdigest()

    def chat(self) -> dict[str, list[dict[str, str]]]:
        """The record as chat messages."""
        turns = {"system": SYSTEM_PROMPT, "user": QUESTION.format(call=self.call), "assistant": self.answer}
        return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def source_files(library: Path) -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of each public module of the standard library, in alphabetical order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        # The folder also holds site-packages, lib-dynload and build files; only the first name tells.
        if not parts or parts[0] not in sys.stdlib_module_names:
            continue
        if not any(part in SKIPPED or part.startswith("_") for part in parts):
            module = ".".join(parts)
            yield RENAMED.get(module, module), path


def signature(node: Function, method: bool) -> str:
    """Arguments as written in the source, without annotations; ``self`` or ``cls`` left out of methods."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    positional = node.args.posonlyargs or node.args.args
    if method and positional and positional[0].arg in BOUND:
        del positional[0]
    text = ast.unparse(node.args)
    return f"({text})" if len(text) <= MAX_SIGNATURE else "(...)"


def first_paragraph(docstring: str) -> str:
    """First paragraph of a docstring on one line; empty where it holds no plain sentence."""
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    if MARKUP.search(paragraph):
        return ""
    text = " ".join(paragraph.split())
    return text if SENTENCE_END.search(text) else ""


def records_in(module: str, body: Iterable[ast.stmt], owner: str = "") -> Iterator[Record]:
    """Public functions, classes and methods with a docstring, in the order of the source."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{module}.{owner}{node.name}"
        answer = first_paragraph(ast.get_docstring(node, clean=False) or "")
        if isinstance(node, ast.ClassDef):
            init = [item for item in node.body if isinstance(item, Function) and item.name == "__init__"]
            call = name + (signature(init[0], method=True) if init else "")
            yield from records_in(module, node.body, f"{owner}{node.name}.")
        else:
            decorators = {item.id for item in node.decorator_list if isinstance(item, ast.Name)}
            call = (
                name
                if decorators & {"property", "cached_property"}
                else name + signature(node, method=bool(owner))
            )
        if answer:
            yield Record(name, call, answer)


def collect(library: Path, max_answer_words: int) -> list[Record]:
    """All usable records, sorted by hash; no name and no answer (case apart) twice."""
    records: dict[str, Record] = {}
    names: set[str] = set()
    for module, path in source_files(library):
        with tokenize.open(path) as file:  # honours the file's coding line
            tree = ast.parse(file.read(), filename=str(path))
        for record in records_in(module, tree.body):
            fits = MIN_WORDS <= len(record.answer.split()) <= max_answer_words
            if fits and record.name not in names:
                names.add(record.name)
                records.setdefault(record.key, record)
    return [records[key] for key in sorted(records)]


def split(records: Iterable[Record], held_out_fraction: float) -> tuple[list[Record], list[Record]]:
    """Train and held-out records: held out is what hashes into the first ``held_out_fraction`` of the range.

    The hash is taken again over the key, so that choosing the smallest keys later is independent of the
    split.
    """
    train: list[Record] = []
    held_out: list[Record] = []
    for record in records:
        position = int(hashlib.sha256(record.key.encode()).hexdigest()[:16], 16) / 16**16
        (held_out if position < held_out_fraction else train).append(record)
    return train, held_out


def write(parts: dict[Path, list[Record]]) -> None:
    """Write one chat a line; names appear when all files are whole, so a killed run leaves no half file."""
    for path, records in parts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial(path).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record.chat(), ensure_ascii=False) + "\n" for record in records)
    for path in parts:
        os.replace(partial(path), path)


def partial(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(f".{path.name}.partial")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong argument ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: %(default)s)")
    add("--held-out-fraction", type=float, default=0.05, help="between 0 and 1 (default: %(default)s)")
    add("--max-train", type=int, help="at most so many training records (default: all)")
    add("--max-held-out", type=int, help="at most so many held-out records (default: all)")
    add("--max-answer-words", type=int, default=40, help="drop longer answers (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.held_out_fraction < 1:
        parser.error(f"--held-out-fraction is {args.held_out_fraction}, must lie between 0 and 1")
    for option, least in (("max_train", 1), ("max_held_out", 1), ("max_answer_words", MIN_WORDS)):
        value = getattr(args, option)
        if value is not None and value < least:
            parser.error(f"--{option.replace('_', '-')} is {value}, must be at least {least}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse(argv)
    library = Path(sysconfig.get_path("stdlib"))
    train, held_out = split(collect(library, args.max_answer_words), args.held_out_fraction)
    parts = {"train": train[: args.max_train], "held_out": held_out[: args.max_held_out]}
    if not all(parts.values()):
        counts = ", ".join(f"{len(records)} {name}" for name, records in parts.items())
        print(f"make_data.py: too few docstrings in {library} ({counts}); nothing written", file=sys.stderr)
        return 2
    try:
        write({args.out / f"{name}.jsonl": records for name, records in parts.items()})
    except OSError as error:
        print(f"make_data.py: {error}", file=sys.stderr)
        return 3
    for name, records in parts.items():
        words = sum(len(record.answer.split()) for record in records) / len(records)
        print(f"{args.out / name}.jsonl: {len(records)} records, {words:.1f} words an answer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
