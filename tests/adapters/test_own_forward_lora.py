"""LoRA on experts that keep their own forward: stock keys, shapes and numbers, both ways."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import fourfold
import own_forward
from fourfold.adapters.wrapper import ParamWrapper
from fourfold.experts.own_forward import _Scope
from own_forward import TYPES, gradients, lora, output


@pytest.fixture(params=TYPES)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """Packed, and stock's on the same numbers in fp32."""
    if not own_forward.is_known(request.param):
        pytest.skip(f"this transformers has no {request.param}")
    return own_forward.pair(request.param)


def count_checkpoints(model: nn.Module) -> list[None]:
    """One entry for each layer that was checkpointed."""
    calls: list[None] = []

    def counting(original):
        def run(*args, **kwargs):
            calls.append(None)
            return original(*args, **kwargs)

        return run

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = counting(module._gradient_checkpointing_func)
    return calls


def test_saved_adapter_is_stocks_and_loads_both_ways(pair, tmp_path: Path) -> None:
    packed, plain = pair
    targets = fourfold.expert_targets(packed)
    assert targets == fourfold.expert_targets(plain)
    adapters = {}
    for name, model in (("ours", packed), ("stock", plain)):
        adapters[name] = lora(copy.deepcopy(model))
        adapters[name].save_pretrained(tmp_path / name)
    ours, stock = (load_file(tmp_path / n / "adapter_model.safetensors") for n in adapters)
    assert list(ours) == list(stock)
    for key, wanted in stock.items():
        assert ours[key].dtype == wanted.dtype
        assert torch.equal(ours[key], wanted), key
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in adapters]
    assert configs[0] == configs[1]
    for name in adapters:
        here = PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path / name)
        there = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / name)
        with torch.no_grad():
            a, b = output(here), output(there)
            with here.disable_adapter():
                base = output(here)
        assert (a - b).norm() <= 1e-6 * b.norm()
        assert (a - base).norm() > 1e-3 * base.norm()


def test_stock_merges_where_it_cannot_run() -> None:
    """A module around the experts reads their parameters; stock gets no help here (`stock_reads`)."""
    packed, plain = own_forward.pair("dbrx")
    stock = lora(plain)
    with pytest.raises(AttributeError, match="'ParamWrapper' object has no attribute"):
        stock(input_ids=own_forward.IDS)
    with torch.no_grad():
        merged = stock.merge_and_unload()(input_ids=own_forward.IDS, use_cache=False).logits
        ours = output(lora(packed))
    assert (ours - merged).norm() <= 1e-6 * merged.norm()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_factor_gets_stocks_gradient(pair, reentrant: bool | None) -> None:
    packed, plain = pair
    wanted = gradients(lora(plain))
    model = lora(packed)
    if reentrant is not None:
        if not packed.supports_gradient_checkpointing:
            pytest.skip("this model has no gradient checkpointing")
        own_forward.checkpoint_layers_(model, reentrant)
        calls = count_checkpoints(model)
    found = gradients(model)
    if reentrant is not None:
        assert calls
    assert found.keys() == wanted.keys()
    assert any(isinstance(m, ParamWrapper) for m in model.modules())
    for name, gradient in wanted.items():
        assert found[name] is not None, name
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_autograd_keeps_no_sum(pair, monkeypatch) -> None:
    packed, _ = pair
    model = lora(packed)
    made: list[torch.UntypedStorage] = []
    decode_ = _Scope._decode

    def record(self, *args):
        weight = decode_(self, *args)
        made.append(torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(_Scope, "_decode", record)
    y = output(model)
    assert made
    assert y.requires_grad
    assert all(reference.expired() for reference in made)
