"""What settings lead to that nobody may expect: said by `fourfold validate` and at the start of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourfold.training.schema import TrainConfig

# What a value needs beside what Fourfold installs: package to import, name to install.
NEEDS: dict[tuple[str, str], tuple[str, str]] = {
    ("optimizer", "adamw_torch_4bit"): ("torchao", "torchao"),
    ("optimizer", "adamw_torch_8bit"): ("torchao", "torchao"),
    ("attn_implementation", "flash_attention_2"): ("flash_attn", "flash-attn"),
    ("attn_implementation", "flash_attention_3"): ("flash_attn_interface", "flash-attn-3"),
    ("use_tensorboard", "tensorboard"): ("tensorboard", "tensorboard"),
    ("use_wandb", "wandb"): ("wandb", "wandb"),
    ("use_mlflow", "mlflow"): ("mlflow", "mlflow"),
}


def needed_packages(config: TrainConfig) -> Iterator[tuple[str, str, str, str]]:
    """(key, value, package to import, name to install) of each setting that needs a further package."""
    values: dict[str, list[str]] = {
        "optimizer": [config.optimizer],
        "attn_implementation": [config.attention or ""],
    }
    values |= {f"use_{name}": [name] for name in config.trackers}
    for (key, value), (package, distribution) in NEEDS.items():
        if value in values.get(key, ()):
            yield key, value, package, distribution


def remarks(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(key, what to know) of a sound configuration."""
    if config.lora_target_parameters is None:
        yield (
            "lora_target_parameters",
            "absent, so experts are trained as well; [] trains modules alone",
        )
    if config.quantized and config.quantize_moe_experts is None:
        yield "quantize_moe_experts", "absent, so experts are packed with the Linears"
    if config.quantized and config.quantize_moe_experts is False:
        yield "quantize_moe_experts", "false: experts, most of the model, stay in high precision"
    held_out = bool(config.val_set_size or config.test_datasets)
    if config.evals_per_epoch and not held_out:
        yield "evals_per_epoch", "without val_set_size or test_datasets there is nothing to evaluate"
    if isinstance(config.gradient_checkpointing, str):
        yield "gradient_checkpointing", "activations are recomputed; their inputs stay on the GPU"
    if config.quantized and config.lora_target_modules is None and not config.lora_target_linear:
        yield "lora_target_modules", "absent, so the attention projections are trained"
    for key, value, _, distribution in needed_packages(config):
        yield key, f"{value} needs a further package: pip install {distribution}"
