"""Checkpoints with images beside the text, of which `AutoModelForCausalLM` makes the text model alone."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fourfold
import tiny

NF4 = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
VISION = {"hidden_size": 32, "intermediate_size": 32}


def qwen3_5() -> transformers.PreTrainedModel:
    text = {
        **tiny.COMMON,
        "hidden_size": 64,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    }
    vision = {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    cls = transformers.Qwen3_5MoeForConditionalGeneration
    config = transformers.Qwen3_5MoeConfig(
        text_config=text, vision_config=vision, architectures=[cls.__name__]
    )
    return cls(config)


def llama4() -> transformers.PreTrainedModel:
    vision = {
        **VISION,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    cls = transformers.Llama4ForConditionalGeneration
    config = transformers.Llama4Config(
        text_config=tiny.llama4().to_dict(), vision_config=vision, architectures=[cls.__name__]
    )
    return cls(config)


@pytest.mark.parametrize("build", [qwen3_5, llama4])
@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
def test_the_text_model_alone_was_trained(tmp_path: Path, build, base_weights: str) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    whole = build().to(torch.float32)
    with torch.no_grad():  # (experts are left uninitialised by some)
        for parameter in whole.parameters():
            parameter.normal_(0, 0.1)
    whole.save_pretrained(base)
    settings = fourfold.MoeBitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    assert "vision" not in " ".join(name for name, _ in model.named_parameters())
    lora = LoraConfig(
        r=3,
        target_modules=["q_proj"],
        target_parameters=fourfold.expert_targets(model),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, lora).save_pretrained(adapter)
    report = fourfold.merge(base, adapter, out, base_weights)
    assert report.planned == 2 * 3
    plain = AutoModelForCausalLM.from_pretrained(base)
    if base_weights == "dequantized":
        plain = fourfold.dequantize(AutoModelForCausalLM.from_pretrained(base, quantization_config=settings))
    wanted = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == report.keys
    assert not any("vision" in key or "visual" in key for key in changed)
