"""What verbs print in common."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fourfold.cli.show import few, progress, say, warn


def test_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    say(Console(file=file, width=20), "[bold]/tmp/a long path/of [1] model", "second")
    assert file.getvalue() == "[bold]/tmp/a long path/of [1] model\nsecond\n"
    warn(["[red]"])
    assert capsys.readouterr().err == "warning: [red]\n"


def test_few() -> None:
    assert few(["a", "b"], 2) == "a, b"
    assert few(["a", "b", "c"], 2) == "a, b, ..."


def test_the_bar_counts_and_goes() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress(console, "planning") as show:
        show(1, 7, "a.weight")
        show(7, 7, "")
    text = console.file.getvalue()
    assert "7/7" in text
    assert "writing" in text
