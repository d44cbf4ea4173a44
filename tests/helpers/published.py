"""Tiny checkpoints of published models: their configuration with every size cut down, random weights, and
files with the tensors' names, layouts and number formats of the originals.

transformers writes most models back under the names that they were published under. What it does not write is
added here: layers for predicting several tokens, which lie in the files and in no model; Qwen3.5's experts,
which are fused in its files; MXFP4 and FP8.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig

import foreign_checkpoints
from fourfold.loading.skeleton import model_class, read_config
from fourfold.planning.conformance.tiny_models import build, randomise_experts_, shrink
from tiny_chat import CHAT_TEMPLATE

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = EXAMPLES / "configs"

# As on the model's card, in billions; what the files hold for predicting several tokens is left out.
PARAMETERS = {
    "deepseek-v2-lite": 15.7,
    "gemma-4-26b-a4b": 25.8,  # 25.2, and 0.6 of the vision tower
    "glm-4.5-air": 106.9,
    "glm-4.7-flash": 29.9,
    "gpt-oss-20b": 20.9,
    "granite-3.1-3b-a800m": 3.3,
    "mixtral-8x7b": 46.7,
    "nemotron-3-nano-30b-a3b": 31.6,
    "olmoe-1b-7b": 6.92,
    "qwen3-30b-a3b": 30.5,
    "qwen3-next-80b-a3b": 79.7,
    "qwen3.5-35b-a3b": 35.1,
}
# The first tensors of a layer's experts, as in the published files' index (the layer's number cut out).
EXPERT_KEYS = {
    "deepseek-v2-lite": "model.layers.N.mlp.experts.0.gate_proj.weight",
    "gemma-4-26b-a4b": "model.language_model.layers.N.experts.gate_up_proj",
    "glm-4.5-air": "model.layers.N.mlp.experts.0.gate_proj.weight",
    "glm-4.7-flash": "model.layers.N.mlp.experts.0.gate_proj.weight",
    "gpt-oss-20b": "model.layers.N.mlp.experts.gate_up_proj_blocks",
    "granite-3.1-3b-a800m": "model.layers.N.block_sparse_moe.input_linear.weight",
    "mixtral-8x7b": "model.layers.N.block_sparse_moe.experts.0.w1.weight",
    "nemotron-3-nano-30b-a3b": "backbone.layers.N.mixer.experts.0.up_proj.weight",
    "olmoe-1b-7b": "model.layers.N.mlp.experts.0.gate_proj.weight",
    "qwen3-30b-a3b": "model.layers.N.mlp.experts.0.gate_proj.weight",
    "qwen3-next-80b-a3b": "model.layers.N.mlp.experts.0.gate_proj.weight",
    "qwen3.5-35b-a3b": "model.language_model.layers.N.mlp.experts.gate_up_proj",
}
# The layer for predicting several tokens: what it is a copy of (one with experts), and its name in the files.
EXTRA_LAYERS = {
    "glm-4.5-air": ("model.layers.1.", "model.layers.46."),
    "glm-4.7-flash": ("model.layers.1.", "model.layers.47."),
    "qwen3-next-80b-a3b": ("model.layers.1.", "mtp.layers.0."),
    "qwen3.5-35b-a3b": ("model.language_model.layers.1.", "mtp.layers.0."),
}
# Kinds of layer, where shrinking by sizes alone would leave all 52 or none with experts.
LAYERS = {"nemotron-3-nano-30b-a3b": {"layers_block_type": ["mamba", "moe", "attention", "moe"]}}


def names() -> list[str]:
    """Of the examples for published models."""
    return sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


def published_config(name: str) -> PretrainedConfig:
    """The sizes that the model was published with."""
    return read_config(CONFIGS / name)


def tiny_config(name: str) -> PretrainedConfig:
    """The same architecture, cut down."""
    published = published_config(name)
    settings = shrink(published.to_dict()) | LAYERS.get(name, {})
    return type(published).from_dict(_whole_blocks(settings))


def _whole_blocks(settings: dict[str, Any]) -> dict[str, Any]:
    """Widths of 64 in place of others: as in the published models, rows of Linears are whole 4-bit blocks."""

    def width(key: str, value: Any) -> Any:
        return 64 if value == 96 or (isinstance(value, int) and key.endswith("lora_rank")) else value

    return {k: _whole_blocks(v) if isinstance(v, dict) else width(k, v) for k, v in settings.items()}


def write_checkpoint(name: str, folder: Path, fp8: bool = False) -> Path:
    """A folder with config.json and model.safetensors as published, and a tokenizer of the same kind.

    Args:
        name: of an example.
        folder: an empty one to write into.
        fp8: matrices in tiles of FP8, as releases in FP8 have them.
    """
    config = tiny_config(name)
    torch.manual_seed(0)
    model = build(config, model_class(config))
    randomise_experts_(model)
    model.to(torch.bfloat16).save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    if name == "qwen3.5-35b-a3b":
        tensors = fuse_experts(tensors)
    if name in EXTRA_LAYERS:
        source, target = EXTRA_LAYERS[name]
        tensors |= {k.replace(source, target): t.clone() for k, t in tensors.items() if k.startswith(source)}
    quantization = None
    if name == "gpt-oss-20b":
        tensors, quantization, _ = foreign_checkpoints.to_mxfp4(tensors)
    elif fp8:
        tensors, quantization, _ = foreign_checkpoints.to_fp8(tensors)
    published = foreign_checkpoints.rewrite(folder / "plain", folder / "published", tensors, quantization)
    make_tokenizer().save_pretrained(published)
    return published


def make_tokenizer() -> Any:
    """Byte-level BPE, as of nearly all of these models, without a merge: a token for each character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # space and newline, in that alphabet
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def fuse_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts' matrices of one projection and layer as one tensor, gate above up."""
    stacks: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    fused: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        where, _, rest = key.partition(".mlp.experts.")
        if not rest:
            fused[key] = tensor
            continue
        expert, projection, _ = rest.split(".")
        stacks.setdefault(where, {}).setdefault(projection, {})[int(expert)] = tensor
    for where, projections in stacks.items():
        gate, up, down = (
            torch.stack([projections[name][e] for e in sorted(projections[name])])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        fused[f"{where}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        fused[f"{where}.mlp.experts.down_proj"] = down
    return fused


def keys_of(folder: Path) -> set[str]:
    """Names of the tensors in a checkpoint of one file."""
    return set(load_file(folder / "model.safetensors"))


def settings_of(folder: Path) -> dict[str, Any]:
    """config.json."""
    result: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return result
