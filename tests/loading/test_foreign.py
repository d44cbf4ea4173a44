"""Checkpoints published as MXFP4 or block-FP8 load packed, as if their numbers had been stored in bf16."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import foreign_checkpoints
import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.experts import PackedExperts, find_experts
from tiny import load, logits

Config = fourfold.MoeBitsAndBytesConfig
KINDS = ["gpt_oss", "deepseek_v3", "qwen3_moe"]
SETTINGS = {
    "experts alone": {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "all in 4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "all in 8 bit": {"load_in_8bit": True},
    "Linears alone": {"load_in_4bit": True, "experts_quant_type": "none"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    qwen3 = tiny.qwen3_moe(hidden_size=192, moe_intermediate_size=192, head_dim=48, num_experts=4)
    return {
        "gpt_oss": foreign_checkpoints.mxfp4(tmp_path_factory.mktemp("gpt_oss")),
        "deepseek_v3": foreign_checkpoints.fp8(
            foreign_checkpoints.deepseek_v3(), tmp_path_factory.mktemp("deepseek_v3")
        ),
        "qwen3_moe": foreign_checkpoints.fp8(qwen3, tmp_path_factory.mktemp("qwen3_moe")),
    }


def assert_same_state(one, other) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_packed_as_if_stored_in_bf16(folders, kind: str, settings, caplog) -> None:
    encoded, decoded = folders[kind]
    model = load(encoded, **settings)
    assert_same_state(model, load(decoded, **settings))
    if not settings.get("load_in_8bit"):  # whose CPU code takes no batches
        assert torch.equal(logits(model), logits(load(decoded, **settings)))
    packed = settings.get("experts_quant_type") != "none"
    assert all(isinstance(f.module, PackedExperts) == packed for f in find_experts(model))
    assert "UNEXPECTED" not in caplog.text
    assert "MISSING" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_it_is_an_ordinary_packed_checkpoint(folders, kind: str, tmp_path: Path) -> None:
    model = load(folders[kind][0], **SETTINGS["all in 4 bit"])
    model.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored.pop("base")["name"] == str(folders[kind][0])
    wanted = Config(**SETTINGS["all in 4 bit"]).to_dict() | {"tensor_names": "model"}
    assert stored | {"base": None} == wanted
    assert not any(
        re.search("_blocks|_scales|scale_inv", k)
        for k in load_file(tmp_path / "packed" / "model.safetensors")
    )
    assert_same_state(load(tmp_path / "packed"), model)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_it_has_the_keys_of_the_bf16_model(folders, kind: str, tmp_path: Path) -> None:
    encoded, decoded = folders[kind]
    model = fourfold.dequantize(load(encoded, experts_quant_type="nf4"))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(decoded / "model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_skipped_modules_are_decoded_into_the_models_dtype(folders) -> None:
    for kind, skipped in (("gpt_oss", "layers.0.mlp.experts"), ("deepseek_v3", "layers.1.self_attn.o_proj")):
        encoded, decoded = folders[kind]
        settings = SETTINGS["all in 4 bit"] | {"llm_int8_skip_modules": [f"model.{skipped}"]}
        model = load(encoded, **settings)
        assert_same_state(model, load(decoded, **settings))
        (plain,) = {p.dtype for p in model.get_submodule(f"model.{skipped}").parameters()}
        assert plain == torch.bfloat16


def test_experts_are_decoded_one_by_one(folders, monkeypatch) -> None:
    from fourfold.loading import foreign

    decoded: list[tuple[int, ...]] = []
    for name in ("decode_mxfp4", "decode_fp8"):
        original = getattr(foreign, name)

        def spy(codes, *arguments, original=original):
            out = original(codes, *arguments)
            decoded.append(tuple(out.shape))
            return out

        monkeypatch.setattr(foreign, name, spy)
    load(folders["gpt_oss"][0], experts_quant_type="nf4")
    assert decoded == [*[(1, 64, 96)] * 4, *[(1, 192, 64)] * 4] * 2
    decoded.clear()
    load(folders["qwen3_moe"][0], experts_quant_type="nf4")
    assert decoded.count((192, 192)) >= 2 * 3 * 4
    assert max(map(len, decoded)) == 2


def test_stock_configurations_are_treated_as_before(folders) -> None:
    encoded, _ = folders["qwen3_moe"]
    plain = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match=r"FineGrainedFP8Config.*BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(encoded, quantization_config=plain)


def damaged(folder: Path, out: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


E = "model.layers.1.mlp.experts"
ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("kind", "gone", "message"),
    [
        ("gpt_oss", f"{E}.down_proj_scales", rf"down_proj_blocks is MXFP4.*no {E}\.down_proj_scales"),
        ("gpt_oss", f"{E}.down_proj_blocks", rf"down_proj_scales is MXFP4.*no {E}\.down_proj_blocks"),
        ("deepseek_v3", f"{E}.2.up_proj.weight_scale_inv", rf"{E}\.2\.up_proj\.weight is FP8.*_scale_inv"),
        ("deepseek_v3", f"{ATTENTION}.o_proj.weight_scale_inv", rf"no {ATTENTION}.o_proj.weight_scale_inv"),
        ("deepseek_v3", f"{E}.2.up_proj.weight", r"gate_up_proj.* 3 of 4"),
    ],
)
def test_missing_tensors_are_errors_that_name_the_key(folders, tmp_path, kind, gone, message) -> None:
    folder = damaged(folders[kind][0], tmp_path / "damaged", lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=message):
        load(folder, experts_quant_type="nf4")


def cut(key: str, *index):
    def change(tensors) -> None:
        tensors[key] = tensors[key][index].contiguous()

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt_oss", cut(f"{E}.down_proj_scales", slice(3)), r"\[4, 64, 3, 16\] and its scales \[3, 64, 3\]"),
        (
            "deepseek_v3",
            cut(f"{E}.2.up_proj.weight_scale_inv", slice(1)),
            r"has shape \[1, 2\], where \[2, 2\]",
        ),
        ("deepseek_v3", cut(f"{E}.2.up_proj.weight", slice(160)), r"expert 2 has shape \(160, 192\)"),
    ],
)
def test_wrong_shapes_are_errors_that_name_the_key(folders, tmp_path, kind, change, message) -> None:
    folder = damaged(folders[kind][0], tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, experts_quant_type="nf4")


@pytest.mark.parametrize("suffix", ["_blocks", "_scales"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e8m0fnu, torch.bfloat16])
def test_mxfp4_under_another_dtype_is_refused(
    folders, tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    """An exponent that is called a number would be read by its value."""
    key = f"{E}.down_proj{suffix}"

    def change(tensors) -> None:
        tensors[key] = tensors[key].to(dtype) if dtype.itemsize > 1 else tensors[key].view(dtype)

    folder = damaged(folders["gpt_oss"][0], tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} is (I8|F8_E8M0|BF16), where"):
        load(folder, experts_quant_type="nf4")


@pytest.mark.parametrize("block", [[128], [0, 128], [-128, 128], [128, 128, 1], [1.5, 2], 128, "x", {}])
def test_tiles_that_are_none_are_refused(folders, tmp_path: Path, block: object) -> None:
    folder = damaged(folders["qwen3_moe"][0], tmp_path / "damaged", lambda tensors: None)
    with_settings(folder, weight_block_size=block)
    with pytest.raises(ConfigurationError, match="weight_block_size="):
        load(folder, experts_quant_type="nf4")


@pytest.mark.parametrize(
    ("wrong", "message"), [("rows", r"experts of shape \(32, 96\)"), ("experts", "holds 3 experts")]
)
def test_mxfp4_of_another_model_is_refused(folders, tmp_path, wrong: str, message: str) -> None:
    index = (slice(None), slice(32)) if wrong == "rows" else (slice(3),)

    def change(tensors) -> None:
        for suffix in ("_blocks", "_scales"):
            cut(f"model.layers.1.mlp.experts.down_proj{suffix}", *index)(tensors)

    folder = damaged(folders["gpt_oss"][0], tmp_path / "damaged", change)
    for settings in ({"experts_quant_type": "nf4"}, {"load_in_4bit": True, "experts_quant_type": "none"}):
        with pytest.raises(CheckpointError, match=message):
            load(folder, **settings)


def test_scales_that_are_no_numbers_are_refused(folders, tmp_path) -> None:
    def change(tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 1] = 255

    folder = damaged(folders["gpt_oss"][0], tmp_path / "damaged", change)
    with pytest.raises(
        CheckpointError, match=r"experts\.down_proj: weights of expert\(s\) 2 are NaN or infinite"
    ):
        load(folder, experts_quant_type="nf4")


def with_settings(folder: Path, **settings: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("stored_as", ["bytes", "float8_e8m0fnu"])
def test_scales_may_be_powers_of_two(folders, tmp_path: Path, stored_as: str) -> None:
    """``scale_fmt: ue8m0``; read as plain numbers the bytes would be scales of about 120."""

    def exponents(tensors) -> None:
        for key in [k for k in tensors if k.endswith("_scale_inv")]:
            byte = (tensors[key].log2().round() + 127).to(torch.uint8)
            tensors[key] = byte if stored_as == "bytes" else byte.view(torch.float8_e8m0fnu)

    def powers(tensors) -> None:
        for key in [k for k in tensors if k.endswith("_scale_inv")]:
            tensors[key] = 2.0 ** tensors[key].log2().round()

    encoded = folders["qwen3_moe"][0]
    ours = with_settings(damaged(encoded, tmp_path / "ours", exponents), scale_fmt="ue8m0")
    wanted = damaged(encoded, tmp_path / "wanted", powers)
    assert_same_state(load(ours, experts_quant_type="nf4"), load(wanted, experts_quant_type="nf4"))
    if stored_as == "bytes":
        with pytest.raises(CheckpointError, match=r"weight_scale_inv is U8"):
            load(with_settings(ours, scale_fmt="float"), experts_quant_type="nf4")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_all_of_a_matrix(folders, tmp_path: Path, shape: tuple[int, ...]) -> None:
    def one(tensors) -> None:
        for key in [k for k in tensors if k.endswith("_scale_inv")]:
            tensors[key] = tensors[key].flatten()[0].clone().reshape(shape)

    def spread(tensors) -> None:
        for key in [k for k in tensors if k.endswith("_scale_inv")]:
            tensors[key] = tensors[key].flatten()[0].expand(tensors[key].shape).contiguous()

    encoded = folders["qwen3_moe"][0]
    ours = with_settings(damaged(encoded, tmp_path / "ours", one), weight_block_size=None)
    wanted = damaged(encoded, tmp_path / "wanted", spread)
    assert_same_state(load(ours, experts_quant_type="nf4"), load(wanted, experts_quant_type="nf4"))


def test_experts_of_four_bits_inside_fp8_are_refused(folders, tmp_path) -> None:
    folder = damaged(folders["qwen3_moe"][0], tmp_path / "damaged", lambda tensors: None)
    with_settings(folder, expert_dtype="fp4")
    with pytest.raises(ConfigurationError, match="'fp4' inside an FP8 checkpoint"):
        load(folder, experts_quant_type="nf4")
