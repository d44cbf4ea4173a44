"""Undecorated experts on CUDA: loaded by `from_pretrained`, computing and going backward as on the CPU."""

from pathlib import Path

import pytest
import torch
import transformers

import fourfold

pytestmark = pytest.mark.gpu
IDS = torch.arange(1, 19).view(2, 9)


def llama4() -> transformers.PretrainedConfig:
    return transformers.Llama4TextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        intermediate_size_mlp=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        pad_token_id=0,
    )


def jetmoe() -> transformers.PretrainedConfig:
    return transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=128,
        num_local_experts=4,
        pad_token_id=0,
    )


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("make", [llama4, jetmoe])
def test_output_and_gradient_are_those_of_the_same_numbers_unpacked(
    tmp_path: Path, make, quant_type: str
) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(make()).save_pretrained(tmp_path)
    config = fourfold.MoeBitsAndBytesConfig(experts_quant_type=quant_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": 0}, dtype=torch.float32
    )
    fourfold.verify(model)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        x = model.get_input_embeddings()(IDS.cuda()).detach().requires_grad_()
        logits = model(inputs_embeds=x, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        return logits.detach(), gradient

    packed = run()
    model = fourfold.dequantize(model)
    for ours, plain in zip(packed, run(), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
