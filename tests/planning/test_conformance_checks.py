"""That the checks of the conformance matrix see what they are for: each is given something wrong."""

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
)

import fourfold
import tiny
from fourfold.planning.conformance import checks, modules, tensors, tiny_models
from fourfold.planning.conformance.checks import check_model_type
from fourfold.planning.conformance.row import FORMATS


@pytest.fixture(params=FORMATS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.gpt_oss(), dtype=torch.float32).eval()
    tiny_models.randomise_vectors_(model)
    tiny_models.randomise_experts_(model)
    model.save_pretrained(tmp_path)
    config = fourfold.MoeBitsAndBytesConfig(**FORMATS[request.param])
    return type(model).from_pretrained(tmp_path, quantization_config=config).eval(), model, request.param


def _flip_bytes(module: nn.Module) -> None:
    module.weight.data = module.weight.data.flip(0)


CHANGES = {
    "router": lambda m: m.model.layers[0].mlp.router.weight.data.normal_(),
    "bias of the router": lambda m: m.model.layers[0].mlp.router.bias.data.zero_(),
    "bias of experts": lambda m: m.model.layers[0].mlp.experts.down_proj_bias.data.zero_(),
    "bias of a Linear": lambda m: m.model.layers[1].self_attn.q_proj.bias.data.zero_(),
    "norm": lambda m: m.model.norm.weight.data.fill_(1),
    "embedding": lambda m: m.model.embed_tokens.weight.data.normal_(),
    "head": lambda m: m.lm_head.weight.data.roll(1, 0).clone() is m.lm_head.weight.data.normal_(),
    "dtype": lambda m: m.model.norm.to(torch.bfloat16),
    "bytes of a Linear": lambda m: _flip_bytes(m.model.layers[0].self_attn.k_proj),
    "bytes of experts": lambda m: m.model.layers[1].mlp.experts.gate_up_proj.data.random_(0, 100),
    "a tensor lost": lambda m: m.model.layers[0].self_attn.o_proj.register_parameter("bias", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_tensor_that_is_not_the_float_models_is_seen(loaded, change) -> None:
    packed, model, fmt = loaded
    tensors.check_packed(packed, model, fmt)
    change(packed)
    with pytest.raises(ValueError, match=r"values|original|lost"):
        tensors.check_packed(packed, model, fmt)


def test_weights_lie_where_torch_puts_them_before_outputs_are_compared() -> None:
    linear = nn.Linear(64, 64)
    before = linear.weight.detach().clone()
    linear.weight.data = torch.empty(64 * 64 + 1)[1:].view(64, 64).copy_(before)  # as in a mapped file
    assert linear.weight.data_ptr() % 64
    modules.align_(linear)
    assert linear.weight.data_ptr() % 64 == 0
    assert torch.equal(linear.weight, before)


def test_a_stack_in_high_precision_needs_a_reason(loaded) -> None:
    packed, model, fmt = loaded

    class Unfound(nn.Module):
        """Experts that `find_experts` does not see."""

        def __init__(self, *shape: int, name: str = "w") -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape)))

    for reasonable in (Unfound(1, 9, 8), Unfound(64, 1, 7), Unfound(2, 9, 8, name="position_embedding")):
        packed.extra = reasonable
        tensors.check_packed(packed, model, fmt)
    packed.extra = Unfound(4, 9, 8)
    with pytest.raises(ValueError, match=r"not packed: extra.w \(4, 9, 8\)"):
        tensors.check_packed(packed, model, fmt)


def test_norms_and_biases_are_given_values_of_their_own() -> None:
    for model_type, name in (("muse_spark_text", "post_expert_norm"), ("gpt_oss", "q_proj.bias")):
        config = tiny_models.tiny_config(model_type)
        model = tiny_models.build(config, tiny_models.model_classes(type(config))[0])
        tiny_models.randomise_vectors_(model)
        found = [p for n, p in model.named_parameters() if name in n]
        assert found
        assert all(p.unique().numel() > 1 for p in found)


def test_dtypes_are_compared() -> None:
    ones = nn.Linear(2, 2).requires_grad_(False)
    tensors.check_same_state(ones, ones)
    ones.weight.fill_(1)
    ones.bias.fill_(1)
    other = nn.Linear(2, 2)
    other.load_state_dict(ones.state_dict())
    with pytest.raises(ValueError, match="dtypes: weight, bias"):
        tensors.check_same_state(ones, other.bfloat16())


def test_bf16_is_loaded_and_what_it_gives_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    row = check_model_type("mixtral")
    assert row is not None
    assert row.cells["bf16"] == "ok"
    run_on = tensors.run_on

    def in_fp32(model, inputs):
        output = run_on(model, inputs)
        return output.float() if hasattr(model, "hf_quantizer") else output

    monkeypatch.setattr(tensors, "run_on", in_fp32)
    row = check_model_type("mixtral")
    assert row is not None
    assert row.cells["bf16"] == "FAILED"


def test_experts_that_the_configuration_speaks_of_and_nobody_finds_are_a_failed_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "find_experts", lambda model: iter(()))
    row = check_model_type("mixtral")
    assert row is not None
    assert row.kind == "not found"
    assert row.problems == ["built: its configuration speaks of [4] experts, and none were found"]


def test_a_type_without_a_class_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "model_classes", lambda config_class: [])
    row = check_model_type("llama")
    assert row is not None
    assert row.problems == ["built: LookupError: no class takes this configuration"]


def test_every_class_is_asked_for_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = tiny_models.model_classes
    asked = []

    def with_another(config_class):
        return [torch.nn.Linear, *classes(config_class)] if asked else classes(config_class)

    def build(config, model_class, device="cpu"):
        asked.append(model_class)
        if len(asked) == 1:
            raise RuntimeError("the cut configuration cannot be built")
        return nn.Linear(1, 1) if model_class is nn.Linear else tiny_models.build(config, model_class, device)

    monkeypatch.setattr(checks, "build", build)
    monkeypatch.setattr(checks, "model_classes", with_another)
    row = check_model_type("mixtral")
    assert row is not None
    assert row.kind == "not built"


def test_how_many_experts_a_token_gets_is_cut_as_a_size() -> None:
    settings = {"num_experts_per_token": 100, "num_experts_per_tok": 100, "pad_token_id": 100}
    cut = tiny_models.shrink(settings)
    assert cut["num_experts_per_token"] == cut["num_experts_per_tok"] == 2
    assert cut["pad_token_id"] >= tiny_models.VOCABULARY // 2


def test_a_configuration_that_is_left_out_inside_another_is_filled_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Outer(PretrainedConfig):
        """As diffusion_gemma's in transformers 5.17: without its vision tower's it cannot be built."""

        model_type = "outer"
        sub_configs: ClassVar = {"vision_config": MixtralConfig}

        def __init__(self, vision_config: dict | None = None, **kwargs: object) -> None:
            self.vision_config = None if vision_config is None else MixtralConfig(**vision_config)
            super().__init__(**kwargs)

    monkeypatch.setattr(tiny_models, "CONFIG_MAPPING", {"outer": Outer})
    config = tiny_models.tiny_config("outer")
    assert isinstance(config.vision_config, MixtralConfig)
    assert config.vision_config.num_hidden_layers == tiny_models.LAYERS


@pytest.mark.parametrize(
    ("message", "cell"), [("out of paper", "FAILED"), ("You must specify pixel_values", "-")]
)
def test_only_a_want_of_inputs_keeps_a_model_from_being_run(
    monkeypatch: pytest.MonkeyPatch, message: str, cell: str
) -> None:
    def broken(model, inputs):
        raise RuntimeError(message)

    monkeypatch.setattr(modules, "run_on", broken)
    row = check_model_type("mixtral")
    assert row is not None
    assert row.cells["forward"] == cell


@pytest.fixture
def first_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss with its first parameter kept in fp32: config.json then says fp32 of a model in bf16."""
    monkeypatch.setattr(GptOssForCausalLM, "_keep_in_fp32_modules_strict", {"embed_tokens"}, raising=False)


def test_dtypes_that_change_without_quantization_too_are_said(first_in_fp32: None) -> None:
    row = check_model_type("gpt_oss")
    assert row is not None
    assert row.problems == []
    assert row.cells["bf16"] == "as stock, not run"  # (its Linears are not fed in their own dtype)
    assert row.cells["reload"] == "ok"


def _experts_tensor(suffix: str, dtype: torch.dtype):
    def change(model: nn.Module) -> None:
        experts = model.model.layers[0].mlp.experts
        changed = experts._parameters[f"down_proj{suffix}"].to(dtype)
        experts._parameters[f"down_proj{suffix}"] = nn.Parameter(changed, requires_grad=False)

    return change


RELOADED = {
    "not stock's dtype": lambda m: m.model.norm.to(torch.float16),
    "a value": lambda m: m.model.norm.weight.data.add_(1),
    "a value in another dtype": lambda m: m.model.layers[0].self_attn.q_proj.bias.data.add_(1),
    "a bias of experts": lambda m: m.model.layers[0].mlp.experts.down_proj_bias.data.add_(1),
    "bytes of a Linear": lambda m: m.model.layers[0].self_attn.q_proj.weight.data.random_(0, 9),
    "dtype of packed experts": _experts_tensor("", torch.float32),
    "dtype of their scales": _experts_tensor("_absmax", torch.float32),
    "dtype of the scales of those": _experts_tensor("_absmax_scale", torch.float32),
}


@pytest.mark.parametrize("change", RELOADED.values(), ids=RELOADED)
def test_nothing_but_stocks_change_of_dtype_is_let_through(
    first_in_fp32: None, tmp_path: Path, change
) -> None:
    made = GptOssForCausalLM(tiny.gpt_oss())
    tiny_models.randomise_vectors_(made)
    made.save_pretrained(tmp_path / "float")
    load = GptOssForCausalLM.from_pretrained
    plain = load(tmp_path / "float", dtype=torch.bfloat16)
    config = fourfold.MoeBitsAndBytesConfig(**FORMATS["NF4"])
    packed = load(tmp_path / "float", quantization_config=config, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert not tensors.check_reloaded(packed, again, plain, tmp_path / "plain")
    change(again)
    with pytest.raises(ValueError, match="other values or dtypes"):
        tensors.check_reloaded(packed, again, plain, tmp_path / "plain")


def test_a_dtype_that_stock_keeps_has_to_be_kept(tmp_path: Path) -> None:
    plain = MixtralForCausalLM(tiny.mixtral()).bfloat16()
    packed, again = copy.deepcopy(plain), copy.deepcopy(plain)
    assert tensors.check_reloaded(packed, again, plain, tmp_path)
    assert not list(tmp_path.iterdir())
    again.model.norm.float()
    with pytest.raises(ValueError, match=r"other values or dtypes: model\.norm\.weight"):
        tensors.check_reloaded(packed, again, plain, tmp_path)


def test_tensors_are_run_from_where_torch_would_put_them() -> None:
    layer = nn.Linear(5, 3)
    room = torch.zeros(64)
    room[1:16] = layer.weight.data.flatten()
    layer.weight.data = room[1:16].view(3, 5)
    assert layer.weight.data_ptr() % 64
    before = layer.weight.detach().clone()
    modules.align_(layer)
    assert not layer.weight.data_ptr() % 64
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("who", ["the unquantized model", "the packed model"])
def test_a_run_in_bf16_that_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    run_on = tensors.run_on

    def broken(model, inputs):
        if (getattr(model, "hf_quantizer", None) is None) == (who == "the unquantized model"):
            raise RuntimeError("not in bf16")
        return run_on(model, inputs)

    monkeypatch.setattr(tensors, "run_on", broken)
    row = check_model_type("mixtral")
    assert row is not None
    assert row.cells["bf16"] == ("not run" if who == "the unquantized model" else "FAILED")


def test_a_refusal_that_comes_with_the_weights_only_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "build_skeleton", lambda *_: None)
    row = check_model_type("doge")
    assert row is not None
    assert row.cells["packed"] == "FAILED"
