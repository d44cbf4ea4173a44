"""Checkpoints to resume from: which one is meant, that it is whole, and that the run goes on as it began.

A resumed run must see the batches that an uninterrupted one would have seen, with the adapters and the
optimizer's state it was written with. transformers keeps its own arguments in a pickle, which is never read;
``run.json``, written beside it, holds what has to agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fourfold.errors import ConfigurationError
from fourfold.training.schema import TrainConfig

RUN_FILE = "run.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", RUN_FILE)
# Batches, the optimizer's state and the adapters hang on these. From learning_rate on: the stored state
# brings its own, so that another one in the file would be ignored.
FIXED = (
    "adapter",
    "load_in_4bit",
    "load_in_8bit",
    "quantize_moe_experts",
    "bnb_config_kwargs",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_exclude_modules",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "peft_use_rslora",
    "peft_init_lora_weights",
    "sequence_len",
    "excess_length_strategy",
    "sample_packing",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
)
Settings = dict[str, Any]


def run_settings(
    config: TrainConfig, modules: list[str] | str, parameters: list[str], bf16: bool, digest: str
) -> Settings:
    """What has to be the same when a run is resumed, as JSON holds it.

    Args:
        config: of the run.
        modules: its LoRA targets among the modules, given or found.
        parameters: those among the parameters.
        bf16: whether it computes in bf16.
        digest: of the tokenized training data.
    """
    values, base = config.model_dump(), Path(config.base_model)
    settings = {key: values[key] for key in FIXED}
    settings |= {
        "lora_target_modules": modules if isinstance(modules, str) else sorted(modules),
        "lora_target_parameters": sorted(parameters),
        "base_model": str(base.resolve()) if base.exists() else config.base_model,
        "bf16": bf16,
        "datasets": digest,
    }
    result: Settings = json.loads(json.dumps(settings, default=str))
    return result


class RunFile(TrainerCallback):
    """Writes ``run.json`` into each checkpoint, and remembers which were written.

    Attributes:
        steps: the steps at which a checkpoint was written, the one resumed from included.
    """

    def __init__(self, settings: Settings, resumed_at: int | None = None) -> None:
        self.settings = settings
        self.steps = [] if resumed_at is None else [resumed_at]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / RUN_FILE).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        self.steps.append(state.global_step)


def find_checkpoint(config: TrainConfig) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means; its own settings are not looked at yet.

    Raises:
        ConfigurationError: there is none, it is damaged, or nothing is left to train.
    """
    wanted: bool | str = config.resume_from_checkpoint
    automatic = wanted is False and config.auto_resume_from_checkpoints
    if wanted is False and not automatic:
        return None
    if wanted is True or automatic:
        steps = [
            (int(path.name.removeprefix("checkpoint-")), path)
            for path in Path(config.output_dir).glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdigit() and (path / "trainer_state.json").is_file()
        ]
        if not steps and automatic:
            return None
        if not steps:
            raise ConfigurationError(
                f"resume_from_checkpoint: true, but {config.output_dir} holds no checkpoint. "
                "Set it to false to start anew, or name a checkpoint's folder."
            )
        wanted = str(max(steps)[1])
    wanted = str(wanted)
    folder = Path(wanted)
    if not (folder / "trainer_state.json").is_file():
        raise ConfigurationError(
            f"resume_from_checkpoint: {wanted} is no checkpoint of a run (it has no trainer_state.json). "
            "Name a folder such as output_dir/checkpoint-20."
        )
    state = _read(folder / "trainer_state.json")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ConfigurationError(
            f"resume_from_checkpoint: {wanted} has no {', '.join(missing)}, so it is no whole checkpoint of "
            "`fourfold train`. Name an earlier one."
        )
    step, epoch = state.get("global_step"), state.get("epoch")
    if not isinstance(step, int) or not isinstance(epoch, (int, float)):
        raise _damaged(folder / "trainer_state.json", "it has no global_step or no epoch")
    if config.max_steps is not None and step >= config.max_steps:
        raise ConfigurationError(
            f"resume_from_checkpoint: {wanted} is at step {step} of {config.max_steps} already: nothing is "
            "left to train. Raise max_steps."
        )
    if config.max_steps is None and epoch >= config.num_epochs - 1e-6:
        raise ConfigurationError(
            f"resume_from_checkpoint: {wanted} is at epoch {epoch:g} of {config.num_epochs:g} already: "
            "nothing is left to train. Raise num_epochs."
        )
    return wanted


def step_of(checkpoint: str) -> int:
    """How many steps led to a checkpoint that ``find_checkpoint`` has found."""
    return int(_read(Path(checkpoint) / "trainer_state.json")["global_step"])


def check_unchanged(checkpoint: str, settings: Settings) -> None:
    """The settings of a run that resumes must be those of the checkpoint.

    Args:
        checkpoint: its folder.
        settings: from ``run_settings``; some of them suffice, for an early check of those known at once.

    Raises:
        ConfigurationError: names each that differs, with both values.
    """
    stored = _read(Path(checkpoint) / RUN_FILE)
    changed = [
        "datasets (not the same tokens)" if key == "datasets" else f"{key} ({_stored(stored, key)} there)"
        for key, value in settings.items()
        if _stored(stored, key) != value
    ]
    if changed:
        raise ConfigurationError(
            f"resume_from_checkpoint: {checkpoint} was written with other settings: {', '.join(changed)}. "
            "Set them as they were, or start anew with resume_from_checkpoint: false and another output_dir."
        )


def _stored(settings: Settings, key: str) -> Any:
    """A setting of a checkpoint; of one that is older than the setting, what it was without being one."""
    field = TrainConfig.model_fields.get(key)
    return settings.get(key, None if field is None else field.default)


def fixed_settings(config: TrainConfig) -> Settings:
    """Those of ``run_settings`` that stand in the configuration itself."""
    settings = run_settings(config, [], [], False, "")
    return {key: settings[key] for key in FIXED}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, "it is no mapping")
    return value


def _damaged(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"resume_from_checkpoint: {path} is damaged ({why}): the run may have been stopped while writing it. "
        "Delete that checkpoint, or name an earlier one."
    )
