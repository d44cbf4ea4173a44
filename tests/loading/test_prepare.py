"""`prepare`: what it freezes, casts and switches on, and what it leaves alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from fourfold.errors import ConfigurationError


@pytest.fixture
def packed(tmp_path):
    tiny.save(tiny.mixtral(), tmp_path)
    config = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)


def test_freezes_and_casts_norms_only_on_request(packed) -> None:
    before = {n: p.dtype for n, p in packed.named_parameters()}
    fourfold.prepare(packed)
    assert not any(p.requires_grad for p in packed.parameters())
    assert {n: p.dtype for n, p in packed.named_parameters()} == before
    assert packed.is_gradient_checkpointing
    fourfold.prepare(packed, norms_in_fp32=True)
    changed = {n for n, p in packed.named_parameters() if p.dtype != before[n]}
    assert changed == {n for n in before if "norm" in n}


def test_input_gradients_are_enabled_and_checkpointing_is_optional(packed) -> None:
    fourfold.prepare(packed, gradient_checkpointing=False)
    assert not packed.is_gradient_checkpointing
    assert packed.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad


def test_dequantize_needs_a_quantized_model_without_adapters(packed) -> None:
    with pytest.raises(ConfigurationError, match="not quantized"):
        fourfold.dequantize(tiny.build(tiny.mixtral()))
    plain = fourfold.dequantize(packed)
    assert plain.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert getattr(plain, "hf_quantizer", None) is None
