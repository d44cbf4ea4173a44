"""`prepare`: what it freezes, casts and switches on, and what it leaves alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
    assert packed(torch.tensor([[3, 1, 4]])).logits.dtype == torch.bfloat16


def test_refuses_a_model_that_has_adapters(packed) -> None:
    model = get_peft_model(fourfold.prepare(packed), LoraConfig(r=2, target_modules=["q_proj"]))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    for which in (model, model.get_base_model()):
        with pytest.raises(ConfigurationError, match="before adapters"):
            fourfold.prepare(which)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable


def test_input_gradients_are_enabled_and_checkpointing_is_optional(packed) -> None:
    fourfold.prepare(packed, gradient_checkpointing=False)
    assert not packed.is_gradient_checkpointing
    assert packed.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad


def test_dequantize_needs_a_quantized_model_without_adapters(packed) -> None:
    with pytest.raises(ConfigurationError, match="not quantized"):
        fourfold.dequantize(tiny.build(tiny.mixtral()))
    targets = fourfold.expert_targets(packed)
    model = get_peft_model(packed, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
    for attempt in (lambda: fourfold.dequantize(model), model.dequantize, model.get_base_model().dequantize):
        with pytest.raises(ConfigurationError, match="adapter off first"):
            attempt()
    model(torch.tensor([[3, 1, 4]]))
    plain = fourfold.dequantize(model.unload())
    assert plain.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert getattr(plain, "hf_quantizer", None) is None


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"experts_quant_type": "int8"}])
def test_dequantize_into_another_dtype_converts_all_of_it(tmp_path, settings) -> None:
    tiny.save(tiny.mixtral(), tmp_path)
    config = fourfold.MoeBitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
    exact = model(torch.tensor([[3, 1, 4]])).logits
    plain = fourfold.dequantize(model, torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert plain.config.dtype == torch.bfloat16
    assert torch.allclose(plain(torch.tensor([[3, 1, 4]])).logits.float(), exact, atol=0.1)
