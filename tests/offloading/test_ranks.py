"""Experts in host memory and several processes: whole modules on each rank, or shards, not both."""

from __future__ import annotations

from pathlib import Path

import pytest

import offloaded_ranks
import ranks
import sharded_checks

CHECKS = ["ddp:replicate", "ddp:plain", "shards"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offloaded")
    ranks.run(offloaded_ranks.__name__, CHECKS, folder, 2, 240)
    return folder


@pytest.mark.parametrize("kind", ["replicate", "plain"])
def test_ddp_with_experts_in_host_memory_equals_one_process(job: Path, kind: str) -> None:
    found = ranks.outcome(job, f"ddp:{kind}")
    sharded_checks.equal([{k: v for k, v in f.items() if k in ("loss", "adapter", "moved")} for f in found])
    assert all(f["streamed"] > 0 and f["fills"] > 0 for f in found)


def test_shards_and_experts_in_host_memory_exclude_each_other(job: Path) -> None:
    for said in ranks.outcome(job, "shards"):
        assert "fourfold.onload(model)" in said["offloaded, then sharded"]
        assert "spread over processes" in said["sharded, then offloaded"]
        assert "spread over processes since" in said["sharded by another hand"]
        assert "CPUOffloadPolicy" in said["sharded by another hand"]
