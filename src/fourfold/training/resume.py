"""Checkpoints to resume from: which one is meant, that it is whole, and that the run goes on as it began.

A resumed run must see the batches that an uninterrupted one would have seen, with the adapters and the
optimizer's state it was written with. transformers keeps its own arguments in a pickle, which is never read;
``run.json``, written beside it, holds what has to agree.

``run.json`` is also the mark of a whole checkpoint: it is written last, in one step, and names each file with
its size. A run that is killed while it writes leaves a folder without it, which nothing resumes from, and the
older checkpoints are deleted only afterwards.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from fourfold.errors import ConfigurationError
from fourfold.training import processes
from fourfold.training.fsdp_keys import sharding
from fourfold.training.schema import TrainConfig
from fourfold.training.zero import DEEPSPEED, stage_of, trainer_settings

RUN_FILE, STATE_FILE = "run.json", "trainer_state.json"
FILES = "files"
SHARDS = "shards"  # (of a sharded run: its adapters' and its optimizer's, a file for each process)
# The optimizer's state, or DeepSpeed's note of the folder in which every process has written its part.
OPTIMIZER, PARTS_OF_IT = "optimizer.pt", "latest"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "scheduler.pt", RUN_FILE)
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
    "lora_modules_to_save",
    "lora_model_dir",
    "loraplus_lr_ratio",
    "loraplus_lr_embedding",
    "router_aux_loss_coef",
    "neftune_noise_alpha",
    "fp16",
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
BATCH = ("micro_batch_size", "gradient_accumulation_steps")
# How many processes share a step: a batch is that many micro batches.
PROCESSES = "processes (torchrun --nproc_per_node)"
SHARDED = "fsdp_version (sharded)"
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
    zero = trainer_settings(config)
    stage = None if zero is None else stage_of(zero)  # (of the optimizer's parts)
    settings = {key: values[key] for key in FIXED}
    settings |= {
        "lora_target_modules": modules if isinstance(modules, str) else sorted(modules),
        "lora_target_parameters": sorted(parameters),
        "base_model": str(base.resolve()) if base.exists() else config.base_model,
        "bf16": bf16,
        "datasets": digest,
        PROCESSES: processes.count(),
        SHARDED: sharding(config) is not None,
        DEEPSPEED: stage,
    }
    result: Settings = json.loads(json.dumps(settings, default=str))
    return result


def commit(folder: Path, settings: Settings) -> None:
    """Mark a checkpoint as whole: ``run.json``, with the sizes of all that lies there."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / RUN_FILE
    }
    text = json.dumps({**settings, FILES: files}, indent=2) + "\n"
    unfinished = folder / f"{RUN_FILE}.part"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, folder / RUN_FILE)


def keep_newest(output: Path, limit: int | None) -> None:
    """Delete the checkpoints that were written before the newest ``limit`` whole ones."""
    if limit is None:
        return
    whole = [path for _, path in checkpoints(output) if (path / RUN_FILE).is_file()]
    newest = sorted(whole, key=lambda path: (path / RUN_FILE).stat().st_mtime_ns)
    for path in newest[: max(0, len(newest) - limit)]:
        (path / RUN_FILE).unlink()  # first: killed here, it is no whole checkpoint any more
        shutil.rmtree(path, ignore_errors=True)


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of whatever is called a checkpoint, by step."""
    found = []
    for path in output.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and step.isascii() and path.is_dir():
            found.append((int(step), path))
    return sorted(found)


def find_checkpoint(config: TrainConfig) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means; its own settings are not looked at yet.

    ``auto_resume_from_checkpoints`` means the last one that is whole, if any, whatever a killed run left
    beside it; that of a run which is over is taken too (see ``is_over``).

    Raises:
        ConfigurationError: there is none, it is damaged, or nothing is left to train.
    """
    wanted: bool | str = config.resume_from_checkpoint
    if wanted is False and config.auto_resume_from_checkpoints:
        for _, folder in reversed(checkpoints(Path(config.output_dir))):
            if _trouble(folder) is None:
                return str(folder)
        return None
    if wanted is False:
        return None
    if wanted is True:
        begun = [path for _, path in checkpoints(Path(config.output_dir)) if (path / STATE_FILE).is_file()]
        if not begun:
            raise ConfigurationError(
                f"resume_from_checkpoint: true, but {config.output_dir} holds no checkpoint. "
                "Set it to false to start anew, or name a checkpoint's folder."
            )
        wanted = str(begun[-1])
    wanted = str(wanted)
    trouble = _trouble(Path(wanted))
    if trouble is not None:
        raise trouble
    if is_over(config, wanted):
        state = _read(Path(wanted) / STATE_FILE)
        step, epoch = state["global_step"], state["epoch"]
        if config.max_steps is not None:
            where, key = f"step {step} of {config.max_steps}", "max_steps"
        else:
            where, key = f"epoch {epoch:g} of {config.num_epochs:g}", "num_epochs"
        raise ConfigurationError(
            f"resume_from_checkpoint: {wanted} is at {where} already: nothing is left to train. Raise {key}."
        )
    return wanted


def is_over(config: TrainConfig, checkpoint: str) -> bool:
    """Whether the run ends where the checkpoint was written."""
    state = _read(Path(checkpoint) / STATE_FILE)
    if config.max_steps is not None:
        return bool(state["global_step"] >= config.max_steps)
    return bool(state["epoch"] >= config.num_epochs - 1e-6)


def _trouble(folder: Path) -> ConfigurationError | None:
    """Why a checkpoint cannot be resumed from; None where it is whole."""
    if not (folder / STATE_FILE).is_file():
        return ConfigurationError(
            f"resume_from_checkpoint: {folder} is no checkpoint of a run (it has no {STATE_FILE}). "
            "Name a folder such as output_dir/checkpoint-20."
        )
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    written = (OPTIMIZER, PARTS_OF_IT, f"{SHARDS}/checkpoint.json")
    if not any((folder / name).is_file() for name in written):
        missing.append(OPTIMIZER)
    if missing:
        return ConfigurationError(
            f"resume_from_checkpoint: {folder} has no {', '.join(missing)}, so it is no whole checkpoint of "
            "`fourfold train`. Name an earlier one."
        )
    try:
        state, stored = _read(folder / STATE_FILE), _read(folder / RUN_FILE)
    except ConfigurationError as error:
        return error
    if not isinstance(state.get("global_step"), int) or not isinstance(state.get("epoch"), (int, float)):
        return _damaged(folder / STATE_FILE, "it has no global_step or no epoch")
    sizes = stored.get(FILES)
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return _damaged(path, "it is gone or cut short")
    return None


def step_of(checkpoint: str) -> int:
    """How many steps led to a checkpoint that ``find_checkpoint`` has found."""
    return int(_read(Path(checkpoint) / STATE_FILE)["global_step"])


def check_unchanged(checkpoint: str, settings: Settings) -> None:
    """The settings of a run that resumes must be those of the checkpoint.

    Args:
        checkpoint: its folder.
        settings: from ``run_settings``; some of them suffice, for an early check of those known at once.

    Raises:
        ConfigurationError: names each that differs, with both values.
    """
    stored = _read(Path(checkpoint) / RUN_FILE)
    stored.setdefault(PROCESSES, 1)  # (older ones were of one process)
    stored.setdefault(SHARDED, False)
    if stored[SHARDED] and settings.get(SHARDED, True) and _batch(stored) == _batch(settings):
        settings = {key: value for key, value in settings.items() if key not in (*BATCH, PROCESSES)}
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


def _batch(settings: Settings) -> int:
    """Rows of a step over all processes: shards are cut anew for another number of them."""
    return math.prod(int(settings[key]) for key in BATCH) * int(settings.get(PROCESSES, processes.count()))


def _stored(settings: Settings, key: str) -> Any:
    """A setting of a checkpoint; of one that is older than the setting, what it was without being one."""
    field = TrainConfig.model_fields.get(key)
    if key in settings or field is None:
        return settings.get(key)
    return field.get_default(call_default_factory=True)


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


def first_line(error: BaseException) -> str:
    """Of an exception's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
