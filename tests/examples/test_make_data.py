"""The quickstart's data: question and answer pairs from docstrings, split so that nothing leaks."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "make_data.py"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_make_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


md = _load_script()
md.collect = functools.cache(md.collect)  # parsing the library takes 1 to 3 s; two tests run the real script


def _read(out: Path, part: str) -> list[dict[str, str]]:
    """Records of one file as role -> content; fails on anything malformed."""
    records = []
    for line in (out / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
        chat = json.loads(line)
        assert list(chat) == ["messages"]
        assert [sorted(message) for message in chat["messages"]] == [["content", "role"]] * 3
        assert [message["role"] for message in chat["messages"]] == ["system", "user", "assistant"]
        records.append({message["role"]: message["content"] for message in chat["messages"]})
    return records


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "new" / "data"
    assert md.main(["--out", str(folder)]) == 0
    return folder


def test_counts_and_files(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in out.iterdir()) == ["held_out.jsonl", "train.jsonl"]
    train, held_out = _read(out, "train"), _read(out, "held_out")
    assert len(train) > 1500
    assert len(held_out) > 80
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    assert md.main(["--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{len(train)} records" in printed
    assert f"{len(held_out)} records" in printed


def test_every_record_is_a_clean_question_and_answer(out: Path) -> None:
    for record in _read(out, "train") + _read(out, "held_out"):
        question, answer = record["user"], record["assistant"]
        assert record["system"] == "You explain Python."
        before, call, after = question.split("`")
        assert (before, after) == ("What does ", " in Python's standard library do?")
        path, _, arguments = call.partition("(")
        assert path.replace(".", "").isascii()
        assert not any(part.startswith("_") for part in path.split(".")), call
        assert path.split(".")[0] not in md.SKIPPED
        if arguments:
            ast.parse(f"def f({arguments}: pass" if arguments != "...)" else "...")
        assert 4 <= len(answer.split()) <= 40
        assert answer == " ".join(answer.split())
        assert ">>>" not in answer
        assert "::" not in answer


def test_known_functions_are_described(out: Path) -> None:
    answers = {record["user"]: record["assistant"] for record in _read(out, "train") + _read(out, "held_out")}
    question = "What does `shlex.quote(s)` in Python's standard library do?"
    assert answers[question] == "Return a shell-escaped version of the string *s*."
    assert any(
        "`os.path.isdir(s)`" in question or "`os.path.basename(p)`" in question for question in answers
    )


def test_nothing_is_in_both_parts(out: Path) -> None:
    train, held_out = _read(out, "train"), _read(out, "held_out")
    questions = [record["user"] for record in train + held_out]
    answers = [record["assistant"].casefold() for record in train + held_out]
    assert len(questions) == len(set(questions)) == len(set(answers))


def test_deterministic_in_another_process(out: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "123", "LC_ALL": "C"})
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_no_module_is_executed(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['make_data.py', '--out', {str(tmp_path)!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as done: assert done.code == 0\n"
        "print(*sorted(sys.modules))"
    )
    lines = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    loaded = set(lines.splitlines()[-1].split())
    described = {record["user"].split("`")[1].split(".")[0] for record in _read(tmp_path, "train")}
    assert {"smtplib", "imaplib", "xmlrpc", "asyncio"} <= described
    assert (
        not {"antigravity", "this", "turtle", "tkinter", "smtplib", "imaplib", "xmlrpc", "asyncio"} & loaded
    )


def test_split_ignores_order_and_neighbours(out: Path) -> None:
    records = [md.Record(f"m.f{n}", f"m.f{n}()", f"Answer number {n} of many.") for n in range(2000)]
    train, held_out = md.split(records, 0.1)
    assert 150 < len(held_out) < 250
    assert {record.name for record in md.split(records[::-1], 0.1)[1]} == {record.name for record in held_out}
    assert md.split(held_out[:5], 0.1) == ([], held_out[:5])
    assert md.split(train[:5], 0.1) == (train[:5], [])
    # The same text under another name falls on the same side.
    renamed = [md.Record("other." + record.name, record.call, record.answer) for record in held_out]
    assert md.split(renamed, 0.1)[1] == renamed


def test_options(out: Path, tmp_path: Path) -> None:
    arguments = ["--max-train", "300", "--max-held-out", "40", "--max-answer-words", "12"]
    assert md.main(["--out", str(tmp_path), *arguments, "--held-out-fraction", "0.2"]) == 0
    train, held_out = _read(tmp_path, "train"), _read(tmp_path, "held_out")
    assert (len(train), len(held_out)) == (300, 40)
    assert max(len(record["assistant"].split()) for record in train + held_out) == 12

    assert md.main(["--out", str(tmp_path), "--max-train", "100"]) == 0
    assert _read(tmp_path, "train") == _read(out, "train")[:100]
    assert _read(tmp_path, "held_out") == _read(out, "held_out")


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Join two paths.\n\n    More about it.", "Join two paths."),
        ("Join two\n    paths, in\n    order.", "Join two paths, in order."),
        (">>> join(1)\n2.", ""),
        ("Join paths::\n\n    a, b.", ""),
        (".. deprecated:: 3.1 Gone.", ""),
        (":param x: the path.", ""),
        ("join(a, b) -> path, joined.", ""),
        ("Join the paths", ""),
        ("Options:\n  -a  all of them.\n  -b  some of them.", ""),
        ("Options are\n    these:\n      all, some.", ""),
        ("", ""),
    ],
)
def test_cleaning(docstring: str, answer: str) -> None:
    assert md.first_paragraph(docstring) == answer


def test_signatures() -> None:
    source = (
        """
class Shelf:
    "A place where things are kept."
    def __init__(self, size: int = 3, *, name: str | None = None): "Private."
    def put(self, thing, /, *rest: object, **more) -> None: "Put a thing on it."
    @property
    def full(self): "Whether it is full."
    @classmethod
    def empty(cls, size=1): "One with nothing on it."
    @staticmethod
    async def count(shelves): "Number of things on shelves."
    def _hidden(self): "Nobody asks for this."
    class Label:
        "What is written on it."
def decorate(cls, /): "Decorate the class given."
def _private(): "Nobody asks for this."
def undocumented(): pass
def long("""
        + ", ".join(f"argument_{n}" for n in range(20))
        + """): "Many arguments are taken."
"""
    )
    calls = {record.name: record.call for record in md.records_in("m", ast.parse(source).body)}
    assert calls == {
        "m.Shelf": "m.Shelf(size=3, *, name=None)",
        "m.Shelf.put": "m.Shelf.put(thing, /, *rest, **more)",
        "m.Shelf.full": "m.Shelf.full",
        "m.Shelf.empty": "m.Shelf.empty(size=1)",
        "m.Shelf.count": "m.Shelf.count(shelves)",
        "m.Shelf.Label": "m.Shelf.Label",
        "m.decorate": "m.decorate(cls, /)",
        "m.long": "m.long(...)",
    }


def test_duplicates_are_kept_once(tmp_path: Path) -> None:
    (tmp_path / "bisect.py").write_text('def a(): "The very same words."\ndef b(): "The very SAME words."\n')
    (tmp_path / "shlex.py").write_text(
        'def a(): "The very same words."\ndef c(): "Other words than those."\n'
    )
    (tmp_path / "not_in_stdlib.py").write_text('def a(): "Words of somebody else."\n')
    assert sorted(record.name for record in md.collect(tmp_path, 40)) == ["bisect.a", "shlex.c"]


def test_records_come_in_hash_order(tmp_path: Path) -> None:
    functions = [f'def f{n}(): "This is answer number {n}."' for n in range(20)]
    (tmp_path / "bisect.py").write_text("\n".join(functions))
    keys = [record.key for record in md.collect(tmp_path, 40)]
    assert len(keys) == 20
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--held-out-fraction", "0"),
        ("--held-out-fraction", "1"),
        ("--max-train", "0"),
        ("--max-held-out", "-3"),
        ("--max-answer-words", "3"),
        ("--max-answer-words", "x"),
        ("--unknown", "1"),
    ],
)
def test_wrong_arguments_give_status_2(tmp_path: Path, arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as error:
        md.main(["--out", str(tmp_path), *arguments])
    assert error.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_too_few_records_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert md.main(["--out", str(tmp_path), "--held-out-fraction", "1e-9"]) == 2
    assert "nothing written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert md.main(["--out", str(tmp_path / "file")]) == 3
    assert "file" in capsys.readouterr().err
