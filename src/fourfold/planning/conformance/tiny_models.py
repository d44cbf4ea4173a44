"""Tiny random models of every model type that transformers knows, made from the configuration class alone.

There is no table of names of models: a default configuration is made, and its sizes are cut down by what
their keys say (layers, heads, experts, widths, vocabulary), in nested configurations and dictionaries too. A
key that several models use in one sense is a convention of the library; where a cut configuration cannot be
built the caller is told why.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fourfold.experts import find_experts

VOCABULARY = 128
LAYERS = 2
EXPERTS = 4
HEAD_DIM = 16
HIDDEN = 64
MROPE_SECTION = (3, 3, 2)  # of HEAD_DIM / 2
# What a configuration computes, and what belongs to published files or to the library, is left out.
_DERIVED = ("out_features", "out_indices", "stage_names", "quantization_config")
_LIBRARY = ("transformers_version", "_name_or_path", "output_attentions")
# First match wins. A number is a ceiling: what is smaller already stays as it is.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab", VOCABULARY),
    (r"(every|step|freq|period|interval)", 1),
    (r"kpool|compress_ratio|indexer_kv", 1),
    (r"layer_offset|moe_offset", 0),
    (r"first_k_dense|num_dense|n_dense|dense_layers|start_index", 1),
    (r"nextn|mtp", 0),
    (r"topk_group|expert_group|n_group$", 1),
    (r"per_tok|top_?k|moe_k|selected|activated", 2),
    (r"group_?size", HEAD_DIM),
    (r"zero_expert", 1),
    (r"shared_experts?$", 2),
    (r"experts?$|experts_", EXPERTS),
    (r"(layers?|blocks|depth|stages)$", LAYERS),
    (r"kv_heads|key_value_heads|kv_n_heads|num_kv|n_groups", 2),
    (r"mamba_d_head", 2 * HIDDEN // 4),
    (r"heads?$|num_head", 4),
    (r"^qk_head_dim", 2 * HEAD_DIM),
    (r"head_dim|head_size|kv_channels|rope_dim|dim_head|head_channels|state_size|d_state", HEAD_DIM),
    (r"rank|lora", HEAD_DIM),
    (r"part_features", HIDDEN // 2),
    # Rows that are no whole blocks.
    (r"moe_intermediate|expert_intermediate|expert_ffn|moe_dim|moe_ffn", 96),
    (r"d_ff|intermediate|ffn|feed_forward|mlp_dim|inner|shared_expert", 128),
    (r"hidden|d_model|n_embd|embed|^dim$|_dim$|width|channels|out_size|output_size|input_size", HIDDEN),
    (r"max_position|n_positions|seq_len|context|position_embeddings|window|chunk|budget", VOCABULARY),
)
# Settings of the router that some classes leave open, for a checkpoint's own configuration to say.
_FILLED = r"experts$|per_tok|^head_dim$|moe_intermediate|expert_intermediate|indexer_|^(n|topk)_group$"
_LAYERS_KEY = r"^(num_hidden_layers|n_layers?|num_layers|num_decoder_layers)$"


def _ceiling(key: str) -> int | None:
    return next((ceiling for pattern, ceiling in _SIZES if re.search(pattern, key)), None)


def _cut(key: str, value: int) -> int:
    ceiling = _ceiling(key)
    if ceiling == EXPERTS and value == 1:  # a mixture of one expert is none
        return EXPERTS
    return value if ceiling is None else min(value, ceiling)


def shrink(settings: dict[str, Any], layers: int | None = None) -> dict[str, Any]:
    """A configuration's dictionary with every size cut down."""
    own = next((v for k, v in settings.items() if re.search(_LAYERS_KEY, str(k))), layers)
    layers = own if isinstance(own, int) else layers
    result = {
        k: _shrink_value(str(k), v, layers) for k, v in settings.items() if k not in _DERIVED + _LIBRARY
    }
    heads = [k for k in settings if re.search(r"num_attention_heads$|^n_heads?$", str(k))]
    for kv in [k for k in settings if re.search(r"key_value_heads$|kv_heads$", str(k))]:
        for q in heads:  # no grouped queries stay no grouped queries
            if settings[kv] == settings[q]:
                result[kv] = result[q]
    return result


def _shrink_value(key: str, value: Any, layers: int | None) -> Any:
    if key == "use_cache":
        return False  # caches of linear attention alone refuse to be asked for a length
    if key == "partial_rotary_factor":
        return 1.0
    if isinstance(value, bool):
        return value or bool(re.search(r"^((use|enable|is)_)?moe(_block)?$", key))
    if value is None:
        return _fill(key)
    if re.search(r"token(_id|_index)?s?$|_ids?$|^(bos|eos|pad)", key) and "per_tok" not in key:
        return _small_token(key, value)
    if key == "per_layer_config":
        return _last_layer_only(value, layers)
    if isinstance(value, dict):
        return value if key in ("id2label", "label2id") else shrink(value, layers)
    if key == "mrope_section":
        return list(MROPE_SECTION)
    if isinstance(value, list | tuple):
        return _shrink_list(key, list(value), layers)
    return _cut(key, value) if isinstance(value, int) else value


def _fill(key: str) -> Any:
    if key == "mlp_layer_types":
        return ["dense"] * (LAYERS - 1) + ["sparse"]
    if key == "clip_qkv":
        return 8.0
    if key == "sliding_window":
        return VOCABULARY
    if key == "layer_types":
        return ["full_attention"] * LAYERS
    return _ceiling(key) if re.search(_FILLED, key) else None


def _last_layer_only(value: dict[Any, Any], layers: int | None) -> dict[Any, Any]:
    """Settings of single layers: of those only the last one is left."""
    last = [shrink(v) for k, v in value.items() if layers is not None and int(k) == layers - 1]
    return {LAYERS - 1: last[0]} if last else {}


def _shrink_list(key: str, value: list[Any], layers: int | None) -> list[Any]:
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if layers is not None and len(value) == layers and layers > LAYERS:
        # The kinds of layer at both ends; of numbers, which may point at layers, the first ones.
        value = value[:LAYERS] if whole else [value[0]] * (LAYERS - 1) + [value[-1]]
    elif value and whole and "layer" in key:
        return [
            v for v in value if v < LAYERS - 1
        ]  # layers of another kind: the last one is of the usual kind
    return [_shrink_value(key, v, None) for v in value]


def _small_token(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_small_token(key, v) for v in value]
    if not isinstance(value, int) or value < VOCABULARY // 2:
        return value
    # Special tokens lie in the upper half, apart from each other; tests feed the lower half.
    return VOCABULARY // 2 + sum(key.encode()) % (VOCABULARY // 2)


def _modeling_modules(config_class: type[PretrainedConfig]) -> list[Any]:
    package = config_class.__module__.rpartition(".")[0]
    name = config_class.__module__.rpartition(".")[2].replace("configuration_", "modeling_")
    try:
        return [importlib.import_module(f"{package}.{name}")]
    except ImportError:
        return []


def _mentions_experts(config_class: type[PretrainedConfig], seen: set[type]) -> bool:
    """Whether the code of a model, or of a model inside it, speaks of experts at all (most do not)."""
    if config_class in seen:
        return False
    seen.add(config_class)
    for module in _modeling_modules(config_class):
        if "expert" in inspect.getsource(module).lower():
            return True
    inner = [sub for sub in getattr(config_class, "sub_configs", {}).values() if inspect.isclass(sub)]
    return any(issubclass(s, PretrainedConfig) and _mentions_experts(s, seen) for s in inner)


def known_types() -> list[str]:
    """Every model type of the installed transformers."""
    return sorted(CONFIG_MAPPING.keys())


def model_types() -> Iterator[str]:
    """Model types whose code speaks of experts, in alphabetical order."""
    for model_type in known_types():
        if _mentions_experts(CONFIG_MAPPING[model_type], set()):
            yield model_type


def model_classes(config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    """Classes that take this configuration, those that generate text first."""
    names: list[str] = []
    wanted = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MODEL_MAPPING")
    for wish in wanted:
        for attribute in sorted(vars(modeling_auto)):
            if attribute.endswith("_MAPPING_NAMES") and wish in f"{attribute}":
                found = getattr(modeling_auto, attribute).get(config_class.model_type)
                names += [found] if isinstance(found, str) else list(found or ())
    classes = [c for n in names if (c := getattr(transformers, n, None)) is not None]
    for module in _modeling_modules(config_class):
        classes += [
            c
            for c in vars(module).values()
            if inspect.isclass(c)
            and issubclass(c, PreTrainedModel)
            and getattr(c, "config_class", None) is config_class
            and c.__module__ == module.__name__
            and not c.__name__.endswith("PreTrainedModel")
        ]
    # (a class for the text inside takes another configuration)
    return [c for c in dict.fromkeys(classes) if c.config_class in (config_class, None)]


def _default_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """The class's defaults, and those of each configuration inside that it leaves out by default.

    (diffusion_gemma of transformers 5.17 leaves out its vision tower's, and cannot be built without.)
    """
    config = config_class()
    left_out = [name for name in config_class.sub_configs if getattr(config, name, None) is None]
    return config_class(**{name: {} for name in left_out}) if left_out else config


def tiny_config(model_type: str) -> PretrainedConfig:
    """The configuration class's defaults, cut down."""
    config_class = CONFIG_MAPPING[model_type]
    settings = shrink(_default_config(config_class).to_dict())
    if any("mrope_section" in inspect.getsource(module) for module in _modeling_modules(config_class)):
        _add_mrope_section(settings)
    config = config_class.from_dict(settings)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # that of the published files
    return config


def _add_mrope_section(settings: dict[str, Any]) -> None:
    """Models with positions in three axes fall back to sections of their full width."""
    for key, value in settings.items():
        if key == "rope_parameters" and isinstance(value, dict):
            value.setdefault("mrope_section", list(MROPE_SECTION))
            value["partial_rotary_factor"] = 1.0
        elif isinstance(value, dict):
            _add_mrope_section(value)


def build(config: PretrainedConfig, model_class: Any, device: str = "cpu") -> PreTrainedModel:
    """A random fp32 model in evaluation mode.

    A setting that the model reads and its configuration class lacks is added by the same conventions.
    """
    for left in reversed(range(6)):
        try:
            with torch.device(device):
                model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32)
            return model.eval()
        except AttributeError as error:
            name = error.name or ""
            guess = 10000.0 if "theta" in name else _ceiling(name)
            if guess is None:
                guess = _find(config.to_dict(), name)
            if not left or guess is None or not isinstance(error.obj, PretrainedConfig):
                raise
            setattr(error.obj, name, guess)
    raise AssertionError("unreachable: the last round returns or raises")


def _find(settings: dict[str, Any], key: str) -> Any:
    """The first value of a key, wherever it is in nested configurations."""
    if key in settings:
        return settings[key]
    inner = (_find(value, key) for value in settings.values() if isinstance(value, dict))
    return next((value for value in inner if value is not None), None)


def randomise_experts_(model: PreTrainedModel) -> None:
    """Experts that matter and differ: large weights, each expert larger than the one before, biases not zero.

    (Random initialisation leaves experts so small and so alike that exchanging them is hardly seen.)
    """
    with torch.no_grad():
        for found in find_experts(model):
            for projection in found.layout.projections if found.layout else ():
                parameter = getattr(found.module, projection.name)
                w_ENK = found.layout.to_stack(parameter.data, projection) if found.layout else parameter
                factor_E = 1.8 ** (torch.arange(w_ENK.shape[0]) - w_ENK.shape[0] / 2)
                w_ENK.copy_(torch.randn(w_ENK.shape) * 0.1 * factor_E[:, None, None])
                if projection.bias is not None:
                    getattr(found.module, projection.bias).normal_(0, 0.1)


def randomise_vectors_(model: PreTrainedModel) -> None:
    """Norms that are not one and biases that are not zero: a loader that loses them must not get away with
    initial values. (Norms inside experts modules as well.)
    """
    vectors = [p for p in model.parameters() if p.ndim == 1]
    vectors += [b for b in model.buffers() if b.ndim == 1 and not b.any()]
    with torch.no_grad():
        for vector in vectors:
            if vector.is_floating_point():
                vector.add_(torch.randn_like(vector) * 0.02)
        for matrix in (m.weight for m in model.modules() if isinstance(m, nn.Linear)):
            if matrix.abs().max() < 1e-6:  # some are initialised below what fp16, and so INT8, can hold
                matrix.normal_(0, 0.02)


def linear_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Collections of like modules made of Linears that are called experts: bitsandbytes covers them."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        # (beside them there may be a dropout)
        children = [c for c in module.children() if any(isinstance(m, nn.Linear) for m in c.modules())]
        called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        alike = len(children) > 1 and len({type(c) for c in children}) == 1
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        collection = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if collection and alike and not inside and re.search("expert|moe", called):
            found.append((name, module))
    return found
