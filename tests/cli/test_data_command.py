"""``fourfold data``: what a run would be trained on, told apart by colour or by marks."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fourfold.cli import data, main
from tiny_chat import conversation, write_jsonl


@pytest.fixture
def config(moe_folder: Path, tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "d.jsonl", [*(conversation(index) for index in range(120)), {}])
    path = tmp_path / "c.yaml"
    path.write_text(
        f"base_model: {moe_folder}\nadapter: qlora\nload_in_4bit: true\nsequence_len: 64\nval_set_size: 20\n"
        f"datasets:\n  - path: {tmp_path / 'd.jsonl'}\n",
        encoding="utf-8",
    )
    return path


def test_trained_tokens_stand_between_marks(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(config), "--examples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("tokens, 5 of them trained") == 2
    assert "<|assistant|>⟦the sky is red <|end|>⟧" in out
    assert "1 bad record left out:\n" in out
    assert "d.jsonl, line 121: empty" in out
    assert "trained on: 100 examples, 1,500 tokens, 500 trained\n" in out
    assert "held out:   20 examples, 300 tokens, 100 trained\n" in out


def test_as_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(config), "sample_packing=true", "--json", "--examples", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    [example] = result["examples"]
    assert "".join(text for text, trained in example["runs"] if trained) == "the sky is red <|end|>"
    assert sum(example["trained"]) == example["trained_tokens"] == 5
    assert len(example["ids"]) == len(example["trained"]) == example["tokens"] == 15
    assert result["train"]["examples"] == 100
    assert result["train"]["packed_rows"] == 25
    assert len(result["bad_records"]) == 1


def run(config: Path, console: Console) -> str:
    arguments = Namespace(config=str(config), overrides=[], examples=1, debug=False, json=False)
    data.execute(arguments, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_trained_tokens_are_coloured_on_a_terminal(config: Path) -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=100, no_color=False
    )
    out = run(config, console)
    assert "\x1b[1;32mthe sky is red <|end|>\x1b[0m" in out
    assert "⟦" not in out


def test_without_colours_a_terminal_has_marks(config: Path) -> None:
    assert "⟦the sky" in run(config, Console(file=io.StringIO(), force_terminal=True, no_color=True))


def test_where_the_marks_cannot_be_written(config: Path) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    arguments = Namespace(config=str(config), overrides=[], examples=1, debug=False, json=False)
    data.execute(arguments, Console(file=file))
    file.seek(0)
    assert "[[the sky is red <|end|>]]" in file.read()


def test_escape_sequences_in_data_are_shown(config: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fourfold.training.preview import Preview, Shown

    shown = Shown([("\x1b]0;title\x07a\tb\n", False), ("c\x9b2J", True)], 2, 1, [1, 2], [False, True])
    counts = {"examples": 1, "tokens": 2, "trained_tokens": 1, "truncated": 3, "dropped": 4}
    found = Preview([shown], counts, None, [], ["datasets: a note"])
    monkeypatch.setattr("fourfold.training.preview.preview", lambda *_: found)
    out = run(config, Console(file=io.StringIO(), width=100))
    assert "\\x1b]0;title\\x07a" in out
    assert "⟦c\\x9b2J⟧" in out
    assert not any(sign in out for sign in ("\x1b", "\x07", "\x9b"))
    assert "datasets: a note\n" in out
    assert "3 cut to sequence_len; 4 dropped for their length" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--examples", "-1"], "--examples -1: give a whole number"),
        (["base_model=./nowhere"], "there is no folder ./nowhere"),
        (["datasets.0.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["max_bad_records=0"], "line 121: empty"),
        (["datasets.0.type=alpca"], "'alpca' is not one of 'chat_template'"),
    ],
)
def test_bad_input(config: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(config), *arguments]) == 2
    assert said in capsys.readouterr().err
