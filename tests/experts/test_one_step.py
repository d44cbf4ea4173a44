"""Which experts are computed in one step (`kernels.layer`), and that the model does not notice."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fourfold
import needs
import tiny
from fourfold.experts.forward import is_plain_silu
from fourfold.kernels import layer

triton = needs.triton()
NF4 = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def packed(kind: str, tmp_path, **changes):
    tiny.save(getattr(tiny, kind)(**changes), tmp_path)
    return tiny.load(tmp_path, **NF4)


@pytest.mark.parametrize(
    ("kind", "changes", "answer"),
    [
        ("mixtral", {}, True),
        ("qwen3_moe", {}, True),
        ("qwen3_moe", {"hidden_act": "gelu"}, False),
        ("gpt_oss", {}, False),
        ("nemotron_h", {}, False),
    ],
)
def test_the_gate_is_tried(kind: str, changes: dict, answer: bool, tmp_path) -> None:
    module = tiny.experts_of(packed(kind, tmp_path, **changes))
    assert is_plain_silu(module, module.fourfold_layout) is answer
    assert is_plain_silu(module, module.fourfold_layout) is answer  # remembered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_is_tried_in_fp32_whatever_the_default_is(dtype: torch.dtype, tmp_path) -> None:
    """(Checkpoints are loaded under the model's dtype.)"""
    module = tiny.experts_of(packed("mixtral", tmp_path))

    class Swish(torch.nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    module.act_fn = Swish()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert is_plain_silu(module, module.fourfold_layout)
    finally:
        torch.set_default_dtype(before)


def test_a_gate_that_clamps_large_numbers_only_is_noticed(tmp_path) -> None:
    module = tiny.experts_of(packed("mixtral", tmp_path))

    class Clamped(type(module)):
        def _apply_gate(self, gate_up):
            return super()._apply_gate(gate_up.clamp(max=100.0))

    assert is_plain_silu(module, module.fourfold_layout)
    module.__class__ = Clamped
    assert not is_plain_silu(module, module.fourfold_layout)


def test_a_gate_given_to_one_module_is_noticed(tmp_path) -> None:
    module = tiny.experts_of(packed("mixtral", tmp_path))

    def gate(gate_up):
        first, second = gate_up.chunk(2, dim=-1)
        return 3 * torch.nn.functional.silu(first) * second

    module._apply_gate = gate
    assert not is_plain_silu(module, module.fourfold_layout)
    del module._apply_gate
    assert is_plain_silu(module, module.fourfold_layout)


def test_a_gate_without_an_activation_of_its_own_is_tried_too(tmp_path) -> None:
    module = tiny.experts_of(packed("mixtral", tmp_path))

    class Own(type(module)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    module.__class__ = Own
    del module.act_fn
    assert not is_plain_silu(module, module.fourfold_layout)


def test_an_activation_that_was_changed_is_noticed(tmp_path) -> None:
    module = tiny.experts_of(packed("mixtral", tmp_path))
    assert is_plain_silu(module, module.fourfold_layout)
    module.act_fn = torch.nn.GELU()
    assert not is_plain_silu(module, module.fourfold_layout)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_model_computes_the_same(kind: str, tmp_path, monkeypatch) -> None:
    model = packed(kind, tmp_path)
    torch.manual_seed(1)
    targets = fourfold.expert_targets(model)
    model = get_peft_model(model, LoraConfig(r=5, target_parameters=targets, init_lora_weights=False))

    def results():
        model.zero_grad()
        out = model(tiny.IDS, labels=tiny.IDS)
        out.loss.backward()
        return [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    wanted = results()
    steps, silu_experts = [], layer.silu_experts

    def counted(*args, **kwargs):
        steps.append(1)
        return silu_experts(*args, **kwargs)

    monkeypatch.setattr(layer, "runs_on", lambda device, dtype: True)
    monkeypatch.setattr(layer, "silu_experts", counted)
    found = results()
    assert len(steps) == model.config.num_hidden_layers
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
