"""The benchmark of several GPUs: its arithmetic; the whole of it, small, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import distributed_job  # noqa: E402
import distributed_report  # noqa: E402

GIB = 2**30


def result(variant: str, world: int, **changes: Any) -> dict[str, Any]:
    made = {
        "variant": variant,
        "world": world,
        "step_ms": 100.0,
        "tokens_per_second": world * 80_000.0,
        "tokens_per_gpu": 8_000,
        "sent": {"all_gather": 3_000_000_000, "reduce_scatter": 1_000_000_000},
        "losses": [2.0, 1.5],
        "link_bytes_per_second": 1e11,
        "ranks": [{"load_seconds": 3.0, "resident_bytes": GIB // world, "loaded_allocated": GIB // world}],
    }
    return made | changes


def test_projection_follows_its_formula() -> None:
    one = result("one", 1, link_bytes_per_second=None)
    rows = distributed_report.project([one, result("fsdp2", 2)], 50.0)["rows"]
    assert [row["gpus"] for row in rows] == [8, 64]
    # two ranks send half of 8 GB; 8 send 7/8 of it, at the measured link, and 64 send 63/64 between machines
    assert rows[0]["sent"] == pytest.approx(7e9)
    assert rows[0]["tokens_per_second"] == pytest.approx([8 * 8_000 / 0.17, 8 * 8_000 / 0.1])
    assert rows[1]["sent"] == pytest.approx(7.875e9)
    assert rows[1]["tokens_per_second"] == pytest.approx([64 * 8_000 / 0.2575, 64 * 8_000 / 0.1575])


def test_targets_say_no() -> None:
    noise = {"loss_noise": 1e-4, "adapter_noise": 1e-3}
    one = result("one", 1, **noise)
    apart = {"loss_difference": 1e-4, "adapter_difference": 1e-3}
    found = distributed_report.targets([one, result("fsdp2", 2, **apart)])
    assert len(found) == 4
    assert all(target["reached"] for target in found)
    bad = result("fsdp2", 2, loss_difference=1.0, adapter_difference=1.0, tokens_per_second=90_000.0)
    bad["ranks"] = [
        {"load_seconds": 3.0, "resident_bytes": GIB, "loaded_allocated": GIB, "peak_loading": 2 * GIB}
    ]
    found = distributed_report.targets([one, bad])
    assert len(found) == 5
    assert not any(target["reached"] for target in found)
    assert "failed" in distributed_report.table([{"variant": "ddp", "failure": "failed"}])


def test_bytes_are_counted_where_collectives_are_called(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch, distributed_job.counting() as sent:
            patch.setattr(dist, "get_world_size", lambda *_: 4)
            dist.all_gather_into_tensor(torch.empty(10, dtype=torch.uint8), torch.ones(10, dtype=torch.uint8))
            dist.reduce_scatter_tensor(torch.empty(8), torch.ones(8))
        assert sent == {"all_gather": 30, "reduce_scatter": 24}
        dist.all_gather_into_tensor(torch.empty(10), torch.ones(10))
        assert sent["all_gather"] == 30
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_whole_benchmark_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "distributed.py"), "--smoke", "--out", str(out)]
    command += ["--checkpoint", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert [r["variant"] for r in record["results"]] == ["one", "ddp", "fsdp2"]
    reached = {t["what"]: t["reached"] for t in record["targets"] if "tokens/s" not in t["what"]}
    assert len(reached) == 7  # (with bytes sent against those planned)
    assert all(reached.values()), record["targets"]
    assert record["results"][2]["sent"]["all_gather"] > 0
    assert record["results"][2]["sent"]["reduce_scatter"] > 0
