"""FSDP2 over packed experts: the numbers of one process. One job of two ranks runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks
import sharded_checks

CHECKS = [f"fsdp:{case}" for case in sharded_checks.CASES]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    ranks.run("sharded_checks", [*CHECKS, "mixed_precision"], folder, 2, 500)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_fsdp_equals_one_process(job: Path, check: str) -> None:
    for found in ranks.outcome(job, check.replace(":", "-")):
        assert found["learned"] > 0
        assert found["moved"] > 1e-3
        assert found["loss"] < 1e-5, found
        assert found["adapter"] < 1e-5, found


def test_mixed_precision_leaves_packed_experts_alone(job: Path) -> None:
    ranks.outcome(job, "mixed_precision")
