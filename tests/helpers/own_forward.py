"""Tiny models whose experts keep their own forward: packed, and what stock sees of them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fourfold
from fourfold.experts import PackedExperts, find_experts, pack_module_, prepare_reader_, unpack_module_
from fourfold.experts.own_forward import release_readers_
from fourfold.formats import PackFormat
from fourfold.planning.conformance import tiny_models
from parity import stock_reads

TYPES = ("llama4_text", "jetmoe", "dbrx", "longcat_flash", "step3p5", "inkling_text")
NF4 = PackFormat("nf4", 64, True)
IDS = torch.arange(3, 21).view(2, 9)  # (no padding: a row of zeros ties all experts)


def is_known(model_type: str) -> bool:
    """Whether this version of transformers has it."""
    return model_type in tiny_models.known_types()


def pair(
    model_type: str, fmt: PackFormat = NF4, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    """`pair_of` a tiny random model of this type."""
    config = tiny_models.tiny_config(model_type)
    model = tiny_models.build(config, tiny_models.model_classes(type(config))[0])
    tiny_models.randomise_experts_(model)
    return pair_of(model, fmt, dtype)


def pair_of(
    model: nn.Module, fmt: PackFormat = NF4, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    """Packed in place, and stock's on the same numbers; both in ``dtype`` and evaluation mode."""
    model.to(dtype)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    for found in list(find_experts(model)):
        pack_module_(found.module, fmt, found.name, found.layout)
        if found.reader != found.name:
            prepare_reader_(model.get_submodule(found.reader))
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module, PackedExperts):
            unpack_module_(module, dtype)
    release_readers_(plain)
    return model.eval(), plain.eval()


def config_for(model: nn.Module, **changes: object) -> LoraConfig:
    """All experts; both factors random."""
    arguments = {"r": 3, "lora_alpha": 5, "target_parameters": fourfold.expert_targets(model)}
    return LoraConfig(**(arguments | {"target_modules": [], "init_lora_weights": False} | changes))


def lora(model: nn.Module, seed: int = 1, **changes: object) -> PeftModel:
    """LoRA on all experts, with the same factors from the same seed."""
    torch.manual_seed(seed)
    return get_peft_model(model, config_for(model, **changes))


def output(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits, or hidden states of a model without a head."""
    with stock_reads(model):
        ids = ids.to(next(model.parameters()).device)
        return next(iter(model(input_ids=ids, use_cache=False).values()))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    y = output(model)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def checkpoint_layers_(model: nn.Module, reentrant: bool) -> None:
    """Switch checkpointing on, which asks for training; dropout stays off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing") or "Layer" in type(module).__name__
