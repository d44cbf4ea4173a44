"""Undecorated experts on CUDA: loaded by `from_pretrained`, computing and going backward as on the CPU."""

from pathlib import Path

import pytest
import torch
import transformers

import fourfold
import tiny

pytestmark = pytest.mark.gpu
IDS = torch.arange(1, 19).view(2, 9)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("make", [tiny.llama4, tiny.jetmoe])
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
