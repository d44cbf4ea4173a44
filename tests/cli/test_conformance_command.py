"""When ``fourfold conformance`` writes its file, and when it says no."""

import json
from pathlib import Path

import pytest
import torch

from fourfold.cli import main
from fourfold.planning.conformance import checks, table, tiny_models
from fourfold.planning.conformance.row import CHECKS, Row


def passed(model_type: str, kind: str = "gated") -> Row:
    return Row(
        model_type, "A", kind, {"built": "ok"} | dict.fromkeys(CHECKS, "ok"), {"NF4": 0.12, "INT8": 0.01}
    )


def failed(model_type: str) -> Row:
    row = passed(model_type)
    row.fail("packed", "no")
    return row


@pytest.fixture
def conformance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "table.md"

    def run(rows: list[Row], *arguments: str, known: tuple[str, ...] = ("a", "b", "c")) -> tuple[int, dict]:
        found = {row.model_type: row for row in rows}
        monkeypatch.setattr(tiny_models, "known_types", lambda: list(known))
        monkeypatch.setattr(tiny_models, "model_types", lambda: iter(known))
        monkeypatch.setattr(checks, "check_model_type", found.get)
        status = main(["conformance", "--out", str(file), "--json", *arguments])
        return status, json.loads(capsys.readouterr().out)

    return file, run


def test_a_missing_file_is_written_on_request_only(conformance) -> None:
    file, run = conformance
    status, data = run([passed("a")])
    assert (status, data["written"], file.exists()) == (1, None, False)
    assert run([passed("a")], "--accept")[0] == 0
    assert table.read(file).keys() == {"a"}


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ([passed("a")], "b: no row any more"),
        ([passed("a"), passed("b"), failed("c")], "c: new, and fails: packed: no"),
        ([passed("a"), failed("b")], "b: packed was ok, is FAILED"),
        ([passed("a"), passed("b", "no gate")], "b: experts were gated, are no gate"),
    ],
    ids=["a row vanishes", "a new row fails", "a cell", "the kind"],
)
def test_what_got_worse_is_not_written(conformance, now: list[Row], line: str) -> None:
    file, run = conformance
    file.write_text(table.render([passed("a"), passed("b")]))
    before = file.read_text()
    status, data = run(now)
    assert (status, data["worse"], data["written"]) == (1, [line], None)
    assert file.read_text() == before
    status, data = run(now, "--accept")
    assert (status, data["written"]) == (0, str(file))
    assert table.read(file).keys() == {row.model_type for row in now}


def test_rows_of_types_that_this_transformers_lacks_are_kept_and_said(conformance) -> None:
    file, run = conformance
    file.write_text(table.render([passed("a"), failed("b"), passed("c")]))
    old = table.read(file)
    status, data = run([passed("a")], known=("a",))
    assert (status, data["worse"], data["kept"], data["written"]) == (0, [], ["b", "c"], str(file))
    assert table.read(file) == old
    assert "has no such type: `b`, `c`" in file.read_text()
    assert run([passed("a"), passed("b"), passed("c")])[0] == 0
    assert "has no such type" not in file.read_text()


def test_a_row_that_can_be_packed_at_last_is_not_worse() -> None:
    refused = Row("a", "A", "refused: because", {"built": "ok", "packed": "refused"})
    assert table.worse({"a": refused}, [passed("a")], ["a"]) == []
    assert table.worse({"a": passed("a")}, [refused], ["a"])[0] == "a: packed was ok, is refused"


def test_as_many_threads_after_it_as_before(conformance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    _, run = conformance
    run([passed("a")], "--accept")
    assert asked == [1, 7]
