"""`verify` and `inspect`: what is counted, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fourfold
import tiny
from fourfold.errors import CheckpointError, UnquantizedExpertsError
from fourfold.loading.skeleton import build_skeleton
from fourfold.planning.inspect import inspect_model
from fourfold.planning.report import make_report

EXPERT_PARAMS = 2 * 4 * 3 * 64 * 96


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save(tiny.mixtral(), tmp_path)
    return tmp_path


def load(folder: Path, **settings):
    config = fourfold.MoeBitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_four_bit_that_left_experts_in_high_precision_is_refused_by_name(folder: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(UnquantizedExpertsError, match=r"layers\.1\.mlp.experts.down_proj") as raised:
        fourfold.verify(stock)
    assert raised.value.tensors == [
        f"model.layers.{i}.mlp.experts.{n}" for i in range(2) for n in ("gate_up_proj", "down_proj")
    ]
    assert raised.value.exit_status == 1


def test_left_on_request_is_reported_not_refused(folder: Path) -> None:
    report = fourfold.verify(load(folder, load_in_4bit=True, experts_quant_type="none"))
    assert report.left_on_request == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_left_on_request_is_remembered_by_a_plain_checkpoint(folder: Path, tmp_path: Path) -> None:
    load(folder, load_in_4bit=True, experts_quant_type="none").save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert fourfold.verify(again).left_on_request == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True},
        {"load_in_8bit": True},
    ],
)
def test_logical_parameters_and_bytes(folder: Path, settings) -> None:
    model = load(folder, **settings)
    report = fourfold.verify(model)
    assert report.logical_params == sum(p.numel() for p in tiny.build(tiny.mixtral()).parameters())
    experts = [row for row in report.rows if row.role == "experts"]
    assert sum(row.logical_params for row in experts) == EXPERT_PARAMS
    stored = sum(t.numel() * t.element_size() for n, t in model.named_parameters() if "experts" in n)
    assert sum(row.bytes for row in experts) == stored
    assert {row.role for row in report.rows} == {
        "experts",
        "linears",
        "embeddings",
        "head",
        "router",
        "norms",
    }
    json.dumps(report.to_dict())
    header, *lines = str(report).split("\n")[: len(report.rows) + 2]
    numbers = [[int(word.replace(",", "")) for word in line.split()[-3:]] for line in lines]
    assert [line.split()[0] for line in lines] == [row.role for row in report.rows] + ["total"]
    assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == numbers[-1]
    assert len(header) == len(lines[0])


def test_bytes_of_four_bit_linears_are_those_stored(folder: Path) -> None:
    model = load(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    (row,) = (row for row in fourfold.verify(model).rows if row.role == "linears")
    stored = 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors = (module.weight, state.absmax, state.state2.absmax, state.offset)
            stored += sum(t.numel() * t.element_size() for t in tensors)
    assert row.bytes == stored


def test_a_skeleton_reports_what_the_loaded_model_does(folder: Path) -> None:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    skeleton = build_skeleton(folder, fourfold.MoeBitsAndBytesConfig(**settings))
    assert all(p.is_meta for p in skeleton.parameters())
    loaded = load(folder, **settings)
    assert make_report(skeleton).to_dict() == make_report(loaded).to_dict()


def test_adapters_are_a_role_of_their_own(folder: Path) -> None:
    model = load(folder, experts_quant_type="nf4")
    plain = make_report(model)
    targets = fourfold.expert_targets(model)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets))
    report = fourfold.verify(wrapped)
    adapters = [row for row in report.rows if row.role == "adapters"]
    assert sum(r.logical_params for r in adapters) == sum(
        p.numel() for p in wrapped.parameters() if p.requires_grad
    )
    rest = [row for row in report.rows if row.role != "adapters"]
    assert [(r.role, r.bytes) for r in rest] == [(r.role, r.bytes) for r in plain.rows]
    assert [e.name for e in report.experts] == [e.name for e in plain.experts]


def test_settings_that_concern_linears_only_are_said(folder: Path) -> None:
    report = fourfold.verify(load(folder, load_in_8bit=True, llm_int8_threshold=5.0))
    assert report.linears_only_settings == ["llm_int8_threshold"]


@pytest.mark.parametrize("bare", [False, True])
def test_inspect_needs_the_configuration_only(folder: Path, tmp_path: Path, bare: bool) -> None:
    (folder / "model.safetensors").unlink()
    found = inspect_model(folder / "config.json" if bare else folder)
    assert found.architecture == "MixtralForCausalLM"
    assert found.expert_params == EXPERT_PARAMS
    assert found.total_params == sum(p.numel() for p in tiny.build(tiny.mixtral()).parameters())
    (group,) = found.groups
    assert group.pattern == "model.layers.N.mlp.experts"
    assert group.count == 2
    assert group.can_be_packed
    assert group.shapes == {"gate_up_proj": [4, 192, 64], "down_proj": [4, 64, 96]}
    assert group.bytes["bf16"] == 2 * EXPERT_PARAMS
    # 96 columns are padded to 128 in down_proj
    assert group.bytes["nf4"] == 2 * 4 * (192 * 64 + 64 * 128) * 4.5 / 8
    assert found.targets == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_inspect_of_a_packed_checkpoint_counts_weights(folder: Path, tmp_path: Path) -> None:
    load(folder, load_in_4bit=True, bnb_4bit_use_double_quant=True).save_pretrained(tmp_path / "packed")
    found = inspect_model(tmp_path / "packed")
    assert found.expert_params == EXPERT_PARAMS
    assert found.total_params == sum(p.numel() for p in tiny.build(tiny.mixtral()).parameters())


@pytest.mark.parametrize(
    "make", [lambda p: p / "nowhere", lambda p: p.mkdir() or p], ids=["missing", "empty"]
)
def test_no_model_there_is_one_clear_error(tmp_path: Path, make) -> None:
    with pytest.raises(CheckpointError, match=r"model folder|no config\.json"):
        inspect_model(make(tmp_path / "x"))


def test_numbers_of_a_large_model_from_its_configuration(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_model(tmp_path)
    assert 30.4e9 < found.total_params < 30.6e9
    assert found.expert_params == 48 * 128 * 3 * 2048 * 768
    assert found.groups[0].bytes["nf4_double_quant"] * 8 / found.expert_params < 4.13
    assert torch.get_default_dtype() == torch.float32
