"""LoRA on experts that keep their own forward: formats, bf16, checkpointing, several adapters at once."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

import own_forward
from fourfold.formats import PackFormat
from own_forward import TYPES, config_for, gradients, lora, output

FORMATS = [PackFormat("int8"), PackFormat("nf4", 64, True), PackFormat("fp4", 128)]


@pytest.fixture(params=TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    if not own_forward.is_known(request.param):
        pytest.skip(f"this transformers has no {request.param}")
    return request.param


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert off(found[name], gradient) <= 1e-5, name


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format_has_stocks_logits_and_gradients(model_type: str, fmt: PackFormat) -> None:
    packed, plain = (lora(model) for model in own_forward.pair(model_type, fmt))
    with torch.no_grad():
        assert off(output(packed), output(plain)) <= 1e-6
    assert_same_gradients(gradients(packed), gradients(plain))


@pytest.mark.parametrize("targets", [slice(0, 1), slice(1, None)], ids=["first", "others"])
def test_some_projections_alone(model_type: str, targets: slice) -> None:
    models = own_forward.pair(model_type, FORMATS[0])
    names = config_for(models[0]).target_parameters
    chosen = [name for name in names if name in list(names)[targets]]
    packed, plain = (lora(model, target_parameters=chosen) for model in models)
    assert_same_gradients(gradients(packed), gradients(plain))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [(FORMATS[0], torch.float32), (FORMATS[0], torch.bfloat16), (FORMATS[1], torch.bfloat16)],
)
def test_checkpointing_changes_no_bit(
    model_type: str, fmt: PackFormat, dtype: torch.dtype, reentrant: bool
) -> None:
    model = lora(own_forward.pair(model_type, fmt, dtype)[0])
    if not model.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match=r"does not support \w+ checkpointing"):
            own_forward.checkpoint_layers_(model, reentrant)
        return
    wanted = gradients(model)
    model.zero_grad()
    own_forward.checkpoint_layers_(model, reentrant)
    assert model.is_gradient_checkpointing
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert torch.equal(found[name], gradient), name


def with_second(model: nn.Module) -> PeftModel:
    """Two adapters of different rank and scaling. (PEFT wants the same target parameters of both.)"""
    second = config_for(model, r=2, lora_alpha=3)
    model = lora(model)
    torch.manual_seed(2)
    model.add_adapter("second", second)
    return model


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_switched_both_active_off_and_deleted(model_type: str, fmt: PackFormat) -> None:
    packed, plain = own_forward.pair(model_type, fmt)
    with torch.no_grad():
        base = output(packed)
    ours, stock = with_second(packed), with_second(plain)
    seen = [base]
    for active in ("default", "second", ["default", "second"], "second", "default"):
        for model in (ours, stock):
            model.base_model.set_adapter(active)
        with torch.no_grad():
            seen.append(output(ours))
            assert off(seen[-1], output(stock)) <= 1e-6, active
            with ours.disable_adapter():
                assert torch.equal(output(ours), base)
    first, second, both, second_again, first_again = seen[1:]
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    apart = [
        off(a, b) for a, b in ((first, base), (second, base), (first, second), (both, first), (both, second))
    ]
    assert min(apart) > 1e-3
    ours.delete_adapter("second")
    with torch.no_grad():
        assert torch.equal(output(ours), first)
    assert not [name for name, _ in ours.named_parameters() if "second" in name]
    with torch.no_grad():
        assert torch.equal(output(ours.unload()), base)


def test_both_active_train_together_and_one_alone_leaves_the_other(model_type: str) -> None:
    ours, stock = (with_second(model) for model in own_forward.pair(model_type, FORMATS[0]))
    for model in (ours, stock):
        model.base_model.set_adapter(["default", "second"])
    assert_same_gradients(gradients(ours), gradients(stock))
    ours.zero_grad()
    ours.set_adapter("second")
    found = gradients(ours)
    assert {name for name, gradient in found.items() if gradient is not None} == {
        name for name in found if "second" in name
    }
