"""Generating with an adapter on a GPU, as on the CPU, where every test runs in the default suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

import fourfold
import own_forward
import parity
from fourfold.training.generation import load_for_generation, load_model, stream
from tiny_chat import make_tokenizer, tiny_sizes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = "what colour is the sky"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with a tokenizer. Tokens take all experts: rounding would send some to others."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = MixtralConfig(**tiny_sizes(), num_local_experts=4, num_experts_per_tok=4)
    MixtralForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def saved_adapter(base: Path, out: Path) -> Path:
    """Random factors on all experts, on a model packed so."""
    model = load_model(str(base), 4)
    torch.manual_seed(1)
    get_peft_model(model, own_forward.config_for(model, lora_alpha=30)).save_pretrained(out)
    return out


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_verb_generates(
    folder: Path,
    tmp_path: Path,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The steps of `fourfold generate`: the tokens are the likeliest ones that stock's sums give in fp32."""
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    adapter = saved_adapter(folder, tmp_path / "adapter")
    model, tokenizer = load_for_generation(str(folder), None, str(adapter))
    assert next(model.parameters()).device.type == device
    model.generation_config.eos_token_id = None  # a random model ends wherever it likes
    capsys.readouterr()
    text, count = stream(model, tokenizer, PROMPT, NEW_TOKENS, sample=False)
    assert count == NEW_TOKENS
    assert capsys.readouterr().out.strip() == text

    turns = [{"role": "user", "content": PROMPT}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs.to(device), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        ours = model(ids).logits.float().cpu()
        with model.disable_adapter():
            base = model(ids).logits.float().cpu()
    assert tokenizer.decode(ids[0, inputs.shape[1] :], skip_special_tokens=True).strip() == text

    plain = fourfold.dequantize(load_model(str(folder), 4)).to("cpu", torch.float32)
    stock = PeftModel.from_pretrained(plain, str(adapter)).eval()
    with torch.no_grad():
        wanted = stock(ids.cpu()).logits
    tolerance = 1e-5 if device == "cpu" else parity.BF16_NOISE
    assert (ours - wanted).norm() <= tolerance * wanted.norm()
    assert (base - wanted).norm() > 10 * parity.BF16_NOISE * wanted.norm()
    before = wanted[0, inputs.shape[1] - 1 : -1]
    chosen = before.gather(1, ids[0, inputs.shape[1] :, None].cpu())[:, 0]
    slack = tolerance * float(wanted.abs().max())
    assert (before.max(1).values - chosen <= slack).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe", "dbrx", "longcat_flash"])
def test_own_forwards_generate_what_stock_does(model_type: str, device: str) -> None:
    """One token after the other through the cache, in fp32."""
    ours, stock = (own_forward.lora(model, r=8) for model in own_forward.pair(model_type))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "use_cache": True}
    ours.to(device)
    with torch.no_grad():
        found = ours.generate(input_ids=own_forward.IDS.to(device), pad_token_id=0, **settings).cpu()
        with ours.disable_adapter():
            base = ours.generate(input_ids=own_forward.IDS.to(device), pad_token_id=0, **settings).cpu()
        with parity.stock_reads(stock):
            wanted = stock.generate(input_ids=own_forward.IDS, pad_token_id=0, **settings)
    assert found.shape[1] == own_forward.IDS.shape[1] + NEW_TOKENS
    assert torch.equal(found, wanted)
    assert not torch.equal(found, base)
