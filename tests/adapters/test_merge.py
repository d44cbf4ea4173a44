"""`fourfold.merge`: the written checkpoint is the base plus the adapter, and nothing else is touched."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from fourfold.errors import AdapterError, CheckpointError, ConfigurationError
from tiny import logits

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
OTHERS = {"llama4": tiny.llama4, "dbrx": tiny.dbrx, "jetmoe": tiny.jetmoe}


def lora(model, **changes) -> PeftModel:
    arguments = {
        "r": 5,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": fourfold.expert_targets(model),
        "init_lora_weights": False,
    }
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**(arguments | changes)))


def merged_by_stock(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """fp32, in memory, by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_near(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    """Equal as far as fp32 goes, and far from the base: what the adapter does is there."""
    assert (wanted - base).norm() > 0.05 * base.norm()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture(params=tiny.KINDS)
def kind(request, tmp_path: Path) -> Path:
    # (bitsandbytes' 4-bit Linears are wrong on CPUs where a width is no multiple of 64)
    changes = {"moe_shared_expert_intermediate_size": 64} if request.param == "nemotron_h" else {}
    tiny.save(tiny.KINDS[request.param](**changes), tmp_path / "base", max_shard_size="100KB")
    return tmp_path / "base"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.save(tiny.qwen3_moe(), tmp_path / "base")
    return tmp_path / "base"


def packed_adapter(base: Path, out: Path, settings=None, **changes) -> Path:
    lora(tiny.load(base, **(settings or NF4)), **changes).save_pretrained(out)
    return out


def test_merged_into_the_original_it_is_the_adapter_on_the_original(kind: Path, tmp_path: Path) -> None:
    adapter = packed_adapter(kind, tmp_path / "adapter")
    report = fourfold.merge(kind, adapter, tmp_path / "out")
    model = tiny.load(kind)
    plain = logits(model)
    assert_near(logits(tiny.load(tmp_path / "out")), logits(PeftModel.from_pretrained(model, str(adapter))), plain)
    assert report.planned == len(load_file(adapter / "adapter_model.safetensors")) // 2


def test_dequantized_it_is_the_model_that_was_trained(kind: Path, tmp_path: Path) -> None:
    adapter = packed_adapter(kind, tmp_path / "adapter")
    fourfold.merge(kind, adapter, tmp_path / "out", base_weights="dequantized")
    trained = PeftModel.from_pretrained(fourfold.dequantize(tiny.load(kind, **NF4)), str(adapter))
    assert_near(logits(tiny.load(tmp_path / "out")), logits(trained), logits(tiny.load(kind)))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"experts_quant_type": "fp4", "experts_blocksize": 32},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "experts_quant_type": "int8"},
        {**NF4, "llm_int8_skip_modules": ["layers.0.mlp.experts", "k_proj"]},
    ],
    ids=["int8", "experts alone", "mixed", "skips"],
)
def test_dequantized_weights_are_the_trained_ones_in_every_format(
    base: Path, tmp_path: Path, settings: dict
) -> None:
    adapter = packed_adapter(base, tmp_path / "adapter", settings)
    fourfold.merge(base, adapter, tmp_path / "out", base_weights="dequantized")
    model = fourfold.dequantize(tiny.load(base, **settings))
    wanted = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    found = tiny.load(tmp_path / "out").state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind_of", OTHERS)
@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
def test_undecorated_experts(tmp_path: Path, kind_of: str, base_weights: str) -> None:
    """LoRA of stock PEFT on the unpacked model; `fourfold.json` as a packed one would have it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny.save(OTHERS[kind_of](), base)
    model = tiny.load(base)
    names = [name for name, p in model.named_parameters() if "experts" in name or "mlp" in name or "moe" in name]
    targets = [n for n in names if dict(model.named_parameters())[n].ndim == 3 or kind_of == "dbrx" and "experts.mlp" in n]
    lora(model, target_modules=[], target_parameters=targets).save_pretrained(adapter)
    packed = tiny.load(base, experts_quant_type="nf4")
    from fourfold.adapters import provenance

    provenance.write(packed, adapter)
    fourfold.merge(base, adapter, tmp_path / "out", base_weights=base_weights)
    plain = tiny.load(base) if base_weights == "original" else fourfold.dequantize(packed)
    wanted = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    found = tiny.load(tmp_path / "out").state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
