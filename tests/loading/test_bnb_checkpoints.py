"""Per-expert 4-bit checkpoints of transformers v4 load into packed storage with the bytes they hold."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import foreign_checkpoints
import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.experts import PackedExperts, find_experts
from tiny import load, logits

Config = fourfold.MoeBitsAndBytesConfig
KINDS = {
    "qwen3_moe": lambda: tiny.qwen3_moe(moe_intermediate_size=64),
    "mixtral": lambda: tiny.mixtral(intermediate_size=192),
    "glm4_moe": foreign_checkpoints.glm4_moe,
}
FORMATS = {"nf4": ("nf4", False), "nf4 double": ("nf4", True), "fp4 double": ("fp4", True)}


def settings_of(quant_type: str, double: bool) -> dict[str, object]:
    return {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=FORMATS)
def case(request, kind: str, tmp_path_factory):
    quant_type, double = FORMATS[request.param]
    folder = tmp_path_factory.mktemp(kind)
    made = foreign_checkpoints.bitsandbytes(KINDS[kind](), folder, double=double, quant_type=quant_type)
    return settings_of(quant_type, double), *made


def test_bytes_are_taken_over(case, caplog) -> None:
    """The same as quantizing the bf16 checkpoint that it was made from: Linears, experts and all."""
    settings, stored, plain, _ = case
    model, wanted = load(stored, **settings), load(plain, **settings)
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert all(isinstance(f.module, PackedExperts) for f in find_experts(model))
    assert torch.equal(logits(model), logits(wanted))
    assert "UNEXPECTED" not in caplog.text
    assert "MISSING" not in caplog.text
    fourfold.verify(model)


def test_dequantized_it_is_what_bitsandbytes_decodes(case, tmp_path: Path) -> None:
    settings, stored, _, decoded = case
    model = load(stored, experts_quant_type=settings["bnb_4bit_quant_type"], **without_linears(settings))
    fourfold.dequantize(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert decoded
    for key, matrix in decoded.items():
        assert torch.equal(saved[key], matrix), key


def without_linears(settings) -> dict[str, object]:
    return {"bnb_4bit_use_double_quant": settings["bnb_4bit_use_double_quant"]}


def test_experts_in_high_precision_on_request(case) -> None:
    settings, stored, _, decoded = case
    model = load(stored, experts_quant_type="none", **settings)
    module = next(iter(find_experts(model)))
    w = module.module.down_proj
    assert w.dtype == torch.bfloat16
    keys = [k for k in decoded if re.search(r"experts\.\d+\.(down_proj|w2)", k)]
    first = sorted(keys)[: len(w)]
    assert torch.equal(w, torch.stack([decoded[k] for k in first]))


def test_saved_again_it_is_an_ordinary_packed_checkpoint(case, tmp_path: Path) -> None:
    settings, stored, _, _ = case
    model = load(stored, **settings)
    model.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    base = config.pop("base")
    assert base["name"] == str(stored)
    assert config | {"base": None} == Config(**settings).to_dict() | {"tensor_names": "model"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_hybrids_get_their_experts_quantized(tmp_path: Path) -> None:
    """What stock transformers v5 writes: Linears in 4 bit, experts left in bf16."""
    stored, plain, _ = foreign_checkpoints.bitsandbytes(
        KINDS["qwen3_moe"](), tmp_path, double=True, experts=False
    )
    settings = settings_of("nf4", True)
    ours, wanted = load(stored, **settings).state_dict(), load(plain, **settings).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items())


def test_what_stock_transformers_writes_today_is_such_a_hybrid(tmp_path: Path) -> None:
    tiny.build(KINDS["mixtral"]()).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    plain = transformers.BitsAndBytesConfig(**settings_of("nf4", True))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=plain)
    stock.save_pretrained(tmp_path / "stock")
    settings = settings_of("nf4", True)
    ours, wanted = load(tmp_path / "stock", **settings).state_dict(), load(tmp_path / "plain", **settings)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, ours[name]), name


def test_packed_bytes_under_another_dtype(good: Path, tmp_path: Path) -> None:
    """``bnb_4bit_quant_storage``: the same bytes, called bf16."""

    def change(tensors) -> None:
        for key, tensor in tensors.items():
            if tensor.dtype == torch.uint8 and tensor.ndim == 2:
                tensors[key] = tensor.view(1, -1).view(torch.bfloat16).view(-1, 1)

    stored = damaged(good, tmp_path / "bf16", change)
    assert load_file(stored / "model.safetensors")[E].dtype == torch.bfloat16
    ours, wanted = load(stored, **settings_of("nf4", True)), load(good, **settings_of("nf4", True))
    theirs = wanted.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.state_dict().items() if "experts" in n)
    assert torch.equal(logits(ours), logits(wanted))


# --- what must not load


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return foreign_checkpoints.bitsandbytes(KINDS["qwen3_moe"](), folder, double=True)[0]


E = "model.layers.1.mlp.experts.2.up_proj.weight"
LINEAR = "model.layers.1.self_attn.q_proj.weight"


def damaged(folder: Path, out: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def put(key: str, tensor: torch.Tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


def gone(key: str):
    return lambda tensors: tensors.pop(key)


def packed_json(**values: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


STATE = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [64, 64],
    "nested_blocksize": 256,
}
S = f"{E}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone(f"{E}.absmax"), rf"holds no {E}\.absmax"),
        (gone(f"{E}.nested_absmax"), rf"holds no {E}\.nested_absmax"),
        (gone(f"{E}.quant_map"), rf"holds no {E}\.quant_map"),
        (gone(S), rf"{E} is packed, but the checkpoint holds no {E}\.quant_state"),
        (gone(E), rf"holds no {E}, without which"),
        (put(f"{E}.absmax", torch.zeros(9, dtype=torch.uint8)), rf"{E}\.absmax is U8 \[9\]"),
        (put(f"{E}.nested_absmax", torch.zeros(1).bfloat16()), rf"{E}\.nested_absmax is BF16"),
        (put(E, torch.zeros(12, 1, dtype=torch.uint8)), rf"{E} is U8 \[12, 1\]"),
        (put(f"{E}.quant_map", torch.linspace(-1, 1, 16)), rf"{E}\.quant_map is not the code map"),
        (put(f"{LINEAR}.quant_map", torch.linspace(-1, 1, 16)), rf"{LINEAR}\.quant_map is not the code map"),
        (
            put(f"{LINEAR}.nested_quant_map", torch.linspace(-1, 1, 256)),
            rf"{LINEAR}\.nested_quant_map is not",
        ),
        (put(S, packed_json(**STATE | {"shape": [float("inf"), 1]})), rf"{E}.*is no state of a 4-bit weight"),
        (put(S, torch.tensor([128, 4, 149], dtype=torch.uint8)), rf"{E}.*is no state of a 4-bit weight"),
        (put(S, packed_json(quant_type="nf4")), rf"{E}.*is no state of a 4-bit weight"),
        (put(S, packed_json(**STATE)), rf"{E}.*nested_offset"),
        (put(S, packed_json(**STATE | {"nested_blocksize": 128, "nested_offset": 0.0})), "groups of 128"),
        (put(S, packed_json(**STATE | {"shape": [32, 128], "nested_offset": 0.0})), r"has shape \(32, 128\)"),
    ],
)
def test_damage_is_found_and_named(good: Path, tmp_path: Path, change, message: str) -> None:
    folder = damaged(good, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, **settings_of("nf4", True))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (settings_of("nf4", False), r"experts are NF4 /64 double-quantized.*use_double_quant=True"),
        (settings_of("fp4", True), r"Pass what is stored.*quant_type='nf4'"),
        ({"load_in_8bit": True}, r"asks for INT8.*experts_quant_type='nf4'"),
        (
            {"load_in_8bit": True, "experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            r"Linears are NF4 /64 double-quantized.*load_in_4bit=True",
        ),
        (
            {"experts_quant_type": "nf4", "experts_blocksize": 32},
            r"experts are NF4 /64.*experts_blocksize=64",
        ),
        ({"experts_quant_type": "int8"}, r"asks for INT8"),
    ],
)
def test_another_format_than_the_stored_one_is_refused(good: Path, asked, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(good, **asked)


def test_blocks_that_straddle_rows_are_refused(tmp_path: Path) -> None:
    config = tiny.qwen3_moe(moe_intermediate_size=96)
    stored, _, decoded = foreign_checkpoints.bitsandbytes(config, tmp_path, double=True)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has rows of 96.*straddle rows"):
        load(stored, **settings_of("nf4", True))
    model = load(stored, experts_quant_type="none", **settings_of("nf4", True))
    w = tiny.experts_of(model).down_proj
    wanted = [decoded[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(len(w))]
    assert torch.equal(w, torch.stack(wanted))


def test_eight_bit_checkpoints_are_refused(good: Path, tmp_path: Path) -> None:
    folder = damaged(good, tmp_path / "eight", put("model.layers.0.self_attn.q_proj.SCB", torch.ones(64)))
    with pytest.raises(ConfigurationError, match="INT8"):
        load(folder, **settings_of("nf4", True))
