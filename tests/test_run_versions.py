"""The matrix of transformers' versions: what counts as a failure."""

from pathlib import Path

import pytest

import run_versions
from run_versions import Row

VERSIONS = dict.fromkeys(run_versions.SHOWN, "1.0")


def row(passed: int, failed: list[str]) -> Row:
    return Row(VERSIONS, passed, 0, failed, 1.0)


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([row(3, []), row(3, [])], 0),
        ([row(3, []), row(2, ["tests.a::b"])], 1),
        ([row(0, [])], 1),
    ],
)
def test_a_failing_or_empty_row_is_an_exit_status_of_1(
    monkeypatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: list[Row], status: int
) -> None:
    left = iter(rows)
    page = tmp_path / "versions.md"
    monkeypatch.setattr(run_versions, "run", lambda *_: next(left))
    monkeypatch.setattr("sys.argv", ["run_versions.py", *["1.0"] * len(rows), "--write", str(page)])
    assert run_versions.main() == status
    out = capsys.readouterr().out
    assert out.count("| 1.0 |") >= len(rows)
    for name in (name for r in rows for name in r.failed):
        assert name in out
        assert name in page.read_text()
    assert ("FAILS" in page.read_text()) == bool(status)


def test_own_forwards_and_conformance_are_run_under_each_version() -> None:
    for test in ("tests/experts/test_own_forward.py", "tests/planning/test_conformance.py::test_row_passes"):
        assert test in run_versions.TESTS
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (run_versions.ROOT / file).read_text()
