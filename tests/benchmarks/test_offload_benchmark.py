"""The benchmark of offloading: it runs, compares bit by bit, and says so where results differ."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import offload

from fourfold.experts import PackedExperts
from fourfold.offloading import disk


def run(out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, dict[str, Any]]:
    sizes = ["--layers", "8", "--batch", "1", "--length", "16", "--steps", "1", "--rank", "2"]
    monkeypatch.setattr(
        sys, "argv", ["offload.py", "--smoke", "--device", "cpu", "--out", str(out), *sizes, *more]
    )
    return offload.main(), json.loads(out.read_text())


def test_every_variant_has_the_numbers_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "COMPUTES_IN_PLACE", ())  # (as on a GPU)
    status, record = run(tmp_path / "out.json", monkeypatch)
    assert status == 0
    assert [r["variant"] for r in record["results"]] == ["resident", "half", "streamed", "cached", "disk"]
    for result in record["results"]:
        assert result["loss_is_equal"]
        assert result["deterministic"]
        assert result["unequal"] == []
        assert result["gradients_equal"] == result["factors"] == result["factors_with_gradient"] == 8 * 12
    _, half, streamed, *on_disk = record["results"]
    assert half["offload"]["resident_modules"] > 0
    assert half["offload"]["streamed_modules"] > 0
    assert streamed["offload"]["streamed_modules"] == 8
    assert streamed["per_step"]["misses"] == 0
    assert streamed["per_step"]["fills"] == 2 * (8 - 2)
    for result in on_disk:
        assert result["offload"]["disk_bytes"] > 0
        assert result["per_step"]["fills"] == 2 * (8 - 2)
        assert result["per_step"]["read"] > 0
        assert result["floor_ms"] > 0


def test_other_numbers_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = offload.measure

    def measured(variant: str, model: Any, arguments: Any) -> dict[str, Any]:
        if variant == "streamed":
            experts = next(m for m in model.modules() if isinstance(m, PackedExperts))
            with torch.no_grad():
                next(experts.parameters(recurse=False)).view(-1)[:64] ^= 1
        return original(variant, model, arguments)

    monkeypatch.setattr(offload, "measure", measured)
    status, record = run(tmp_path / "out.json", monkeypatch, "--variants", "resident", "streamed")
    assert status == 1
    assert not all(r["gradients_equal"] == r["factors"] for r in record["results"])
    assert any("lora_" in name for name in record["results"][1]["unequal"])
