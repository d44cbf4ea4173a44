"""Writes tiny checkpoints in the formats that models are published in, and the same numbers decoded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def deepseek_v3(**changes: object) -> transformers.PretrainedConfig:
    """Sizes that are no multiples of 128, so that tiles are cut."""
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 320,
        "moe_intermediate_size": 192,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    }
    return transformers.DeepseekV3Config(**(tiny.COMMON | sizes | changes))


def rewrite(source: Path, folder: Path, tensors: dict[str, torch.Tensor], quantization: dict | None) -> Path:
    """``source``'s checkpoint with other tensors and another quantization_config."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def build(config: transformers.PretrainedConfig, folder: Path) -> dict[str, torch.Tensor]:
    """A random bf16 model on disk; returns its tensors."""
    tiny.build(config).to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def glm4_moe(**changes: object) -> transformers.PretrainedConfig:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    return transformers.Glm4MoeConfig(**(tiny.COMMON | sizes | changes))


def bitsandbytes(
    config: transformers.PretrainedConfig,
    folder: Path,
    *,
    double: bool,
    quant_type: str = "nf4",
    experts: bool = True,
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """As transformers v4 saved it, each expert a Linear of its own; the bf16 checkpoint it was made from; and
    every quantized matrix as bitsandbytes decodes it.
    """
    import bitsandbytes.functional as bnb

    tensors = build(config, folder / "random")
    encoded, plain, decoded = dict(tensors), dict(tensors), {}
    for key, w in tensors.items():
        routed = ".experts." in key
        linear = ("proj" in key or routed or "moe.gate" in key) and key.endswith("weight") and w.ndim == 2
        if not linear or (routed and not experts):
            continue
        data, state = bnb.quantize_4bit(w, blocksize=64, quant_type=quant_type, compress_statistics=double)
        encoded[key] = data
        encoded |= {f"{key}.{name}": t.clone() for name, t in state.as_dict(packed=True).items()}
        state.shape = torch.Size((1, w.numel()))  # bitsandbytes' CPU code is wrong on some other shapes
        decoded[key] = bnb.dequantize_4bit(data, state).view(w.shape)
        if "moe.gate" in key:  # a router; the model of today has it as a plain parameter
            plain[key] = decoded[key]
    quantization = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }
    return (
        rewrite(folder / "random", folder / "bnb", encoded, quantization),
        rewrite(folder / "random", folder / "bf16", plain, None),
        decoded,
    )


Tensors = dict[str, torch.Tensor]


def mxfp4(folder: Path) -> tuple[Path, Path]:
    """gpt-oss: folders of the MXFP4 checkpoint and of the same numbers in bf16."""
    encoded, quantization, decoded = to_mxfp4(build(tiny.gpt_oss(), folder / "random"))
    return (
        rewrite(folder / "random", folder / "mxfp4", encoded, quantization),
        rewrite(folder / "random", folder / "bf16", decoded, None),
    )


def to_mxfp4(tensors: Tensors) -> tuple[Tensors, dict, Tensors]:
    """Random experts in MXFP4 in place of those in ``tensors``; the quantization_config; the same decoded."""
    encoded, decoded = dict(tensors), dict(tensors)
    for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = encoded.pop(key).shape  # the model stores in-by-out
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        encoded[f"{key}_blocks"], encoded[f"{key}_scales"] = blocks, scales
        values = torch.stack([E2M1[(blocks & 15).int()], E2M1[(blocks >> 4).int()]], dim=-1).flatten(-2)
        matrices = (values * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)
        decoded[key] = matrices.transpose(1, 2).bfloat16()
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    return encoded, quantization, decoded


def fp8(config: transformers.PretrainedConfig, folder: Path) -> tuple[Path, Path]:
    """Every matrix of a Linear or an expert in tiles of FP8, and the same numbers in bf16."""
    encoded, quantization, decoded = to_fp8(build(config, folder / "random"))
    return (
        rewrite(folder / "random", folder / "fp8", encoded, quantization),
        rewrite(folder / "random", folder / "bf16", decoded, None),
    )


def to_fp8(tensors: Tensors) -> tuple[Tensors, dict, Tensors]:
    """Projections in tiles of FP8; the quantization_config; the same decoded."""
    encoded, decoded = dict(tensors), dict(tensors)
    for key in [k for k in tensors if "proj" in k and k.endswith("weight") and tensors[k].ndim == 2]:
        w = tensors[key].float()
        rows, columns = (-(-size // 128) for size in w.shape)
        wide = torch.zeros(rows * 128, columns * 128)
        wide[: w.shape[0], : w.shape[1]] = w
        scale = wide.view(rows, 128, columns, 128).abs().amax(dim=(1, 3)) / 448 * 1.1
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        encoded[key] = (w / spread).to(torch.float8_e4m3fn)
        encoded[f"{key}_scale_inv"] = scale
        decoded[key] = (encoded[key].float() * spread).bfloat16()
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    quantization["weight_block_size"] = [128, 128]
    return encoded, quantization, decoded
