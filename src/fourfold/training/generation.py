"""A model to talk to: loaded packed, with or without an adapter, its answer streamed."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TextStreamer

import fourfold
from fourfold.adapters.peft_lora import load_adapter
from fourfold.adapters.provenance import read as read_provenance
from fourfold.adapters.provenance import settings_for
from fourfold.errors import AdapterError, ConfigurationError
from fourfold.loading.skeleton import load_language_model
from fourfold.training.evaluate import evaluating
from fourfold.training.preflight import check_model_folder, load_tokenizer, packed_already


def load_for_generation(
    name: str, bits: int | None, adapter: str | None = None, skip_modules: list[str] | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer.

    Args:
        name: a folder, or a model's id on the hub.
        bits: 4, 8, 0 for as stored; None for as the adapter's base was packed, where that is known, and
            else 4, unless the checkpoint is packed already.
        adapter: the folder of a LoRA adapter.
        skip_modules: modules to leave in high precision, beside the head.

    Raises:
        ConfigurationError: there is no such model, or it is packed already in spite of ``bits``.
        AdapterError: there is no such adapter.
    """
    check_model_folder(name)
    if adapter is not None and not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        raise AdapterError(
            f"{adapter}: no adapter there (no adapter_config.json). Name the folder that `train` wrote."
        )
    packed = packed_already(name)
    if packed is not None and (bits is not None or skip_modules):
        raise ConfigurationError(
            f"{name} is packed already ({packed.get('quant_method')}): leave the choice of bits and of "
            "modules to skip out."
        )
    if bits == 0 and skip_modules:
        raise ConfigurationError("--skip-modules with --no-quantization: there is nothing to be left out of.")
    trained_on = None
    if adapter is not None and packed is None and bits is None and not skip_modules:
        stored = read_provenance(adapter)
        trained_on = None if stored is None else settings_for(stored)
    tokenizer = load_tokenizer(name)
    if packed is None and bits is None:
        bits = 4
    model = load_model(name, bits or 0, skip_modules=skip_modules, quantization_config=trained_on)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model, tokenizer


def load_model(
    name: str,
    bits: int,
    dtype: torch.dtype | None = None,
    *,
    skip_modules: list[str] | None = None,
    quantization_config: fourfold.MoeBitsAndBytesConfig | None = None,
) -> Any:
    """The model with its experts packed, in bf16 on a GPU and fp32 without one.

    Args:
        name: a folder, or a model's id on the hub.
        bits: 4 (NF4, double-quantized), 8, or 0 for as stored.
        dtype: another than that of the machine.
        skip_modules: modules to leave in high precision, beside the head.
        quantization_config: how to pack, instead of ``bits`` and ``skip_modules``.
    """
    kwargs: dict[str, Any] = {
        "dtype": dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    }
    if torch.cuda.is_available():
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    skips: dict[str, Any] = {"llm_int8_skip_modules": skip_modules}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    elif bits == 4:
        kwargs["quantization_config"] = fourfold.MoeBitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **skips
        )
    elif bits == 8:
        kwargs["quantization_config"] = fourfold.MoeBitsAndBytesConfig(load_in_8bit=True, **skips)
    return load_language_model(name, **kwargs)


def stream(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, sample: bool) -> tuple[str, int]:
    """Print the answer to standard output as it comes; returns it and its number of tokens."""
    text = prompt
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    inputs = {
        key: value.to(next(model.parameters()).device)
        for key, value in inputs.items()
        if key != "token_type_ids"
    }
    settings: dict[str, Any] = {} if sample else {"temperature": None, "top_p": None, "top_k": None}
    with evaluating(model):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **settings,
        )
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip(), len(new)
