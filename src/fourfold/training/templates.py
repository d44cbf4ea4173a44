"""Names of chat templates, and which of them is the model's own.

axolotl ships a template under each of these names. Fourfold ships none but ChatML: a name that is the model's
own family means the template that came with its tokenizer; one of another family would show the model other
marks than it knows, and is refused. Imports neither torch nor transformers.
"""

from __future__ import annotations

import re

# Those that mean the same for any model.
GENERAL = ("tokenizer_default", "tokenizer_default_fallback_chatml", "chatml", "jinja")
FAMILIES = (
    "alpaca",
    "aya",
    "cohere",
    "command_a",
    "command_a_rag",
    "command_a_tool_use",
    "deepseek_v2",
    "deepseek_v3",
    "exaone",
    "exaone4",
    "falcon_h1",
    "gemma",
    "gemma3",
    "gemma3n",
    "gemma4",
    "glm4",
    "gpt_oss",
    "granite",
    "granitemoe",
    "jamba",
    "llama3",
    "llama3_2_vision",
    "llama4",
    "llava",
    "metharme",
    "mistral_v1",
    "mistral_v2v3",
    "mistral_v3_tekken",
    "mistral_v7_tekken",
    "nemotron_h",
    "olmoe",
    "phi_3",
    "phi_35",
    "phi_4",
    "pixtral",
    "qwen2_vl",
    "qwen3",
    "qwen3_5",
    "qwen3_next",
    "qwen_25",
    "voxtral",
)
TEMPLATES = (*GENERAL, *FAMILIES)
# What names of templates and of models say beside family and version.
_ASIDE = ("moe", "text", "vl", "vision", "omni", "tekken", "lite", "unified")


def is_of_family(template: str, model_type: str) -> bool:
    """Whether a template's name is the family of a model type, by their words and versions.

    ``qwen3_5`` is of ``qwen3_5_moe``, ``llama3`` of ``llama``, ``mistral_v7_tekken`` of ``mistral4`` (its
    v7 is the tokenizer's version), ``qwen_25`` of ``qwen2_moe``; ``qwen3`` is not of ``qwen3_5_moe``.
    """
    words, version = _read(re.sub(r"_v[0-9]+(v[0-9]+)?", "", template) if "mistral" in template else template)
    model_words, model_version = _read(model_type)
    if words != model_words:
        return False
    tokenizer_versioned = "mistral" in template
    whole_and_minor = len(version) == 1 and len(version[0]) == 2 and version[0][:1] == "".join(model_version)
    return tokenizer_versioned or version == model_version or not model_version or whole_and_minor


def _read(name: str) -> tuple[list[str], list[str]]:
    parts = re.findall(r"[a-z]+|[0-9]+", name.lower())
    words = [part for part in parts if not part.isdigit() and part not in _ASIDE]
    words = [word.removesuffix("moe") or word for word in words]
    return [word for word in words if word != "v"], [part for part in parts if part.isdigit()]
