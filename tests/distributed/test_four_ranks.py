"""Four ranks: every kind loaded in shards, more ranks than shares, replicas of shards; memory as planned."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks
import sharded_checks
from sharded_checks import CASES

pytestmark = [pytest.mark.slow]
LOADED = [f"{case}:{stored}" for case in CASES for stored in ("plain", "packed")]
TRAINED = ("nf4", "nf4_uneven", "int8", "flattened")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    checks = [f"fsdp:{case}" for case in TRAINED] + [f"loaded:{case}" for case in LOADED]
    checks += ["replicas_of_shards", "saved_adapter", "resumed", "saved_packed:nf4", "merged", "every_way"]
    ranks.run("sharded_checks", checks, folder, 4, 900)
    return folder


@pytest.mark.parametrize("case", TRAINED)
def test_fsdp_equals_one_process(job: Path, case: str) -> None:
    sharded_checks.equal(ranks.outcome(job, f"fsdp:{case}"))


@pytest.mark.parametrize("case", LOADED)
def test_loaded_in_shards_is_the_model_and_trains_as_it(job: Path, case: str) -> None:
    sharded_checks.equal(ranks.outcome(job, f"loaded:{case}"))


def test_replicas_of_shards_equal_one_process(job: Path) -> None:
    sharded_checks.equal(ranks.outcome(job, "replicas_of_shards"))


@pytest.mark.parametrize("check", ["saved_adapter", "saved_packed:nf4"])
def test_saved_on_four_ranks(job: Path, check: str) -> None:
    assert len(ranks.outcome(job, check)) == 4


def test_resumed_on_four_ranks_and_in_one_process(job: Path) -> None:
    for found in ranks.outcome(job, "resumed"):
        assert found["sharded"] == 0
        assert found["alone"] < 1e-5
        assert found["wider"] < 1e-5


def test_every_combination_of_ways_equals_one_process(job: Path) -> None:
    for found in ranks.outcome(job, "every_way"):
        assert len(found) == 48
        sharded_checks.equal(list(found.values()))


@pytest.mark.parametrize("way", ["let_go", "stay"])
def test_the_peak_of_training_is_as_planned(tmp_path: Path, way: str) -> None:
    """All storages that live at a time, on two ranks."""
    ranks.run("sharded_checks", [f"planned_peak:{way}"], tmp_path, 2, 300)
    for found in ranks.outcome(tmp_path, f"planned_peak:{way}"):
        assert found["resident"] < 0.35 * found["counted"]
        assert found["counted"] <= found["planned"] < 1.03 * found["counted"], found
