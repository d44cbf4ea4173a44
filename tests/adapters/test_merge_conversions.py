"""Checkpoints whose tensors are the model's only by way of a conversion: joined, cut, interleaved."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, Interleave, WeightConverter

import fourfold
import tiny
from fourfold.errors import AdapterError, CheckpointError
from fourfold.loading import places

MODEL = "qwen3_moe"
QKV = [f"self_attn.{name}_proj.weight" for name in "qkv"]
STACKS = WeightConverter(
    ["mlp.experts.gate_stack", "mlp.experts.up_stack"], "mlp.experts.gate_up_proj", [Concatenate(dim=1)]
)
INTERLEAVED = WeightConverter("mlp.experts.w13", "mlp.experts.gate_up_proj", [Interleave(dim=1)])
SETTINGS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(params=[STACKS, INTERLEAVED], ids=["stacks", "interleaved"])
def base(request, tmp_path: Path) -> Iterator[Path]:
    """Attention's projections under one key, and gate and up of all experts under two or under one."""
    before = conversion_mapping.get_checkpoint_conversion_mapping(MODEL)
    joined = WeightConverter("self_attn.qkv.weight", QKV, [Chunk(dim=0)])
    conversion_mapping.register_checkpoint_conversion_mapping(MODEL, [request.param, joined], overwrite=True)
    try:
        tiny.save(tiny.qwen3_moe(num_key_value_heads=4), tmp_path / "base")
        yield tmp_path / "base"
    finally:
        conversion_mapping.register_checkpoint_conversion_mapping(MODEL, before, overwrite=True)


def adapter_of(base: Path, out: Path) -> Path:
    model = tiny.load(base, **SETTINGS)
    targets = fourfold.expert_targets(model)
    config = LoraConfig(
        r=3, target_modules=["q_proj", "v_proj"], target_parameters=targets, init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(out)
    return out


def merged_by_stock(model, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge. (Its `from_pretrained` converts adapters too, and fails at these mappings.)"""
    wrapped = get_peft_model(model, LoraConfig.from_pretrained(adapter))
    factors = load_file(adapter / "adapter_model.safetensors")
    renamed = {k.replace(".weight", ".default.weight"): v for k, v in factors.items()}
    assert not wrapped.load_state_dict(renamed, strict=False).unexpected_keys
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
def test_the_sum_is_written_in_the_bases_layout(base: Path, tmp_path: Path, base_weights: str) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    report = fourfold.merge(base, adapter, tmp_path / "out", base_weights)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    assert "model.layers.0.self_attn.qkv.weight" in theirs
    assert not any(k.endswith(("q_proj.weight", "gate_up_proj")) for k in theirs)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    plain = tiny.load(base)
    if base_weights == "dequantized":
        plain = fourfold.dequantize(tiny.load(base, **SETTINGS))
    wanted = merged_by_stock(plain, adapter)
    found, before = tiny.load(tmp_path / "out").state_dict(), tiny.load(base).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    if base_weights == "original":
        changed = [name for name in found if not torch.equal(found[name], before[name])]
        assert len(changed) == report.planned == 2 * 4


def test_a_copy_behind_a_conversion_is_not_passed_over(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.k_proj.weight"
    save_file(load_file(file) | {key: torch.zeros(64, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"holds .*k_proj\.weight, which"):
        fourfold.merge(base, adapter, tmp_path / "out")


def test_a_conversion_too_large_for_memory_is_refused(base: Path, tmp_path: Path, monkeypatch) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    monkeypatch.setattr(places, "CONVERSION_ELEMENTS", 100)
    with pytest.raises(CheckpointError, match="cannot be done in pieces"):
        fourfold.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
