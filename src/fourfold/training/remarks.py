"""What settings lead to that nobody may expect: said by `fourfold validate` and at the start of a run."""

from __future__ import annotations

import importlib.util
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
    ("use_trackio", "trackio"): ("trackio", "trackio"),
    ("optimizer", "stable_adamw"): ("optimi", "torch-optimi"),
    ("optimizer", "grokadamw"): ("grokadamw", "grokadamw"),
    ("optimizer", "adamw_anyprecision"): ("torchdistx", "torchdistx"),
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


def beyond(config: TrainConfig, steps: int, per_epoch: int | None = None) -> Iterator[tuple[str, str]]:
    """(key, what to know) of intervals that a run of ``steps`` steps ends before.

    Args:
        config: of the run.
        steps: how many it has.
        per_epoch: steps in an epoch, where the data are known.
    """
    evaluated = "so there is an evaluation before it and one after it"
    for kind, instead in (("eval", evaluated), ("save", "so the adapter is saved at the end only")):
        key, often = f"{kind}_steps", f"{kind}s_per_epoch"
        every, times = getattr(config, key), getattr(config, often)
        if every is not None and every > steps:
            yield key, f"{every:g}, and the run has {steps} steps, {instead}"
        if times and per_epoch is not None and (apart := max(1, round(per_epoch / times))) > steps:
            yield often, f"{times} is every {apart} steps, and the run has {steps}, {instead}"


def remarks(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(key, what to know) of a sound configuration."""
    if not config.lora_target_parameters and config.lora_model_dir is None:
        absent = config.lora_target_parameters is None
        yield (
            "lora_target_parameters",
            f"{'absent' if absent else '[]'}, so experts are not trained; name their projections "
            "(`fourfold inspect MODEL` lists them), or write all",
        )
    if config.quantized and config.quantize_moe_experts is None:
        yield "quantize_moe_experts", "absent, so experts are packed with the Linears"
    if config.quantized and config.quantize_moe_experts is False:
        yield "quantize_moe_experts", "false: experts, most of the model, stay in high precision"
    held_out = bool(config.val_set_size or config.test_datasets)
    if config.evals_per_epoch and not held_out:
        yield "evals_per_epoch", "without val_set_size or test_datasets there is nothing to evaluate"
    if config.sample_packing and not str(config.attention).startswith("flash"):
        yield (
            "sample_packing",
            "scores between examples are computed and masked out; with attn_implementation: "
            "flash_attention_2 they are skipped",
        )
    if isinstance(config.gradient_checkpointing, str):
        yield "gradient_checkpointing", "activations are recomputed; their inputs stay on the GPU"
    chosen = config.lora_target_modules is not None or config.lora_target_linear or config.lora_model_dir
    if config.quantized and not chosen:
        yield "lora_target_modules", "absent, so the attention projections are trained"
    if config.router_aux_loss_coef:
        yield (
            "router_aux_loss_coef",
            "the term is part of each loss shown; a router follows it only where lora_modules_to_save or a "
            "target names one, otherwise adapters bend what the routers see",
        )
    if config.max_steps is not None:
        yield from beyond(config, config.max_steps)
    if config.trust_remote_code:
        yield "trust_remote_code", "true: code that comes with base_model is run"
    for key, value, package, distribution in needed_packages(config):
        if importlib.util.find_spec(package) is not None:
            continue
        yield key, f"{value} needs a further package: pip install {distribution}"
