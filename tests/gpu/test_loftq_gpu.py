"""`fourfold.loftq_init` on a GPU gives what it gives on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import fourfold
import tiny
from parity import lora

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_factors_are_the_cpus(
    kind: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr("fourfold.adapters.low_rank_fit.EXACT", 8)
    tiny.save(tiny.KINDS[kind](), tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        model = tiny.load(tmp_path, experts_quant_type="nf4").to(device)
        model = get_peft_model(model, lora(model, init_lora_weights=True))
        state = torch.cuda.get_rng_state()
        report = fourfold.loftq_init(model)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        deltas = [m.get_delta_weight("default") for m in model.modules() if hasattr(m, "parameter_name")]
        assert {delta.device.type for delta in deltas} == {device}
        found.append((report, [delta.detach().cpu() for delta in deltas]))
    for role, figures in found[0][0].roles.items():
        assert found[1][0].roles[role].after == pytest.approx(figures.after, rel=1e-4)
    if exact:  # (of close singular values the subspace iteration may turn the last ones otherwise)
        for ours, theirs in zip(found[0][1], found[1][1], strict=True):
            assert float((ours - theirs).norm() / ours.norm()) < 1e-3
