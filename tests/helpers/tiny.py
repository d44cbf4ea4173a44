"""Tiny random models of the kinds of experts that transformers decorates, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 8, 9, 7], [31, 41, 59, 26, 53, 58, 9, 79, 3]])
COMMON = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixtral(**changes: object) -> PretrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4}
    return transformers.MixtralConfig(**(COMMON | sizes | changes))


def qwen3_moe(**changes: object) -> PretrainedConfig:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return transformers.Qwen3MoeConfig(**(COMMON | sizes | changes))


def gpt_oss(**changes: object) -> PretrainedConfig:
    """Transposed, interleaved gate and up, biases, a clamped gate of its own."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssConfig(**(COMMON | sizes | changes))


def nemotron_h(**changes: object) -> PretrainedConfig:
    """No gate; a squared activation."""
    sizes = {
        "hidden_size": 64,
        "layers_block_type": ["moe", "attention"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 32,
        "intermediate_size": 96,
        "n_group": 1,
        "topk_group": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
    }
    common = {k: v for k, v in COMMON.items() if k != "num_hidden_layers"}
    return transformers.NemotronHConfig(**(common | sizes | changes))


# Of both, the first layer is dense, and a shared expert stands beside the routed ones.
_DENSE_FIRST = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def glm4_moe(**changes: object) -> PretrainedConfig:
    """GLM-4.5 to 4.7."""
    sizes = _DENSE_FIRST | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1}
    return transformers.Glm4MoeConfig(**(COMMON | sizes | changes))


def deepseek_v3(**changes: object) -> PretrainedConfig:
    """Latent attention."""
    sizes = _DENSE_FIRST | {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    }
    common = {k: v for k, v in COMMON.items() if k != "head_dim"}
    return transformers.DeepseekV3Config(**(common | sizes | changes))


def dense(**changes: object) -> PretrainedConfig:
    return transformers.LlamaConfig(**(COMMON | {"hidden_size": 64, "intermediate_size": 128} | changes))


def llama4(**changes: object) -> PretrainedConfig:
    """Undecorated: dense batched products over in-by-out matrices."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "intermediate_size_mlp": 128,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
        "architectures": ["Llama4ForCausalLM"],
    }
    return transformers.Llama4TextConfig(**(COMMON | sizes | changes))


def jetmoe(**changes: object) -> PretrainedConfig:
    """Undecorated: a module for each projection."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "kv_channels": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "architectures": ["JetMoeForCausalLM"],
    }
    common = {k: v for k, v in COMMON.items() if k not in ("head_dim", "num_attention_heads")}
    return transformers.JetMoeConfig(**(common | sizes | changes))


def dbrx(**changes: object) -> PretrainedConfig:
    """Undecorated: flattened to two dimensions, read by the module around."""
    sizes = {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "vocab_size": 96,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        "architectures": ["DbrxForCausalLM"],
    }
    return transformers.DbrxConfig(**(sizes | changes))


KINDS: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "nemotron_h": nemotron_h,
}


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model whose experts matter: weights five times the usual size, biases that are not zero."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    return model


def save(config: PretrainedConfig, folder: Path, **arguments: object) -> PreTrainedModel:
    """Build and save; returns the model."""
    model = build(config)
    model.save_pretrained(folder, **arguments)
    return model


def load(folder: Path, **settings: object) -> PreTrainedModel:
    """Load with a `MoeBitsAndBytesConfig` of these settings; as stored without any."""
    import fourfold

    arguments = {"quantization_config": fourfold.MoeBitsAndBytesConfig(**settings)} if settings else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)


def packed_folder(source: Path, folder: Path, **settings: object) -> Path:
    """A packed checkpoint of the model in ``source``: NF4 experts unless told otherwise."""
    load(source, **(settings or {"experts_quant_type": "nf4"})).save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of two rows of tokens, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def experts_of(model: PreTrainedModel) -> torch.nn.Module:
    """The first experts module."""
    from fourfold.experts import find_experts

    return next(iter(find_experts(model))).module


def round_trip_(model: PreTrainedModel, fmt: object) -> PreTrainedModel:
    """Pass every expert matrix through bitsandbytes' own quantizer and back, in place.

    Independent of Fourfold's storage and decoder.
    """
    import bitsandbytes.functional as bnb

    from fourfold.experts import find_experts

    def there_and_back(matrix: torch.Tensor) -> torch.Tensor:
        if fmt.quant_type == "int8":
            codes, absmax, _ = bnb.int8_vectorwise_quant(matrix.half())
            return bnb.int8_vectorwise_dequant(codes, absmax).to(matrix.dtype)
        rows, columns = matrix.shape
        padded = torch.nn.functional.pad(matrix, (0, -columns % fmt.blocksize)).contiguous()
        data, state = bnb.quantize_4bit(
            padded, blocksize=fmt.blocksize, quant_type=fmt.quant_type, compress_statistics=fmt.double_quant
        )
        state.shape = torch.Size((1, padded.numel()))  # its CPU code is wrong on rows of other lengths
        return bnb.dequantize_4bit(data, state).view(rows, -1)[:, :columns].to(matrix.dtype)

    with torch.no_grad():
        for found in find_experts(model):
            for projection in found.layout.projections:
                weight = getattr(found.module, projection.name)
                w_ENK = found.layout.to_stack(weight.data, projection)  # a view
                for e in range(w_ENK.shape[0]):
                    parts = [there_and_back(m.contiguous()) for m in w_ENK[e].chunk(projection.shape.parts)]
                    w_ENK[e] = torch.cat(parts)
    return model
