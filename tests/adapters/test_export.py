"""Export between fused and per-expert adapters: the same numbers, the right names, the same bytes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import adapters
import fourfold
import tiny
from fourfold.errors import AdapterError

# module of layer 0 in the base's checkpoint, names of gate, up and down there (gate is None without one)
NAMES = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("model.layers.0.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "gpt_oss": ("model.layers.0.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "nemotron_h": ("backbone.layers.0.mixer.experts", None, "up_proj", "down_proj"),
}


def in_model(name: str) -> str:
    return name.replace("backbone", "model").replace("block_sparse_moe", "mlp")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_per_expert_and_back(kind: str, tmp_path: Path) -> None:
    model = adapters.make(tiny.KINDS[kind](), tmp_path)
    written = fourfold.export(tmp_path / "adapter", tmp_path / "out")
    assert (written.names, written.exact, written.zero_filled, written.flags) == ("base", True, [], [])
    theirs, ours = adapters.deltas(model), adapters.per_expert_deltas(tmp_path / "out")
    experts, gate, up, down = NAMES[kind]
    fused = theirs[f"{in_model(experts)}.{'gate_up_proj' if gate else 'up_proj'}"]
    half = fused.shape[1] // 2
    for e in range(fused.shape[0]):
        if gate is None:
            expected = {up: fused[e]}
        elif kind == "gpt_oss":  # its gate and up alternate
            expected = {gate: fused[e, 0::2], up: fused[e, 1::2]}
        else:
            expected = {gate: fused[e, :half], up: fused[e, half:]}
        expected[down] = theirs[f"{in_model(experts)}.down_proj"][e]
        for name, delta in expected.items():
            found = ours.pop(f"{experts}.{e}.{name}")
            assert found.shape == delta.shape
            assert (found - delta).abs().max() <= 1e-6
    assert not any("experts" in name for name in ours if "layers.0." in name)
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    before, after = tmp_path / "adapter", tmp_path / "back"
    assert (before / adapters.WEIGHTS).read_bytes() == (after / adapters.WEIGHTS).read_bytes()
    old, new = adapters.read(before)[1], adapters.read(after)[1]
    for listed in ("target_modules", "target_parameters"):
        assert sorted(old.pop(listed) or ()) == sorted(new.pop(listed))
    assert old == new


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stock_peft_reads_it(kind: str, tmp_path: Path) -> None:
    """PEFT converts per-expert adapters of these while loading (at twice the rank): the same logits."""
    model = adapters.make(tiny.KINDS[kind](), tmp_path)
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny.build(tiny.KINDS[kind]()), str(tmp_path / "out"))
    assert (tiny.logits(loaded) - tiny.logits(model)).abs().max() < 1e-5
    with loaded.disable_adapter():
        assert (tiny.logits(loaded) - tiny.logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_fused_is_loaded_by_stock_peft(kind: str, tmp_path: Path) -> None:
    model = adapters.make(tiny.KINDS[kind](), tmp_path, r=3)
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    loaded = PeftModel.from_pretrained(tiny.build(tiny.KINDS[kind]()), str(tmp_path / "back"))
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.mark.parametrize("only", ["gate_up_proj", "down_proj"])
def test_one_parameter_alone(only: str, tmp_path: Path) -> None:
    """Its key is ``.experts.lora_*`` whichever it is; servers take all projections or none."""
    model = adapters.make(tiny.qwen3_moe(), tmp_path, target_parameters=[f"mlp.experts.{only}"])
    written = fourfold.export(tmp_path / "adapter", tmp_path / "out")
    other = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}[only]
    assert written.zero_filled == [f"model.layers.{i}.mlp.experts.{other}" for i in range(2)]
    ours = adapters.per_expert_deltas(tmp_path / "out")
    fused = adapters.deltas(model)[f"model.layers.1.mlp.experts.{only}"]
    prefix = "model.layers.1.mlp.experts.5"
    names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (ours[f"{prefix}.{name}"] for name in names)
    trained, zero = ((gate, up), (down,)) if only == "gate_up_proj" else ((down,), (gate, up))
    assert (torch.cat(trained) - fused[5]).abs().max() <= 1e-6
    assert all(not part.any() for part in zero)
    assert (gate.shape, up.shape, down.shape) == ((32, 64), (32, 64), (64, 32))
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    before, after = tmp_path / "adapter", tmp_path / "back"
    assert (before / adapters.WEIGHTS).read_bytes() == (after / adapters.WEIGHTS).read_bytes()


def test_one_scaling_and_one_rank(tmp_path: Path) -> None:
    """rsLoRA, alpha_pattern and rank_pattern: SGLang reads r and lora_alpha alone."""
    model = adapters.make(
        tiny.qwen3_moe(),
        tmp_path,
        use_rslora=True,
        rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.experts\.down_proj": 2},
        alpha_pattern={"gate_up_proj": 12, "o_proj": 5},
    )
    written = fourfold.export(tmp_path / "adapter", tmp_path / "out")
    config = adapters.read(tmp_path / "out")[1]
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    assert (written.rank, written.exact) == (6, False)
    ours, theirs = adapters.per_expert_deltas(tmp_path / "out"), adapters.deltas(model)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        for e in range(6):
            gate_up = torch.cat([ours[f"{name}.{e}.{part}"] for part in ("gate_proj", "up_proj")])
            assert (gate_up - theirs[f"{name}.gate_up_proj"][e]).abs().max() <= 1e-6
            assert (ours[f"{name}.{e}.down_proj"] - theirs[f"{name}.down_proj"][e]).abs().max() <= 1e-6
    for name, module in model.base_model.model.named_modules():
        if name.endswith(("q_proj", "o_proj")):
            assert (ours[name] - module.get_delta_weight("default")).abs().max() <= 1e-6
    loaded = PeftModel.from_pretrained(tiny.build(tiny.qwen3_moe()), str(tmp_path / "out"))
    assert (tiny.logits(loaded) - tiny.logits(model)).abs().max() < 1e-5


def test_rslora_alone_is_lossless(tmp_path: Path) -> None:
    adapters.make(tiny.qwen3_moe(), tmp_path, use_rslora=True)
    assert fourfold.export(tmp_path / "adapter", tmp_path / "out").exact
    assert adapters.read(tmp_path / "out")[1]["lora_alpha"] == 16  # 8 / sqrt(4) = 16 / 4
    tensors = adapters.read(tmp_path / "adapter")[0]
    b = tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"].view(64, 4, 6)
    out = adapters.read(tmp_path / "out")[0]
    assert torch.equal(
        out["base_model.model.model.layers.0.mlp.experts.2.down_proj.lora_B.weight"], b[:, :, 2]
    )


def test_unequal_gate_and_up(tmp_path: Path) -> None:
    adapters.make(tiny.qwen3_moe(), tmp_path)
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    tensors, _ = adapters.read(tmp_path / "out")
    for key in tensors:
        if "up_proj.lora_A" in key:
            tensors[key] = torch.randn_like(tensors[key])
    adapters.rewrite(tmp_path / "out", tensors)
    with pytest.raises(AdapterError, match="--double-rank"):
        fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    assert not (tmp_path / "back").exists()
    written = fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused", double_rank=True)
    assert written.rank == 8
    loaded = PeftModel.from_pretrained(tiny.build(tiny.qwen3_moe()), str(tmp_path / "back"))
    theirs, ours = adapters.deltas(loaded), adapters.per_expert_deltas(tmp_path / "out")
    name = "model.layers.1.mlp.experts"
    parts = torch.cat([ours[f"{name}.3.{part}"] for part in ("gate_proj", "up_proj")])
    assert (theirs[f"{name}.gate_up_proj"][3] - parts).abs().max() <= 1e-6
    # an adapter at twice the rank goes back to one A for both
    assert fourfold.export(tmp_path / "back", tmp_path / "again").rank == 8
    again = adapters.per_expert_deltas(tmp_path / "again")
    assert all((again[n] - ours[n]).abs().max() <= 1e-6 for n in ours)


def test_without_the_base(tmp_path: Path) -> None:
    """Shapes and adapter_config.json suffice, but for what no shape tells: how gate and up are joined."""
    adapters.make(tiny.qwen3_moe(), tmp_path)
    fourfold.export(tmp_path / "adapter", tmp_path / "known")
    adapters.rewrite(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(AdapterError, match="--gate-up"):
        fourfold.export(tmp_path / "adapter", tmp_path / "out")
    written = fourfold.export(tmp_path / "adapter", tmp_path / "out", gate_up="concatenated")
    assert written.names == "adapter"
    known, out = (tmp_path / n / adapters.WEIGHTS for n in ("known", "out"))
    assert known.read_bytes() == out.read_bytes()
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused", gate_up="concatenated")
    assert (tmp_path / "back" / adapters.WEIGHTS).read_bytes() == (
        tmp_path / "adapter" / adapters.WEIGHTS
    ).read_bytes()
    fourfold.export(tmp_path / "adapter", tmp_path / "other", base=tmp_path / "base" / "config.json")
    assert (tmp_path / "other" / adapters.WEIGHTS).read_bytes() == known.read_bytes()
    with pytest.raises(AdapterError, match="contradicts the base"):
        fourfold.export(
            tmp_path / "adapter", tmp_path / "wrong", base=tmp_path / "base", gate_up="interleaved"
        )


def test_a_rank_beyond_the_servers(tmp_path: Path) -> None:
    adapters.make(tiny.qwen3_moe(), tmp_path, r=17)
    assert fourfold.export(tmp_path / "adapter", tmp_path / "out").flags == ["--max-lora-rank 32"]
