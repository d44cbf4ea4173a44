"""What PEFT and transformers offer for adapters, on packed experts; a line of docs/adapters.md each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import PreTrainedModel

import fourfold
import needs
import tiny
from fourfold.errors import AdapterError
from parity import expected_factors, lora
from tiny import logits

PREFIX = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral on disk, in high precision."""
    path = tmp_path_factory.mktemp("model")
    tiny.save(tiny.mixtral(), path)
    return path


@pytest.fixture
def packed(folder: Path) -> PreTrainedModel:
    return tiny.load(folder, experts_quant_type="nf4")


@pytest.fixture
def plain(folder: Path) -> PreTrainedModel:
    """Stock's model of the same numbers."""
    return fourfold.dequantize(tiny.load(folder, experts_quant_type="nf4"))


def saved(folder: Path, out: Path, seed: int = 1, **changes: Any) -> Path:
    """An adapter trained nowhere, both factors random."""
    model = tiny.load(folder, experts_quant_type="nf4")
    torch.manual_seed(seed)
    get_peft_model(model, lora(model, **changes)).save_pretrained(out)
    return out


def stock_logits(plain: PreTrainedModel, *adapters: Path) -> torch.Tensor:
    """Of stock PEFT with these adapters, all active."""
    model = PeftModel.from_pretrained(plain, str(adapters[0]))
    for number, adapter in enumerate(adapters[1:]):
        model.load_adapter(str(adapter), f"more{number}")
    model.base_model.set_adapter(["default", *(f"more{n}" for n in range(len(adapters) - 1))])
    return logits(model)


def assert_equal(ours: torch.Tensor, stock: torch.Tensor) -> None:
    assert float((ours - stock).norm() / stock.norm()) < 1e-6


# PEFT's own ways


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {f"{PREFIX}.gate_up_proj": 3}, "alpha_pattern": {f"{PREFIX}.down_proj": 11}},
        {"rank_pattern": {PREFIX: 3}, "alpha_pattern": {PREFIX: 11}},
        {"rank_pattern": {r".*\.experts.*": 2}, "alpha_pattern": {r".*\.experts.*": 9}},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"trainable_token_indices": [1, 2]},
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_settings_give_stocks_tensors_and_logits(
    packed: PreTrainedModel, plain: PreTrainedModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    models = {"ours": packed, "stock": plain}
    for name, model in models.items():
        torch.manual_seed(3)
        models[name] = get_peft_model(model, lora(model, **changes))
        models[name].save_pretrained(tmp_path / name)
    ours, stock = (load_file(tmp_path / name / "adapter_model.safetensors") for name in models)
    assert list(ours) == list(stock)
    assert all(torch.equal(ours[key], stock[key]) for key in ours)
    assert_equal(logits(models["ours"]), logits(models["stock"]))


def test_rank_pattern_reaches_experts(packed: PreTrainedModel) -> None:
    model = get_peft_model(packed, lora(packed, rank_pattern={r".*\.experts.*": 2}))
    shapes = {n: p.shape[0] for n, p in model.named_parameters() if "experts" in n and "lora_A" in n}
    assert set(shapes.values()) == {2 * 4}


def test_initialisations(packed: PreTrainedModel) -> None:
    base = logits(packed)
    model = get_peft_model(packed, lora(packed, init_lora_weights=True))
    assert torch.equal(logits(model), base)  # B is zero
    model.add_adapter("gaussian", lora(packed, init_lora_weights="gaussian"))
    model.set_adapter("gaussian")
    assert torch.equal(logits(model), base)
    a_weight = model.get_submodule(f"base_model.model.{PREFIX}").lora_A["gaussian"].weight
    assert 0.15 < float(a_weight.std()) < 0.25  # PEFT: normal with 1 / r
    model.add_adapter("random", lora(packed, init_lora_weights=False))
    model.set_adapter("random")
    assert not torch.equal(logits(model), base)


def test_load_several_switch_two_active_disable_delete(
    folder: Path, packed: PreTrainedModel, tmp_path: Path
) -> None:
    base = logits(packed)
    first, second = saved(folder, tmp_path / "a", 1), saved(folder, tmp_path / "b", 2, r=3)

    def stock(*adapters: Path) -> torch.Tensor:
        model = fourfold.dequantize(tiny.load(folder, experts_quant_type="nf4"))
        return stock_logits(model, *adapters)

    model = PeftModel.from_pretrained(packed, str(first))
    model.load_adapter(str(second), "second")
    assert_equal(logits(model), stock(first))
    model.set_adapter("second")
    assert_equal(logits(model), stock(second))
    model.base_model.set_adapter(["default", "second"])
    assert_equal(logits(model), stock(first, second))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    model.delete_adapter("second")
    assert_equal(logits(model), stock(first))
    assert not any(".second." in name for name, _ in model.named_parameters())


def test_hotswap(folder: Path, packed: PreTrainedModel, plain: PreTrainedModel, tmp_path: Path) -> None:
    first, second = saved(folder, tmp_path / "a", 1), saved(folder, tmp_path / "b", 2)
    model = PeftModel.from_pretrained(packed, str(first))
    before = logits(model)
    hotswap_adapter(model, str(second), adapter_name="default", torch_device="cpu")
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert_equal(logits(model), stock_logits(plain, second))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_from_pretrained(
    folder: Path,
    packed: PreTrainedModel,
    plain: PreTrainedModel,
    tmp_path: Path,
    low_memory: bool,
    trainable: bool,
) -> None:
    adapter = saved(folder, tmp_path / "a")
    model = PeftModel.from_pretrained(
        packed, str(adapter), is_trainable=trainable, low_cpu_mem_usage=low_memory
    )
    assert not any(p.is_meta for p in model.parameters())
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {trainable}
    assert_equal(logits(model), stock_logits(plain, adapter))


@pytest.mark.parametrize("kind", ["linear", "ties", "cat", "svd"])
def test_weighted_adapters_are_refused(packed: PreTrainedModel, kind: str) -> None:
    """By PEFT, for every parameter: factors of other shapes would have to be summed per expert."""
    model = get_peft_model(packed, lora(packed))
    model.add_adapter("other", lora(packed))
    before = logits(model)
    with pytest.raises(ValueError, match="does not support targeting"):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind)
    assert "sum" not in model.peft_config
    assert torch.equal(logits(model), before)


def test_one_adapter_per_row_is_refused(packed: PreTrainedModel) -> None:
    model = get_peft_model(packed, lora(packed)).eval()
    with pytest.raises(ValueError, match="mixed adapter batches"), torch.no_grad():
        model(tiny.IDS, adapter_names=["default", "__base__"])


def test_merging_works_after_dequantizing(
    folder: Path, packed: PreTrainedModel, plain: PreTrainedModel, tmp_path: Path
) -> None:
    adapter = saved(folder, tmp_path / "a")
    ours = PeftModel.from_pretrained(packed, str(adapter))
    expected = logits(ours)
    for way in ("merge_and_unload", "merge_adapter"):
        with pytest.raises(AdapterError, match="dequantize"):
            getattr(ours, way)()
    with pytest.raises(AdapterError, match="nothing is ever merged"):
        ours.unmerge_adapter()
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert float((logits(merged) - expected).norm() / expected.norm()) < 1e-6
    base = ours.unload()
    assert not any("lora_" in name for name, _ in base.named_parameters())


# transformers' own mixin


def test_transformers_mixin_adds_switches_and_deletes(
    folder: Path, packed: PreTrainedModel, plain: PreTrainedModel, tmp_path: Path
) -> None:
    needs.transformers_mixin()
    base = logits(packed)
    first, second = saved(folder, tmp_path / "a", 1), saved(folder, tmp_path / "b", 2)
    packed.load_adapter(str(first), adapter_name="first")
    packed.load_adapter(str(second), adapter_name="second")
    packed.set_adapter("first")
    assert packed.active_adapters() == ["first"]
    one = logits(packed)
    packed.set_adapter(["first", "second"])
    both = logits(packed)
    packed.disable_adapters()
    assert torch.equal(logits(packed), base)
    packed.enable_adapters()
    assert torch.equal(logits(packed), both)
    packed.delete_adapter("second")
    packed.set_adapter("first")
    assert torch.equal(logits(packed), one)
    assert_equal(one, stock_logits(plain, first))


def test_transformers_mixin_trains_and_saves_stock_adapters(
    packed: PreTrainedModel, plain: PreTrainedModel, tmp_path: Path
) -> None:
    needs.transformers_mixin()
    torch.manual_seed(4)
    packed.add_adapter(lora(packed), adapter_name="new")
    packed.train()
    packed(tiny.IDS, labels=tiny.IDS).loss.backward()
    factors = {n: p for n, p in packed.named_parameters() if "lora_" in n}
    assert len(factors) == expected_factors(packed)
    assert all(p.grad is not None and p.grad.any() for p in factors.values())
    ours = logits(packed)
    packed.save_pretrained(tmp_path / "out")
    assert_equal(ours, stock_logits(plain, tmp_path / "out"))


# What cannot be right


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.1},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        *(
            {"init_lora_weights": init}
            for init in ("pissa", "pissa_niter_4", "olora", "eva", "corda", "lora_ga")
        ),
        {"init_lora_weights": "orthogonal", "r": 4},
        {"init_lora_weights": "loftq"},
    ],
    ids=str,
)
def test_settings_without_a_right_meaning_are_refused(
    packed: PreTrainedModel, changes: dict[str, Any]
) -> None:
    with pytest.raises(
        (AdapterError, ValueError), match=r"does not work with|init_lora_weights|loftq|use_qalora"
    ):
        get_peft_model(packed, lora(packed, target_modules=None, **({"init_lora_weights": True} | changes)))
    assert not any("lora_" in name for name, _ in packed.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        "LoHaConfig",
        "LoKrConfig",
        "IA3Config",
        "VeraConfig",
        "OFTConfig",
        "BOFTConfig",
        "HRAConfig",
        "FourierFTConfig",
    ],
)
def test_other_methods_do_not_reach_experts(packed: PreTrainedModel, config: str) -> None:
    """They take no target_parameters, and no module of a packed experts block."""
    cls = getattr(peft, config)
    with pytest.raises(TypeError, match="target_parameters"):
        cls(target_parameters=fourfold.expert_targets(packed))
    extra = {"feedforward_modules": []} if config == "IA3Config" else {}
    with pytest.raises((TypeError, ValueError), match=r"supported|No layers types compatible"):
        get_peft_model(packed, cls(target_modules=["experts"], **extra))


def test_adalora_is_refused(packed: PreTrainedModel) -> None:
    """It takes target_parameters from `LoraConfig` and has no layer for them."""
    config = peft.AdaLoraConfig(
        total_step=10, target_modules=["q_proj"], target_parameters=fourfold.expert_targets(packed)
    )
    with pytest.raises(TypeError, match="parameter_name"):
        get_peft_model(packed, config)


def test_prepare_model_for_kbit_training_does_no_harm(packed: PreTrainedModel) -> None:
    before = logits(packed)
    bytes_before = {n: p.clone() for n, p in packed.named_parameters() if not p.is_floating_point()}
    assert bytes_before
    packed = peft.prepare_model_for_kbit_training(packed)
    assert torch.equal(logits(packed), before)
    after = dict(packed.named_parameters())
    assert all(after[n].dtype == p.dtype and torch.equal(after[n], p) for n, p in bytes_before.items())
    fourfold.verify(packed)
    torch.manual_seed(1)
    model = get_peft_model(packed, lora(packed))
    model.train()
    model(tiny.IDS, labels=tiny.IDS).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    assert len(found) == expected_factors(packed)
    assert all(gradient is not None and gradient.any() for gradient in found.values())


def test_verify_counts_weights_where_peft_counts_stored_elements(packed: PreTrainedModel) -> None:
    report = fourfold.verify(packed)
    experts = sum(row.logical_params for row in report.rows if row.role == "experts")
    assert experts == 2 * 4 * 3 * 64 * 96
    model = get_peft_model(packed, lora(packed))
    trainable, total = model.get_nb_trainable_parameters()
    counted = fourfold.verify(model)
    assert sum(r.logical_params for r in counted.rows if r.role == "adapters") == trainable
    assert counted.logical_params > total


def test_state_dict_of_an_adapter_holds_nothing_of_the_base(packed: PreTrainedModel) -> None:
    model = get_peft_model(packed, lora(packed))
    state = get_peft_model_state_dict(model)
    assert len(state) == expected_factors(packed)
    assert all("lora_" in key and tensor.is_floating_point() for key, tensor in state.items())
