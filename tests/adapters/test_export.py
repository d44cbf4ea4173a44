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


def test_some_layers_a_router_and_a_pattern(tmp_path: Path) -> None:
    """What PEFT is told to target names the same modules after a round trip, and no others."""
    targets = [
        "layers.1.mlp.experts.gate_up_proj",
        "layers.1.mlp.experts.down_proj",
        "layers.0.mlp.gate.weight",
    ]
    listed = ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]
    model = adapters.make(tiny.qwen3_moe(), tmp_path, target_modules=listed, target_parameters=targets)
    # (PEFT makes a list of leaves of a pattern where it knows the model; it then names more modules)
    adapters.rewrite(tmp_path / "adapter", target_modules=r".*layers\.0\.self_attn\.(q|v)_proj")
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    config = adapters.read(tmp_path / "out")[1]
    assert config["target_modules"] == ["down_proj", "gate", "gate_proj", "q_proj", "up_proj", "v_proj"]
    adapters.rewrite(
        tmp_path / "out", target_modules=r".*layers\.0\.self_attn\.(q|v)_proj|.*experts.*|.*gate"
    )
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    before, after = tmp_path / "adapter", tmp_path / "back"
    assert (before / adapters.WEIGHTS).read_bytes() == (after / adapters.WEIGHTS).read_bytes()
    loaded = PeftModel.from_pretrained(tiny.build(tiny.qwen3_moe()), str(tmp_path / "back"))
    names = [{n for n, _ in m.named_parameters() if "lora_" in n} for m in (model, loaded)]
    assert names[0] == names[1]
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_linears_that_share_a_name_with_experts(tmp_path: Path) -> None:
    """down_proj is an expert's and a dense layer's."""
    config = tiny.qwen3_moe(mlp_only_layers=[0])
    model = adapters.make(config, tmp_path, target_modules=["down_proj", "q_proj"])
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    loaded = PeftModel.from_pretrained(tiny.build(config), str(tmp_path / "back"))
    names = [{n for n, _ in m.named_parameters() if "lora_" in n} for m in (model, loaded)]
    assert names[0] == names[1]
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_embeddings(tmp_path: Path) -> None:
    model = adapters.make(
        tiny.qwen3_moe(), tmp_path, target_modules=["embed_tokens"], rank_pattern={"gate_up_proj": 6}
    )
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    tensors, config = adapters.read(tmp_path / "out")
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    delta = (tensors[key + "B"] @ tensors[key + "A"]).T * config["lora_alpha"] / config["r"]
    theirs = model.get_submodule("base_model.model.model.embed_tokens").get_delta_weight("default")
    assert tensors[key + "A"].shape == (6, 96)
    adapters.rewrite(tmp_path / "adapter", tensors | {key[:-15] + "base_layer.weight": torch.ones(96, 64)})
    with pytest.raises(AdapterError, match="save_embedding_layers=False"):
        fourfold.export(tmp_path / "adapter", tmp_path / "wrong")
    assert (delta - theirs).abs().max() <= 1e-6


def test_bf16_keeps_its_bytes(tmp_path: Path) -> None:
    """Of the dtype that is trained and served; a scaling that differs is rounded once, and said."""
    adapters.make(tiny.mixtral(), tmp_path)
    folder = tmp_path / "adapter"
    tensors, _ = adapters.read(folder)
    adapters.rewrite(folder, {key: tensor.bfloat16() for key, tensor in tensors.items()})
    assert fourfold.export(folder, tmp_path / "out").exact
    assert {t.dtype for t in adapters.read(tmp_path / "out")[0].values()} == {torch.bfloat16}
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    assert (tmp_path / "back" / adapters.WEIGHTS).read_bytes() == (folder / adapters.WEIGHTS).read_bytes()
    adapters.rewrite(folder, alpha_pattern={"down_proj": 16})
    assert fourfold.export(folder, tmp_path / "twice").exact  # twice a number is a number
    adapters.rewrite(folder, alpha_pattern={"down_proj": 12})
    assert not fourfold.export(folder, tmp_path / "once_and_a_half").exact


def test_packed_base(tmp_path: Path) -> None:
    """The base that it was trained on may be Fourfold's own checkpoint."""
    adapters.make(tiny.qwen3_moe(), tmp_path)
    tiny.save(tiny.qwen3_moe(), tmp_path / "plain")
    packed = tiny.packed_folder(tmp_path / "plain", tmp_path / "packed")
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    fourfold.export(tmp_path / "adapter", tmp_path / "other", base=packed)
    files = [(tmp_path / name / adapters.WEIGHTS).read_bytes() for name in ("out", "other")]
    assert files[0] == files[1]


def test_a_doubled_rank_goes_before_the_adapters_own_patterns(tmp_path: Path) -> None:
    adapters.make(tiny.mixtral(), tmp_path, target_modules=[])
    fourfold.export(tmp_path / "adapter", tmp_path / "servers", base=tmp_path / "base")
    tensors, _ = adapters.read(tmp_path / "servers")
    for key in [k for k in tensors if ".w3.lora_A" in k]:
        tensors[key] = 2 * tensors[key]
    # (the rank of these experts is 4, by a pattern that means the fused parameter as well)
    adapters.rewrite(tmp_path / "servers", tensors, r=8, lora_alpha=16)
    adapters.rewrite(tmp_path / "servers", rank_pattern={".*experts.*": 4}, alpha_pattern={".*experts.*": 8})
    wanted = adapters.per_expert_deltas(tmp_path / "servers")
    fourfold.export(
        tmp_path / "servers", tmp_path / "back", layout="fused", base=tmp_path / "base", double_rank=True
    )
    loaded = PeftModel.from_pretrained(tiny.build(tiny.mixtral()), tmp_path / "back")
    found = adapters.deltas(loaded)["model.layers.0.mlp.experts.gate_up_proj"]
    gate, up = (wanted[f"model.layers.0.block_sparse_moe.experts.0.{n}"] for n in ("w1", "w3"))
    torch.testing.assert_close(found[0], torch.cat((gate, up)), rtol=1e-5, atol=1e-6)
