"""After loading nothing packed is missing and every number is one, or there is an error with its name."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import foreign_checkpoints
import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.experts import find_experts
from fourfold.loading.complete import check_finite
from tiny import load, packed_folder

Config = fourfold.MoeBitsAndBytesConfig


@pytest.mark.parametrize("other", ["disk", "meta"])
@pytest.mark.parametrize("packed_on_disk", [False, True])
def test_offloaded_experts_are_refused_by_name(
    mixtral: Path, tmp_path: Path, other: str, packed_on_disk: bool
) -> None:
    """`device_map="auto"` spills like this where memory is short."""
    folder = packed_folder(mixtral, tmp_path / "packed") if packed_on_disk else mixtral
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    here, away = ("cpu", "disk") if other == "disk" else ("meta", "cpu")
    device_map = dict.fromkeys(rest, here) | {"model.layers.1": away}
    settings = {} if packed_on_disk else {"quantization_config": Config(experts_quant_type="nf4")}
    with pytest.raises(ConfigurationError, match=r"beside another device: .*layers\.1\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map=device_map, offload_folder=tmp_path / "offload", **settings
        )


@pytest.mark.parametrize("leaf", ["input_layernorm.weight", "gate.weight", "embed_tokens.weight"])
def test_any_number_that_is_none_is_refused_by_name(tmp_path: Path, leaf: str) -> None:
    model = tiny.build(tiny.mixtral())
    name = [n for n, _ in model.named_parameters() if n.endswith(leaf)][-1]
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = float("-inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} hold NaN or infinite"):
        load(tmp_path, experts_quant_type="nf4")


def test_buffers_that_are_saved_are_numbers_too(tmp_path: Path) -> None:
    """Routers keep what they add to an expert's score in one."""
    model = tiny.build(foreign_checkpoints.deepseek_v3())
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert name in dict(model.named_buffers())
    model.get_buffer(name)[2] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} hold NaN"):
        load(tmp_path, experts_quant_type="nf4")


def test_single_numbers_may_be_infinite_bounds() -> None:
    module = torch.nn.Module()
    module.register_buffer("highest", torch.tensor(float("inf")))
    check_finite(module)


@pytest.mark.parametrize("which", ["nested_offset", "quant_map"])
def test_what_else_linears_are_decoded_with_is_a_number(mixtral: Path, tmp_path: Path, which: str) -> None:
    folder = packed_folder(mixtral, tmp_path / "packed", load_in_4bit=True, bnb_4bit_use_double_quant=True)
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if re.search(r"layers\.1\.self_attn\.q_proj\.weight\.quant_state", k))
    if which == "quant_map":
        tensors[f"{name.partition('.quant_state')[0]}.quant_map"][3] = float("nan")
    else:
        state = json.loads(bytes(tensors[name].tolist())) | {"nested_offset": float("nan")}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers\.1\.self_attn\.q_proj\.weight\.{which} hold NaN"):
        load(folder)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_scales_of_linears_that_are_no_numbers_are_refused(mixtral: Path, tmp_path: Path, settings) -> None:
    folder = packed_folder(mixtral, tmp_path / "packed", **settings)
    tensors = load_file(folder / "model.safetensors")
    suffix = "weight.absmax" if "load_in_4bit" in settings else "SCB"
    name = next(k for k in tensors if k.endswith(f"layers.1.self_attn.q_proj.{suffix}"))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.* hold NaN"):
        load(folder)


@pytest.mark.parametrize("suffix", ["gate_up_proj_absmax", "down_proj"])
def test_a_missing_packed_tensor_is_an_error_with_its_name(
    mixtral: Path, tmp_path: Path, suffix: str
) -> None:
    folder = packed_folder(mixtral, tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    (gone,) = (k for k in tensors if re.search(rf"layers\.1\..*experts\.{suffix}$", k))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.experts\.{suffix}[,\s]"):
        load(folder)


def test_scales_stored_in_another_dtype_are_refused(mixtral: Path, tmp_path: Path) -> None:
    """The loader would cast them by value into int32: all zero."""
    folder = packed_folder(mixtral, tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if re.search(r"layers\.1\..*experts\.down_proj_absmax$", k))
    tensors[name] = tensors[name].view(torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*down_proj_absmax is F32"):
        load(folder)


@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_that_are_no_numbers_are_refused(mixtral: Path, tmp_path: Path, double_quant: bool) -> None:
    settings = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    folder = packed_folder(mixtral, tmp_path / "packed", **settings)
    tensors = load_file(folder / "model.safetensors")
    suffix = "absmax_offset" if double_quant else "absmax"
    name = next(k for k in tensors if re.search(rf"layers\.1\..*experts\.down_proj_{suffix}$", k))
    tensors[name].view(torch.float32).view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.experts\.down_proj_{suffix} hold NaN"):
        load(folder)


def test_high_precision_experts_under_a_packed_configuration_are_refused(
    mixtral: Path, tmp_path: Path
) -> None:
    folder = packed_folder(mixtral, tmp_path / "packed")
    fourfold.dequantize(load(folder)).save_pretrained(tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    fused = load(tmp_path / "plain").state_dict()
    stored |= {k.replace("mlp", "block_sparse_moe"): v for k, v in fused.items() if "experts" in k}
    save_file({k: v.contiguous() for k, v in stored.items()}, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="stored in high precision"):
        load(tmp_path / "plain")


def test_a_missing_expert_is_an_error_with_its_name(mixtral: Path, tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*3 of 4"):
        load(tmp_path / "one", experts_quant_type="nf4")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_not_finite_weights_are_refused_with_their_name(tmp_path: Path, kind: str) -> None:
    model = tiny.build(tiny.KINDS[kind]())
    name, experts = [(f.name, f.module) for f in find_experts(model)][-1]
    with torch.no_grad():
        experts.down_proj[3, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}\.down_proj: weights of expert\(s\) 3"):
        load(tmp_path, experts_quant_type="nf4")
