"""A checkpoint of Qwen3-30B-A3B's shape with random weights, written as published ones are: one tensor per
expert.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig


def qwen3_30b_config(layers: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B with ``layers`` of its 48 layers."""
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def write_checkpoint(folder: Path, layers: int, device: str) -> int:
    """Write it, a file per layer; returns the bytes. Does nothing where it lies already."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        return json.loads(index_file.read_text())["metadata"]["total_size"]
    folder.mkdir(parents=True, exist_ok=True)
    config = qwen3_30b_config(layers)
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * 0.02).bfloat16().cpu()

    H, N, D = config.hidden_size, config.moe_intermediate_size, config.head_dim
    files: list[dict[str, torch.Tensor]] = []
    ones = torch.ones(H, dtype=torch.bfloat16)
    files.append(
        {
            "model.embed_tokens.weight": normal(config.vocab_size, H),
            "lm_head.weight": normal(config.vocab_size, H),
            "model.norm.weight": ones,
        }
    )
    weight_map: dict[str, str] = {}
    total = 0

    def write(tensors: dict[str, torch.Tensor], number: int) -> int:
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(t.numel() * t.element_size() for t in tensors.values())

    total += write(files.pop(), 1)
    for layer in range(layers):
        p = f"model.layers.{layer}"
        tensors = {
            f"{p}.input_layernorm.weight": ones.clone(),
            f"{p}.post_attention_layernorm.weight": ones.clone(),
            f"{p}.self_attn.q_norm.weight": torch.ones(D, dtype=torch.bfloat16),
            f"{p}.self_attn.k_norm.weight": torch.ones(D, dtype=torch.bfloat16),
            f"{p}.self_attn.q_proj.weight": normal(config.num_attention_heads * D, H),
            f"{p}.self_attn.k_proj.weight": normal(config.num_key_value_heads * D, H),
            f"{p}.self_attn.v_proj.weight": normal(config.num_key_value_heads * D, H),
            f"{p}.self_attn.o_proj.weight": normal(H, config.num_attention_heads * D),
            f"{p}.mlp.gate.weight": normal(config.num_experts, H),
        }
        for expert in range(config.num_experts):
            e = f"{p}.mlp.experts.{expert}"
            tensors[f"{e}.gate_proj.weight"] = normal(N, H)
            tensors[f"{e}.up_proj.weight"] = normal(N, H)
            tensors[f"{e}.down_proj.weight"] = normal(H, N)
        total += write(tensors, layer + 2)
    config.save_pretrained(folder)
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total
