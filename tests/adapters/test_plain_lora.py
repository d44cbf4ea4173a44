"""LoRA on unquantized experts after `prepare`: low-rank form, stock's files and numbers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from safetensors.torch import load_file

import fourfold
import tiny
from fourfold.adapters import plain_wrapper
from fourfold.errors import AdapterError
from fourfold.experts import find_experts
from fourfold.experts.plain import PlainExperts
from tiny import IDS, logits


def wrapped(model, **changes):
    torch.manual_seed(1)
    arguments = {"r": 5, "target_modules": ["q_proj"], "target_parameters": fourfold.expert_targets(model)}
    return get_peft_model(model, LoraConfig(**(arguments | {"init_lora_weights": False} | changes)))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_files_logits_and_gradients_are_stocks(kind: str, tmp_path: Path) -> None:
    plain = tiny.build(tiny.KINDS[kind]())
    ours = wrapped(fourfold.prepare(copy.deepcopy(plain), gradient_checkpointing=False))
    stock = wrapped(copy.deepcopy(plain))
    assert any(type(m) is plain_wrapper.ParamWrapper for m in ours.modules())
    assert any(type(m) is StockParamWrapper for m in stock.modules())
    assert not any(type(m) is plain_wrapper.ParamWrapper for m in stock.modules())
    for name, model in (("ours", ours), ("stock", stock)):
        model.save_pretrained(tmp_path / name)
        model.train()
        model(IDS, labels=IDS).loss.backward()
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in ("ours", "stock"))
    assert first.read_bytes() == second.read_bytes()
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "stock")]
    assert configs[0] == configs[1]
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours"))
    assert (logits(ours) - theirs).norm() <= 1e-6 * theirs.norm()
    wanted = {n: p.grad for n, p in stock.named_parameters() if "lora_" in n}
    found = {n: p.grad for n, p in ours.named_parameters() if "lora_" in n}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_merged_switched_off_and_two_active_are_stocks() -> None:
    plain = tiny.build(tiny.mixtral())
    ours, stock = wrapped(fourfold.prepare(copy.deepcopy(plain))), wrapped(copy.deepcopy(plain))
    for model in (ours, stock):
        torch.manual_seed(2)
        targets = list(model.peft_config["default"].target_parameters)
        config = LoraConfig(
            r=3, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False
        )
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(plain))
    wanted = logits(stock)
    torch.testing.assert_close(logits(ours.merge_and_unload()), wanted, rtol=1e-5, atol=1e-5)


def test_experts_under_accelerates_hooks_are_stocks() -> None:
    plain = tiny.build(tiny.mixtral())
    wanted = logits(wrapped(copy.deepcopy(plain)))
    for found in find_experts(plain):  # as `device_map` leaves them
        add_hook_to_module(found.module, AlignDevicesHook(execution_device="cpu"))
    ours = wrapped(fourfold.prepare(plain, gradient_checkpointing=False))
    assert (logits(ours) - wanted).norm() <= 1e-6 * wanted.norm()


def test_weights_with_scales_beside_them_are_left_alone() -> None:
    plain = tiny.build(tiny.mixtral())
    experts = plain.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    fourfold.prepare(plain, gradient_checkpointing=False)
    assert not isinstance(plain.model.layers[0].mlp.experts, PlainExperts)
    assert isinstance(plain.model.layers[1].mlp.experts, PlainExperts)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("layers_to_transform", [0]), ("exclude_modules", ["experts"]), ("use_qalora", True)],
)
def test_what_would_be_ignored_is_refused(setting: str, value: object) -> None:
    model = fourfold.prepare(tiny.build(tiny.mixtral()))
    with pytest.raises(AdapterError, match=f"{setting}.* would be ignored for target_parameters"):
        wrapped(model, **{setting: value})


def gradients(model):
    model.zero_grad()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if "lora_" in n}


def difference(found, wanted) -> float:
    assert found.keys() == wanted.keys()
    worst = [(found[n] - wanted[n]).norm() / wanted[n].norm() for n in wanted]
    return float(torch.stack(worst).max())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_under_checkpointing_gradients_are_stocks(kind: str, reentrant: bool) -> None:
    plain = tiny.build(tiny.KINDS[kind]())
    wanted = gradients(wrapped(copy.deepcopy(plain)))
    ours = wrapped(fourfold.prepare(plain, use_reentrant=reentrant))
    assert ours.is_gradient_checkpointing
    assert difference(gradients(ours), wanted) <= 1e-5


def test_an_adapter_of_stock_peft_runs_on_a_prepared_model(tmp_path: Path) -> None:
    plain = tiny.build(tiny.gpt_oss())
    stock = wrapped(copy.deepcopy(plain))
    stock.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(fourfold.prepare(copy.deepcopy(plain)), tmp_path)
    assert any(type(m) is plain_wrapper.ParamWrapper for m in ours.modules())
    wanted = logits(stock)
    assert (logits(ours) - wanted).norm() <= 1e-6 * wanted.norm()
    assert (logits(plain) - wanted).norm() > 1e-3 * wanted.norm()


def test_a_merged_model_is_saved_under_the_base_s_keys(tmp_path: Path) -> None:
    plain = tiny.build(tiny.mixtral())
    ours = wrapped(fourfold.prepare(copy.deepcopy(plain)))
    wanted = logits(ours)
    ours.merge_and_unload().save_pretrained(tmp_path / "merged")
    plain.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / n / "model.safetensors") for n in ("merged", "plain")]
    assert list(files[0]) == list(files[1])
    again = type(plain).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)
