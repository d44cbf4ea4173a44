"""docs/distributed.md says what the committed results say, and those reach their bounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import distributed_pages

from sharded_checks import CASES, REPLICATED


def test_the_page_agrees_with_the_results() -> None:
    page = distributed_pages.PAGE.read_text()
    assert distributed_pages.filled(page) == page, "python benchmarks/distributed.py --write"


def test_a_page_without_its_places_is_an_error() -> None:
    with pytest.raises(ValueError, match="benchmark: begin"):
        distributed_pages.filled("nothing here")


def test_every_case_was_compared_and_is_equal() -> None:
    record = json.loads((distributed_pages.RESULTS / "distributed-equality.json").read_text())
    compared = {(row["engine"], row["case"]) for row in record["rows"]}
    assert compared == {("fsdp", case) for case in CASES} | {("ddp", case) for case in REPLICATED}
    assert record["every_way"]["combinations"] == 48
    for row in [*record["rows"], record["every_way"]]:
        assert row["loss"] < 1e-5, row
        assert row["adapter"] < 1e-5, row
        assert row["moved"] > 1e-3, row


def test_the_run_on_the_cpu_sent_what_is_planned_and_ended_alike() -> None:
    record = json.loads((distributed_pages.RESULTS / "distributed-cpu.json").read_text())
    assert [result["variant"] for result in record["results"]] == ["one", "ddp", "fsdp2"]
    reached = {t["what"]: t["reached"] for t in record["targets"] if "tokens/s" not in t["what"]}
    assert len(reached) == 7
    assert all(reached.values()), reached
