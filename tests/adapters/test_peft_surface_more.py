"""What PEFT offers, on experts of every layout and on its less travelled ways; lines of docs/adapters.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import PretrainedConfig, PreTrainedModel

import fourfold
import tiny
from parity import lora, stock_reads
from tiny import IDS

KINDS: dict[str, Callable[..., PretrainedConfig]] = tiny.KINDS | {
    "llama4": tiny.llama4,
    "jetmoe": tiny.jetmoe,
    "dbrx": tiny.dbrx,
}
NF4 = {"experts_quant_type": "nf4"}


def linears(kind: str) -> list[str]:
    return {"jetmoe": ["q_proj", "kv_proj"], "dbrx": ["Wqkv"]}.get(kind, ["q_proj", "v_proj"])


class Both:
    """A packed model and stock's on the same numbers, made anew at each call."""

    def __init__(self, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.kind, self.folder = kind, folder
        tiny.build(KINDS[kind]()).to(dtype).save_pretrained(folder)

    def packed(self) -> PreTrainedModel:
        return tiny.load(self.folder, **NF4)

    def plain(self) -> PreTrainedModel:
        return fourfold.dequantize(self.packed())

    def config(self, model: PreTrainedModel, **changes: Any) -> Any:
        return lora(model, **({"target_modules": linears(self.kind)} | changes))

    def saved(self, folder: Path, seed: int, **changes: Any) -> str:
        model = self.packed()
        torch.manual_seed(seed)
        get_peft_model(model, self.config(model, **changes)).save_pretrained(str(folder))
        return str(folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with stock_reads(model):
        return tiny.logits(model)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gradients(model: torch.nn.Module, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor | None]:
    model.train()
    with stock_reads(model):
        model(ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("kind", KINDS)
def test_switch_two_active_disable_and_delete(kind: str, tmp_path: Path) -> None:
    both = Both(kind, tmp_path / "model")
    first, second = both.saved(tmp_path / "a", 1), both.saved(tmp_path / "b", 2, r=3)
    ours, stock = (
        PeftModel.from_pretrained(model, first, is_trainable=True) for model in (both.packed(), both.plain())
    )
    base = logits(both.packed())
    for step in ("one", "other", "two", "off", "on", "deleted"):
        for model in (ours, stock):
            if step == "one":
                model.load_adapter(second, "second", is_trainable=True)
            elif step == "other":
                model.set_adapter("second")
            elif step == "two":
                model.base_model.set_adapter(["default", "second"])
            elif step == "off":
                model.base_model.disable_adapter_layers()
            elif step == "on":
                model.base_model.enable_adapter_layers()
            else:
                model.delete_adapter("second")
                model.set_adapter("default")
        assert relative(logits(ours), logits(stock)) < 1e-6, step
        if step == "off":
            assert torch.equal(logits(ours), base)
        if step == "on":  # both are active again, and both are trained
            found, wanted = gradients(ours), gradients(stock)
            assert found.keys() == wanted.keys()
            assert {name.split(".")[-2] for name in found} == {"default", "second"}
            for name, gradient in wanted.items():
                assert gradient is not None, name
                assert gradient.any(), name
                assert relative(found[name], gradient) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_unload_gives_the_base_and_takes_adapters_again(kind: str, tmp_path: Path) -> None:
    both = Both(kind, tmp_path / "model")
    adapter = both.saved(tmp_path / "a", 1)
    model = both.packed()
    base = logits(model)
    wrapped = PeftModel.from_pretrained(model, adapter)
    wanted = logits(wrapped)
    unloaded = wrapped.unload()
    assert torch.equal(logits(unloaded), base)
    assert torch.equal(logits(PeftModel.from_pretrained(unloaded, adapter)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_without_a_row_get_zeros(kind: str, tmp_path: Path) -> None:
    """One token: experts that it is not sent to have a gradient of zero in both factors, and stay."""
    both, ids = Both(kind, tmp_path / "model"), torch.tensor([[3, 14]])
    adapter = both.saved(tmp_path / "a", 1)
    ours, stock = (
        PeftModel.from_pretrained(model, adapter, is_trainable=True)
        for model in (both.packed(), both.plain())
    )
    found, wanted = gradients(ours, ids), gradients(stock, ids)
    unused = 0
    for name, gradient in wanted.items():
        assert gradient is not None
        assert found[name] is not None, name
        assert torch.equal(found[name] == 0, gradient == 0), name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        unused += int((gradient == 0).sum()) if "experts" in name or "mlp" in name else 0
    if kind not in ("llama4", "dbrx"):  # (a dense product of all experts; one A for all)
        assert unused
    before = {n: p.detach().clone() for n, p in ours.named_parameters() if "lora_" in n}
    torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1, weight_decay=0).step()
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter == before[name], found[name] == 0), name


@pytest.mark.parametrize("cast", [True, False])
def test_factors_dtype_in_a_bf16_model(cast: bool, tmp_path: Path) -> None:
    """PEFT holds them in fp32 unless told not to; gradients have the factors' dtype."""
    both = Both("qwen3_moe", tmp_path / "model", torch.bfloat16)
    for model in (both.packed(), both.plain()):
        wrapped = get_peft_model(model, both.config(model), autocast_adapter_dtype=cast)
        factors = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
        found = gradients(wrapped)
        wanted = torch.float32 if cast else torch.bfloat16
        assert {p.dtype for p in factors.values()} == {wanted}
        assert {g.dtype for g in found.values() if g is not None} == {wanted}
        assert all(g is not None and torch.isfinite(g).all() for g in found.values())


def test_only_the_active_adapter_is_trained(tmp_path: Path) -> None:
    both = Both("qwen3_moe", tmp_path / "model")
    model = both.packed()
    model = get_peft_model(model, both.config(model))
    model.add_adapter("second", both.config(model.get_base_model(), r=2))
    for name in ("default", "second"):
        model.set_adapter(name)
        model.zero_grad(set_to_none=True)
        found = gradients(model)
        assert all((g is not None) == (f".{name}." in n) for n, g in found.items())


def test_state_dicts_and_injection(tmp_path: Path) -> None:
    both = Both("gpt_oss", tmp_path / "model")
    model = both.packed()
    torch.manual_seed(1)
    trained = get_peft_model(model, both.config(model))
    state, wanted = get_peft_model_state_dict(trained), logits(trained)
    other = both.packed()
    other = get_peft_model(other, both.config(other))
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), wanted)
    bare = both.packed()
    bare = inject_adapter_in_model(both.config(bare), bare)
    set_peft_model_state_dict(bare, state)
    assert torch.equal(logits(bare), wanted)


def test_rescaling_and_status(tmp_path: Path) -> None:
    both = Both("qwen3_moe", tmp_path / "model")
    adapter = both.saved(tmp_path / "a", 1)
    ours, stock = (PeftModel.from_pretrained(model, adapter) for model in (both.packed(), both.plain()))
    whole = logits(ours)
    with rescale_adapter_scale(ours, 0.5), rescale_adapter_scale(stock, 0.5):
        assert relative(logits(ours), logits(stock)) < 1e-6
        assert not torch.equal(logits(ours), whole)
    assert torch.equal(logits(ours), whole)
    statuses = [peft.get_model_status(model) for model in (ours, stock)]
    for name in ("num_adapter_layers", "trainable_params", "active_adapters", "merged_adapters", "enabled"):
        assert getattr(statuses[0], name) == getattr(statuses[1], name), name
    layers = [[layer.name for layer in peft.get_layer_status(model)] for model in (ours, stock)]
    assert layers[0] == layers[1]


def test_a_scaling_that_is_a_tensor_keeps_its_gradient(tmp_path: Path) -> None:
    """(Stock takes numbers alone for parameters; nothing else may be lost in silence.)"""
    both = Both("qwen3_moe", tmp_path / "model")
    model = PeftModel.from_pretrained(both.packed(), both.saved(tmp_path / "a", 1))

    def loss(scaling: float | torch.Tensor) -> torch.Tensor:
        for name, module in model.named_modules():
            if name.endswith("experts") and "default" in getattr(module, "scaling", {}):
                module.scaling["default"] = scaling
        return model(IDS, labels=IDS).loss

    scaling = torch.tensor(0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(scaling), scaling)
    slope = (loss(0.52) - loss(0.48)).item() / 0.04
    assert grad.item() == pytest.approx(slope, rel=0.02)
    assert abs(slope) > 1e-3


def test_a_base_found_through_the_adapter(tmp_path: Path) -> None:
    both = Both("qwen3_moe", tmp_path / "model")
    adapter = both.saved(tmp_path / "a", 1)
    config = fourfold.MoeBitsAndBytesConfig(**NF4)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=config)
    fourfold.verify(model)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(both.packed(), adapter)))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_transformers_mixin_loads_every_way(low_memory: bool, trainable: bool, tmp_path: Path) -> None:
    both = Both("qwen3_moe", tmp_path / "model")
    adapter = both.saved(tmp_path / "a", 1)
    model = both.packed()
    model.load_adapter(adapter, low_cpu_mem_usage=low_memory, is_trainable=trainable)
    assert not any(p.is_meta for p in model.parameters())
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {trainable}
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(both.packed(), adapter)))


SWAPPED: list[dict[str, Any]] = [
    {"r": 2},
    {"r": 9},
    {"use_rslora": True, "r": 3},
    {"rank_pattern": {"model.layers.0.mlp.experts.gate_up_proj": 3}, "r": 5},
    {"rank_pattern": {"model.layers.0.mlp.experts.gate_up_proj": 8}, "r": 5},
    {"alpha_pattern": {"model.layers.1.mlp.experts.down_proj": 19}, "r": 3},
    {"target_modules": ["q_proj"]},
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "prepared"])
@pytest.mark.parametrize("changes", SWAPPED, ids=str)
def test_hotswapping_another_rank_or_scaling(changes: dict[str, Any], packed: bool, tmp_path: Path) -> None:
    """PEFT alone mixes up experts where the rank falls, and takes the wrong scaling with patterns."""
    both = Both("qwen3_moe", tmp_path / "model")
    same = {key: value for key, value in changes.items() if key in ("use_rslora", "alpha_pattern")}
    first = both.saved(tmp_path / "a", 1, **same)  # (PEFT refuses to change these)
    second = both.saved(tmp_path / "b", 2, **changes)

    def fresh() -> PreTrainedModel:
        return both.packed() if packed else fourfold.prepare(both.plain(), gradient_checkpointing=False)

    wanted = logits(PeftModel.from_pretrained(fresh(), second))
    model = PeftModel.from_pretrained(fresh(), first)
    hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    assert relative(logits(model), wanted) < 1e-6
    hotswap_adapter(model, first, adapter_name="default", torch_device="cpu")  # and back
    assert relative(logits(model), logits(PeftModel.from_pretrained(fresh(), first))) < 1e-6


def test_preparing_for_compiled_hotswaps_is_refused_by_peft(tmp_path: Path) -> None:
    """As on stock's: it asks every layer for a `weight`."""
    both = Both("qwen3_moe", tmp_path / "model")
    for model in (both.packed(), both.plain()):
        wrapped = get_peft_model(model, both.config(model, target_modules=None))
        with pytest.raises(AttributeError, match="weight"):
            prepare_model_for_compiled_hotswap(wrapped, target_rank=8)


def test_transformers_mixin_hotswaps(tmp_path: Path) -> None:
    both = Both("qwen3_moe", tmp_path / "model")
    first, second = both.saved(tmp_path / "a", 1), both.saved(tmp_path / "b", 2)
    model = both.packed()
    model.load_adapter(first, adapter_name="default")
    model.load_adapter(second, adapter_name="default", hotswap=True)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(both.packed(), second)))


def test_adapters_of_other_targets_are_as_stock(tmp_path: Path) -> None:
    """A second adapter on one of the projections alone."""
    both = Both("qwen3_moe", tmp_path / "model")
    results: list[Any] = []
    for model in (both.packed(), both.plain()):
        torch.manual_seed(1)
        wrapped = get_peft_model(model, both.config(model))
        try:
            wrapped.add_adapter("one", both.config(model, target_parameters=["mlp.experts.down_proj"]))
            wrapped.set_adapter("one")
            results.append(logits(wrapped))
        except ValueError as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert relative(results[0], results[1]) < 1e-6
