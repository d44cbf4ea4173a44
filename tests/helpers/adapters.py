"""Adapters of stock PEFT on tiny models, and what they add to each expert's matrix, reckoned by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

import fourfold
import tiny
from fourfold.experts import find_experts

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make(config: PretrainedConfig, folder: Path, **lora: Any) -> PeftModel:
    """A random adapter in ``folder / "adapter"``; in ``folder / "base"`` its model's configuration."""
    model = tiny.build(config)
    config.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]} | lora
    if "target_parameters" not in settings:
        settings["target_parameters"] = fourfold.expert_targets(model)
    peft_model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    peft_model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    peft_model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return peft_model


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """Change an adapter's tensors or configuration where it lies; a setting of ... is taken out."""
    if tensors is not None:
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
        )
    data = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    return folder


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())


def deltas(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """Experts module and parameter -> what stock PEFT adds, ``[E, out, in]``."""
    result = {}
    names = {id(f.module): f for f in find_experts(peft_model)}
    for module in peft_model.modules():
        if type(module).__name__ == "ParamWrapper":
            found = names[id(module.get_base_layer())]
            projection = found.layout.projection(module.parameter_name)
            delta = module.get_delta_weight("default")
            result[f"{found.name}.{module.parameter_name}"] = found.layout.to_stack(delta, projection)
    return result


def per_expert_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> ``alpha / r * B A`` of a per-expert adapter, as servers reckon it."""
    tensors, config = read(folder)
    scaling = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scaling
        * (tensors[key.replace("lora_A", "lora_B")] @ a)
        for key, a in tensors.items()
        if key.endswith(".lora_A.weight")
    }


def exchange(folder: Path) -> None:
    """As PEFT 0.17 to 0.19.0 wrote the same update: A ``[E*r, N]`` and B ``[K, r*E]``."""
    tensors, config = read(folder)
    r = config["r"]
    for key in [k for k in tensors if "experts" in k and "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        a_ErK = a.view(-1, r, a.shape[1])
        b_NrE = b.view(b.shape[0], r, -1)
        tensors[key] = b_NrE.permute(2, 1, 0).reshape(-1, b.shape[0])
        tensors[other] = a_ErK.permute(2, 1, 0).reshape(a.shape[1], -1)
    rewrite(folder, tensors, peft_version="0.18.1")


def group(folder: Path) -> None:
    """As Unsloth wrote it before September 2026: B's expert the slowest."""
    tensors, config = read(folder)
    for key in [k for k in tensors if "experts" in k and "lora_B" in k]:
        b = tensors[key]
        tensors[key] = b.view(b.shape[0], config["r"], -1).transpose(1, 2).reshape(b.shape[0], -1)
    rewrite(folder, tensors, base_model_name_or_path="unsloth/nowhere")
