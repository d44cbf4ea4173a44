"""LoRA on packed experts: stock keys, shapes and numbers, both ways."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from fourfold.adapters.peft_lora import add_lora, check_targets, load_adapter
from fourfold.errors import AdapterError
from tiny import IDS, logits


@pytest.fixture(params=tiny.KINDS)
def pair(request, tmp_path: Path):
    """A packed model, and stock's on the same numbers in high precision."""
    folder = tmp_path / "model"
    tiny.save(tiny.KINDS[request.param](), folder)

    def load():
        config = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

    return load, lambda: fourfold.dequantize(load())


def lora(model, **changes) -> LoraConfig:
    arguments = {
        "r": 5,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": fourfold.expert_targets(model),
        "init_lora_weights": False,
    }
    return LoraConfig(**(arguments | changes))


def gradients(model, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def test_saved_adapter_is_what_stock_saves(pair, tmp_path: Path) -> None:
    load_packed, load_plain = pair
    models = {"ours": load_packed(), "stock": load_plain()}
    for name, model in models.items():
        torch.manual_seed(1)
        get_peft_model(model, lora(model)).save_pretrained(tmp_path / name)
    ours, stock = (load_file(tmp_path / name / "adapter_model.safetensors") for name in models)
    assert list(ours) == list(stock)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in stock.items()
    }
    assert all(torch.equal(ours[k], stock[k]) for k in ours)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in models]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_ours_loads_in_stock_and_stocks_in_ours(pair, tmp_path: Path) -> None:
    load_packed, load_plain = pair
    ours, stock = load_packed(), load_plain()
    get_peft_model(ours, lora(ours)).save_pretrained(tmp_path / "ours")
    torch.manual_seed(7)
    get_peft_model(stock, lora(stock)).save_pretrained(tmp_path / "stock")
    for name in ("ours", "stock"):
        here = PeftModel.from_pretrained(load_packed(), str(tmp_path / name))
        there = PeftModel.from_pretrained(load_plain(), str(tmp_path / name))
        torch.testing.assert_close(logits(here), logits(there), rtol=1e-5, atol=1e-5)
        with here.disable_adapter():
            base = logits(here)
        assert (logits(here) - base).norm() > 0.05 * base.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_factor_gets_stocks_gradient(pair, checkpointing: bool) -> None:
    load_packed, load_plain = pair
    found = {}
    for name, load in (("ours", load_packed), ("stock", load_plain)):
        model = load()
        torch.manual_seed(1)
        found[name] = gradients(get_peft_model(model, lora(model)), checkpointing)
    assert found["ours"].keys() == found["stock"].keys()
    assert any("experts" in name for name in found["ours"])
    for name, wanted in found["stock"].items():
        ours = found["ours"][name]
        assert ours is not None, name
        assert wanted.norm() > 0, name
        assert (ours - wanted).norm() <= 1e-5 * wanted.norm(), name


def packed_config() -> fourfold.MoeBitsAndBytesConfig:
    return fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4")


@pytest.fixture
def packed(tmp_path: Path):
    tiny.save(tiny.mixtral(), tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packed_config())


def test_two_adapters_switch_and_add(packed, tmp_path: Path) -> None:
    model = get_peft_model(packed, lora(packed))
    first = logits(model)
    torch.manual_seed(9)
    model.add_adapter("second", lora(packed, r=3, lora_alpha=5, use_rslora=True))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.save_pretrained(tmp_path / "adapters")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packed_config())
    stock = PeftModel.from_pretrained(fourfold.dequantize(plain), tmp_path / "adapters")
    stock.load_adapter(tmp_path / "adapters" / "second", "second")
    stock.base_model.set_adapter(["default", "second"])
    assert torch.allclose(both, logits(stock), atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), base)


def test_one_projection_alone(packed) -> None:
    model = get_peft_model(
        packed, lora(packed, target_parameters=["mlp.experts.down_proj"], target_modules=None)
    )
    names = list(gradients(model))
    assert len(names) == 2 * 2
    assert all(gradient is not None for gradient in gradients(model).values())


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merging_into_packed_weights_is_refused_and_leaves_the_model_whole(packed, how: str) -> None:
    model = get_peft_model(packed, lora(packed))
    before = logits(model)
    with pytest.raises(AdapterError, match="dequantize"):
        getattr(model, how)()
    assert not any(getattr(m, "merged", False) for m in model.modules())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "orthogonal", "r": 4}, "init_lora_weights='orthogonal'"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"exclude_modules": ["mlp.experts"]}, "exclude_modules"),
        ({"exclude_modules": r".*layers\.0\..*"}, "exclude_modules"),
    ],
)
def test_what_peft_would_ignore_on_experts_is_refused(packed, setting, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        get_peft_model(packed, lora(packed, target_modules=["q_proj"], **setting))


def test_a_second_adapter_is_checked_as_the_first(packed) -> None:
    model = get_peft_model(packed, lora(packed))
    with pytest.raises(AdapterError, match="layers_to_transform"):
        model.add_adapter("second", lora(packed, layers_to_transform=[0]))


def test_excluding_other_modules_is_left_to_peft(packed) -> None:
    model = get_peft_model(packed, lora(packed, exclude_modules=r".*layers\.0\..*q_proj"))
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert not any("layers.0.self_attn.q_proj" in n for n in names)
    assert any("layers.0.mlp.experts" in n for n in names)


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_has_no_meaning_on_experts_is_refused(packed, setting) -> None:
    with pytest.raises(ValueError, match="does not work with"):
        get_peft_model(packed, lora(packed, target_modules=None, init_lora_weights=True, **setting))


def test_no_factor_is_as_wide_as_packed_bytes(packed) -> None:
    """What stock PEFT silently builds on a packed parameter: factors of half the width."""
    model = get_peft_model(packed, lora(packed))
    shapes = {
        n.split("mlp.")[1]: tuple(p.shape)
        for n, p in model.named_parameters()
        if "layers.0.mlp" in n and "lora" in n
    }
    assert shapes == {
        "experts.base_layer.lora_A.default.weight": (4 * 5, 64),
        "experts.base_layer.lora_B.default.weight": (2 * 96, 4 * 5),
        "experts.lora_A.default.weight": (4 * 5, 96),
        "experts.lora_B.default.weight": (64, 4 * 5),
    }


def test_other_models_are_left_to_stock(tmp_path: Path) -> None:
    """The one patch passes on everything that is not packed."""
    from peft.tuners.lora.layer import ParamWrapper as Stock

    model = tiny.build(tiny.mixtral())
    wrapped = get_peft_model(model, lora(model))
    assert type(wrapped.base_model.model.model.layers[0].mlp.experts) is Stock


@pytest.mark.parametrize(
    ("modules", "parameters", "message"),
    [
        (["q_prj"], None, r"'q_prj' matches no module; nearest are q_proj"),
        (
            ["q_proj"],
            ["mlp.experts.gate_proj"],
            r"matches no parameter; nearest are mlp\.experts\.(gate_)?up",
        ),
        (r".*self_atn.*", None, "regular expression"),
    ],
)
def test_targets_that_match_nothing_are_named(packed, modules, parameters, message: str) -> None:
    message = message.replace("(gate_)?up", "gate_up_proj")
    with pytest.raises(AdapterError, match=message):
        check_targets(packed, modules, parameters)


def test_expert_targets_on_a_dense_model_are_refused() -> None:
    with pytest.raises(AdapterError, match="dense"):
        check_targets(tiny.build(tiny.dense()), ["q_proj"], ["mlp.experts.gate_up_proj"])


def test_helpers_add_save_and_load(packed, tmp_path: Path) -> None:
    arguments = {
        "r": 4,
        "alpha": 8,
        "target_modules": ["q_proj"],
        "target_parameters": fourfold.expert_targets(packed),
    }
    fourfold.prepare(packed)
    model = add_lora(packed, init_lora_weights=False, **arguments)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(model.unload(), tmp_path / "adapter")
    assert torch.equal(logits(again), before)
    with pytest.raises(AdapterError, match="no adapter"):
        load_adapter(packed, tmp_path / "nothing")
    with pytest.raises(AdapterError, match="dropout"):
        add_lora(packed, dropout=0.1, **arguments)
    with pytest.raises(AdapterError, match="train nothing"):
        add_lora(packed, r=4, alpha=8, target_modules=None, target_parameters=None)


@pytest.mark.parametrize("change", ["missing", "added", "truncated", "pickled"])
def test_an_adapter_that_does_not_fit_is_refused(packed, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "adapter"
    get_peft_model(packed, lora(packed)).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("experts.lora_B.weight"))
    if change == "missing":
        del tensors[name]
    elif change == "added":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    save_file(tensors, file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "pickled":
        torch.save(tensors, folder / "adapter_model.bin")
        file.unlink()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packed_config())
    words = {"missing": "lacks", "added": "layers.7", "truncated": "truncated", "pickled": "safetensors"}
    with pytest.raises(AdapterError, match=words[change]):
        load_adapter(plain, folder)


def test_a_different_adapter_per_row_and_unmerging_are_refused(packed) -> None:
    model = get_peft_model(packed, lora(packed)).eval()
    with pytest.raises(ValueError, match="mixed adapter batches"), torch.no_grad():
        model(IDS, adapter_names=["default", "__base__"])
    with pytest.raises(AdapterError, match="nothing is ever merged"):
        model.unmerge_adapter()


@pytest.mark.parametrize(("pattern", "warned"), [("experts.gate_up_proj", False), ("no_such_name", True)])
def test_a_pattern_for_a_parameter_is_not_said_to_be_ignored(
    pattern: str, warned: bool, tmp_path: Path
) -> None:
    """Neither when adapters are added nor when they are loaded."""

    def said(action) -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(action())
        return any("rank_pattern" in str(warning.message) for warning in caught)

    def model():
        return fourfold.prepare(tiny.build(tiny.qwen3_moe()))

    results: list[PeftModel] = []
    targets = {"target_modules": ["q_proj"], "target_parameters": fourfold.expert_targets(model())}
    assert said(lambda: add_lora(model(), r=4, alpha=8, rank_pattern={pattern: 2}, **targets)) == warned
    results[0].save_pretrained(tmp_path)
    assert said(lambda: load_adapter(model(), tmp_path)) == warned
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.default.weight"
    for adapted in results:
        assert adapted.get_parameter(key).shape[0] == 6 * (4 if warned else 2)


def test_every_factor_has_a_gradient_whatever_experts_are_hit(pair) -> None:
    """One token of the text: so DDP need not search for what took no part (`ddp_find_unused_parameters`)."""
    model = pair[0]()
    model = get_peft_model(model, lora(model)).train()
    model(IDS[:1, :1]).logits.float().pow(2).sum().backward()
    factors = {n: p for n, p in model.named_parameters() if ".experts." in n and "lora_B" in n}
    assert factors
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    experts = tiny.experts_of(model).fourfold_layout.num_experts
    for name, p in factors.items():
        hit = p.grad.view(p.shape[0], -1, experts).abs().sum(dim=(0, 1)) > 0
        assert 0 < int(hit.sum()) < experts, name


def test_factors_that_an_engine_took_away_are_not_saved_empty(packed, tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 leaves parameters without numbers, and `ds_id` on them."""
    model = get_peft_model(packed, lora(packed))
    parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
    parameter.ds_id = 1
    model.save_pretrained(tmp_path / "there")  # (it is gathered)
    state = {n: p.detach().clone() for n, p in model.state_dict().items() if "lora_" in n}
    parameter.data = parameter.data.new_empty(0)
    with pytest.raises(AdapterError, match=r"lora_B.*would be saved empty"):
        model.save_pretrained(tmp_path / "gone")
    model.save_pretrained(tmp_path / "given", state_dict=state)
    assert (tmp_path / "given" / "adapter_model.safetensors").is_file()
