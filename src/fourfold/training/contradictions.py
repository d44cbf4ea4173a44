"""Settings that contradict each other: one message each, with the way out. Never resolved in silence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fourfold.training.bnb_settings import bnb_contradictions
from fourfold.training.dataset_contradictions import dataset_contradictions
from fourfold.training.fsdp_keys import fsdp_contradictions
from fourfold.training.offload_keys import offload_contradictions
from fourfold.training.schedules import schedule_contradictions
from fourfold.training.yaml_file import Problem
from fourfold.training.zero import zero_contradictions

if TYPE_CHECKING:
    from fourfold.training.dataset_keys import DatasetConfig
    from fourfold.training.schema import TrainConfig

# The trainer's polynomial schedule ends here and must begin higher.
POLYNOMIAL_END = 1e-7
ATTENTION_KEYS = ("flash_attention", "sdp_attention", "flex_attention", "eager_attention")


class ContradictionError(ValueError):
    """Settings that contradict each other; carries one ``Problem`` for each, and the keys it concerns."""

    def __init__(self, found: list[tuple[tuple[str, ...], Problem]]) -> None:
        super().__init__("; ".join(str(problem) for _, problem in found))
        self.found = found


def contradictions(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Every contradiction: the keys it concerns (the first is where it is reported) and the problem."""

    def found(keys: tuple[str, ...], what: str, remedy: str) -> tuple[tuple[str, ...], Problem]:
        return keys, Problem(keys[0], what, remedy)

    if config.load_in_4bit and config.load_in_8bit:
        yield found(
            ("load_in_8bit", "load_in_4bit"), "contradicts load_in_4bit: true", "Set one of the two to false."
        )
    elif config.adapter == "qlora" and not config.load_in_4bit:
        remedy = "Set load_in_4bit: true, or adapter: lora for a base model in 8 bit or high precision."
        yield found(("adapter", "load_in_4bit"), "qlora needs a base model in 4 bit", remedy)
    elif config.adapter == "lora" and config.load_in_4bit:
        remedy = "Write adapter: qlora, or set load_in_4bit: false."
        yield found(("adapter", "load_in_4bit"), "lora contradicts load_in_4bit: true", remedy)
    if config.quantize_moe_experts and not config.quantized:
        what = "true, but the model is not quantized at all"
        keys = ("quantize_moe_experts", "load_in_4bit", "load_in_8bit")
        yield found(keys, what, "Set load_in_4bit: true or load_in_8bit: true, or drop this key.")
    yield from bnb_contradictions(config)
    yield from offload_contradictions(config)
    yield from fsdp_contradictions(config)
    yield from zero_contradictions(config)
    yield from _lora_contradictions(config)
    yield from _trainer_contradictions(config)
    yield from _loftq_contradictions(config)
    yield from _tracker_contradictions(config)
    yield from dataset_contradictions(config)
    if config.val_set_size and config.test_datasets:
        remedy = "Set val_set_size: 0 to evaluate on test_datasets, or drop test_datasets."
        yield found(("val_set_size", "test_datasets"), "contradicts test_datasets", remedy)
    if config.val_set_size >= 1 and config.val_set_size != int(config.val_set_size):
        yield found(
            ("val_set_size",),
            f"{config.val_set_size} is no number of examples",
            "Give a fraction or a count.",
        )
    yield from _interval_contradictions(config)
    for key in ("eval_steps", "save_steps"):
        value = getattr(config, key)
        if value is not None and value >= 1 and value != int(value):
            yield found(
                (key,), f"{value} is no number of steps", "Give a whole number, or a fraction below 1."
            )
    asked = {"eval_steps": config.eval_steps, "eval_strategy": config.eval_strategy in ("epoch", "steps")}
    for key, value in asked.items():
        if value and not config.val_set_size and not config.test_datasets:
            remedy = f"Set val_set_size or test_datasets, or drop {key}."
            yield found((key, "val_set_size", "test_datasets"), "there is nothing to evaluate on", remedy)
    shared = [
        held_out.path
        for held_out in config.test_datasets or ()
        if any(_overlap(held_out, entry) for entry in config.datasets)
    ]
    if shared:
        what = f"{', '.join(sorted(set(shared)))} is trained on as well, so its loss would say nothing"
        yield found(("test_datasets", "datasets"), what, "Hold out another file, or use val_set_size.")
    for key in ("warmup_steps", "warmup_ratio"):
        if config.lr_scheduler == "constant" and getattr(config, key):
            remedy = f"Write lr_scheduler: constant_with_warmup, or {key}: 0."
            yield found((key, "lr_scheduler"), "lr_scheduler: constant has no warm-up", remedy)
    if config.lr_scheduler == "polynomial" and config.learning_rate <= POLYNOMIAL_END:
        what = f"lr_scheduler: polynomial ends at {POLYNOMIAL_END}, which is no lower"
        yield found(("learning_rate", "lr_scheduler"), what, "Raise it, or choose another lr_scheduler.")
    if config.max_steps is not None:
        yield from ignored_within(config, config.max_steps, ("max_steps",))
    yield from schedule_contradictions(config)
    yield from _adapter_contradictions(config)
    yield from _switch_contradictions(config)


def _overlap(one: DatasetConfig, other: DatasetConfig) -> bool:
    """Whether two entries read the same records, or one of them a slice of the other's whole split."""

    def source(entry: DatasetConfig) -> tuple[object, ...]:
        split = (entry.split or "train").partition("[")[0]
        return os.path.realpath(entry.path), entry.name, split, tuple(entry.data_files or ())

    slices = [(entry.split or "train").partition("[")[2] for entry in (one, other)]
    return source(one) == source(other) and (slices[0] == slices[1] or "" in slices)


Found = Iterator[tuple[tuple[str, ...], Problem]]


def _both(config: TrainConfig, one: str, other: str) -> Found:
    if getattr(config, one) is not None and getattr(config, other) is not None:
        yield (one, other), Problem(one, f"given beside {other}", "Keep one of the two.")


TRACKER_KEYS = {
    "wandb": ("wandb_name", "wandb_entity", "wandb_watch", "wandb_run_id", "wandb_log_model"),
    "mlflow": ("mlflow_run_name",),
    "trackio": ("trackio_run_name",),
}


def _tracker_contradictions(config: TrainConfig) -> Found:
    """Settings of a tracker that nothing turns on. (Turned off by ``use_...: false`` they may stay.)"""
    for tracker, keys in TRACKER_KEYS.items():
        switch = f"use_{tracker}"
        if tracker in config.trackers or getattr(config, switch) is False:
            continue
        for key in keys:
            if getattr(config, key) is not None:
                yield (
                    (key, switch),
                    Problem(
                        key,
                        f"given, but nothing is logged to {tracker}",
                        f"Set {switch}: true, or to false to keep the key without effect, or drop it.",
                    ),
                )

    names = config.run_names
    if len(set(names.values())) > 1:
        given = ", ".join(f"{key}: {name}" for key, name in names.items())
        what = f"a run has one name for all trackers, and here are {given}"
        yield tuple(names), Problem(next(iter(names)), what, "Give the same name, or one of them alone.")


def _lora_contradictions(config: TrainConfig) -> Found:
    if config.lora_target_linear and config.lora_target_modules is not None:
        keys: tuple[str, ...] = ("lora_target_linear", "lora_target_modules")
        what = "true means every Linear, and lora_target_modules names some"
        yield keys, Problem(keys[0], what, "Keep one of the two.")
    if config.lora_dropout and config.lora_target_parameters:
        keys = ("lora_dropout", "lora_target_parameters")
        what = f"{config.lora_dropout}, and LoRA on experts' parameters takes no dropout"
        remedy = "Set lora_dropout: 0, or drop lora_target_parameters to train lora_target_modules alone."
        yield keys, Problem(keys[0], what, remedy)
    if config.lora_exclude_modules is not None and config.target_modules == []:
        keys = ("lora_exclude_modules", "lora_target_modules")
        what = "there is nothing to exclude from: lora_target_modules is []"
        yield keys, Problem(keys[0], what, "Drop it; for experts, see lora_target_parameters.")


def _trainer_contradictions(config: TrainConfig) -> Found:
    yield from _both(config, "warmup_ratio", "warmup_steps")
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        adam = "adam" in config.optimizer.replace("grokadam", "") or "ademamix" in config.optimizer
        reads = adam or ("lion" in config.optimizer and key != "adam_epsilon")
        if getattr(config, key) is not None and not reads:
            what = f"optimizer: {config.optimizer} has no such setting"
            yield (key, "optimizer"), Problem(key, what, "Drop it, or choose another optimizer.")
    if config.gradient_checkpointing_kwargs.use_reentrant and not config.gradient_checkpointing:
        key = "gradient_checkpointing_kwargs"
        what = "there is no checkpointing to set"
        yield (
            (key, "gradient_checkpointing"),
            Problem(key, what, "Set gradient_checkpointing: true, or drop it."),
        )
    if (config.chat_template == "jinja") != (config.chat_template_jinja is not None):
        key = "chat_template_jinja" if config.chat_template != "jinja" else "chat_template"
        what = "chat_template: jinja and chat_template_jinja belong together"
        yield ("chat_template", "chat_template_jinja"), Problem(key, what, "Give both, or neither.")
    asked = {
        "flash_attention_2": config.flash_attention,
        "sdpa": config.sdp_attention,
        "flex_attention": config.flex_attention,
        "eager": config.eager_attention,
    }
    keys = dict(zip(asked, ATTENTION_KEYS, strict=True))
    for name, value in asked.items():
        if value and config.attention != name:
            what = f"true, and another key asks for {config.attention}"
            yield (keys[name], "attn_implementation", *ATTENTION_KEYS), Problem(keys[name], what, "Keep one.")


def _interval_contradictions(config: TrainConfig) -> Found:
    yield from _both(config, "evals_per_epoch", "eval_steps")
    yield from _both(config, "saves_per_epoch", "save_steps")
    for kind in ("eval", "save"):
        key, steps, per_epoch = f"{kind}_strategy", f"{kind}_steps", f"{kind}s_per_epoch"
        strategy = getattr(config, key)
        given = [name for name in (steps, per_epoch) if getattr(config, name)]
        if strategy in ("no", "epoch") and given:
            what = f"{strategy} contradicts {given[0]}: {getattr(config, given[0]):g}"
            yield (key, steps, per_epoch), Problem(key, what, "Keep one of the two.")
        elif strategy == "steps" and not given:
            yield (key, steps, per_epoch), Problem(key, "steps, and nothing says how many", f"Set {steps}.")


def ignored_within(
    config: TrainConfig, steps: int, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Settings without effect in a run of ``steps`` steps, decided by the further ``keys``."""
    if config.warmup_steps and config.warmup_steps >= steps:
        what = f"{config.warmup_steps} of {steps} steps: learning_rate would never be reached"
        yield ("warmup_steps", *keys), Problem("warmup_steps", what, "Lower it, or train for more steps.")
    if config.logging_steps > steps:
        what = f"{config.logging_steps}, and the run has {steps}: no loss would be shown"
        yield ("logging_steps", *keys), Problem("logging_steps", what, "Lower it, or train for more steps.")


def _loftq_contradictions(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    if config.peft_init_lora_weights != "loftq":
        return
    key = "peft_init_lora_weights"
    packed = config.quantize_moe_experts is not False
    if not (config.quantized and packed and config.bnb_config_kwargs.get("experts_quant_type") != "none"):
        keys: tuple[str, ...] = (
            key,
            "load_in_4bit",
            "load_in_8bit",
            "quantize_moe_experts",
            "bnb_config_kwargs",
        )
        what = "loftq begins with what packing the experts lost, and they are not packed"
        yield keys, Problem(key, what, "Set load_in_4bit: true (adapter: qlora), or drop this key.")
    if not config.lora_target_parameters:
        what = "loftq is of the experts' adapters, and lora_target_parameters names none"
        keys = (key, "lora_target_parameters")
        yield keys, Problem(key, what, "Set lora_target_parameters: all, or drop this key.")


def _adapter_contradictions(config: TrainConfig) -> Found:
    nothing = config.lora_target_modules == [] and not config.lora_target_parameters
    if nothing and config.lora_model_dir is None:
        both = ("lora_target_modules", "lora_target_parameters")
        what = "[] and no lora_target_parameters: no adapter would be trained"
        yield both, Problem(both[0], what, "Name a target, or drop the key.")
    if config.lora_model_dir is not None and config.peft_init_lora_weights is not True:
        keys: tuple[str, ...] = ("peft_init_lora_weights", "lora_model_dir")
        what = f"{config.peft_init_lora_weights} is how new adapters begin, and lora_model_dir brings its own"
        yield keys, Problem(keys[0], what, "Keep one of the two.")
    if config.loraplus_lr_embedding is not None and config.loraplus_lr_ratio is None:
        keys = ("loraplus_lr_embedding", "loraplus_lr_ratio")
        yield keys, Problem(keys[0], "given without loraplus_lr_ratio", "Set that one too, or drop it.")
    if config.merge_lora and config.peft_init_lora_weights == "loftq":
        keys = ("merge_lora", "peft_init_lora_weights")
        what = "true, and what loftq begins with is right on the packed weights alone"
        remedy = "Set it to false, and see `fourfold merge --base-weights dequantized`."
        yield keys, Problem(keys[0], what, remedy)
    if config.lora_modules_to_save and config.merge_lora:
        keys = ("merge_lora", "lora_modules_to_save")
        what = "true, and whole modules are trained beside the adapter"
        yield keys, Problem(keys[0], what, "Set it to false, and run `fourfold merge` after looking at them.")


def _switch_contradictions(config: TrainConfig) -> Found:
    """Settings of something that another key turns on, and switches that exclude each other."""
    if config.fp16 and config.bf16 is True:
        yield ("fp16", "bf16"), Problem("fp16", "true, and bf16 is true too", "Keep one of the two.")
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if getattr(config, key) is not None and not config.torch_compile:
            what = "given, but nothing is compiled"
            yield (key, "torch_compile"), Problem(key, what, "Set torch_compile: true, or drop it.")
    if config.hub_strategy is not None and config.hub_model_id is None:
        keys: tuple[str, ...] = ("hub_strategy", "hub_model_id")
        yield keys, Problem(keys[0], "given without hub_model_id", "Name the repository, or drop it.")
    if config.early_stopping_patience is not None:
        intervals = ("eval_steps", "evals_per_epoch", "eval_strategy")
        keys = ("early_stopping_patience", "val_set_size", "test_datasets", *intervals)
        never = config.eval_strategy == "no" or 0 in (config.eval_steps, config.evals_per_epoch)
        if never or not (config.val_set_size or config.test_datasets):
            what = "given, but nothing is evaluated during the run"
            yield (
                keys,
                Problem(keys[0], what, "Set val_set_size and eval_steps, or drop it."),
            )
