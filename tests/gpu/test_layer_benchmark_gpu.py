"""The layer benchmark's CUDA parts on tiny shapes: timing, peaks, synchronisations, graphs."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import layer
import layer_variants

pytestmark = pytest.mark.gpu


def test_smoke_run(tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    peers = list(layer_variants.peers())
    ways = ["default", "workspace-64"]
    arguments = ["--tokens", "1", "33", "--budget", "0.01", "--graphs", "--skip", *peers, "--ways", *ways]
    assert layer.main(["--smoke", "--device", "cuda", "--out", str(out), *arguments]) == 0
    records = json.loads(out.read_text())["records"]
    assert len(records) == 2 * 2 * 10
    for record in records:
        assert record["status"] == "ok", record
        assert record["step_peak_bytes"] > 0
        assert record["step_ms"] > 0
        if record["variant"].endswith(":default") or record["variant"] == "bf16":
            assert record["synchronisations"] == 0, record
