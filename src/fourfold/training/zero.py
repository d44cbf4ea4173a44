"""DeepSpeed's ZeRO, as far as a configuration says it: ``deepspeed``, a path or a mapping.

Stages 0 to 2: every rank holds the whole packed model, and ranks share gradients (2) and the optimizer's
state (1 and 2) of the adapters. What is given twice, here and in DeepSpeed's file, must agree; what DeepSpeed
would quietly decide by itself where its file is silent (accumulation, clipping, number format) comes from
here. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from fourfold.errors import ConfigurationError
from fourfold.training import processes
from fourfold.training.key_types import Strict
from fourfold.training.yaml_file import Problem, short

if TYPE_CHECKING:
    from fourfold.training.schema import TrainConfig

DEEPSPEED, AUTO = "deepspeed", "auto"
# DeepSpeed's own parts that take the place of what this file says -> what to do.
REPLACED = {
    "optimizer": "Take it out: `optimizer`, `learning_rate` and `weight_decay` say it here.",
    "scheduler": "Take it out: `lr_scheduler` and `warmup_steps` say it here.",
    "tensor_parallel": "Take it out: packed rows cannot be cut.",
    "amp": "Take it out: `bf16` and `fp16` say it here.",
}


def _not_empty(value: Any) -> Any:
    """Nothing is asked for by an empty text or mapping, as by null."""
    return value or None


class DeepSpeedKeys(Strict):
    """DeepSpeed."""

    deepspeed: Annotated[str | dict[str, Any] | None, AfterValidator(_not_empty)] = Field(
        None,
        description="the path of a DeepSpeed configuration (JSON), or a mapping with what would be in it: "
        "ZeRO of stage 1 or 2 shares the optimizer's state among the processes of `torchrun`",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # (no name of a file: too long, or with a null in it)
        return False


def read(config: TrainConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration as it is given; None where there is none.

    Raises:
        ConfigurationError: there is no such file, or it holds no JSON mapping.
    """
    if config.deepspeed is None or isinstance(config.deepspeed, dict):
        return copy.deepcopy(config.deepspeed)
    path = Path(config.deepspeed).expanduser()
    if not _is_file(path):
        raise ConfigurationError(
            f"{DEEPSPEED}: there is no file {path}. Relative paths start at the current directory, "
            f"{Path.cwd()}."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{DEEPSPEED}: {path} holds no JSON ({error}). Mend it.") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{DEEPSPEED}: {path} holds a {type(found).__name__}. Give a mapping.")
    return found


def missing_file(values: Mapping[str, Any]) -> list[Problem]:
    """What `train` says of a file that is not there; `validate` may be asked on another machine."""
    given = values.get(DEEPSPEED)
    if not isinstance(given, str) or not given or _is_file(Path(given).expanduser()):
        return []
    what = f"there is no file {short(given)} (relative paths start at {Path.cwd()})"
    return [Problem(DEEPSPEED, what, "Name one that is there, or write what it says as a mapping.")]


def stage_of(settings: Mapping[str, Any]) -> Any:
    """The stage of ZeRO that a DeepSpeed configuration asks for."""
    zero = settings.get("zero_optimization", {})
    return zero.get("stage", 0) if isinstance(zero, Mapping) else zero


def zero_contradictions(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """What cannot be, and what contradicts other keys. (A file that is not there is told when a run starts:
    `validate` may be asked on another machine.)
    """
    try:
        settings = read(config)
    except ConfigurationError as error:
        if isinstance(config.deepspeed, str) and _is_file(Path(config.deepspeed).expanduser()):
            yield (
                (DEEPSPEED,),
                Problem(DEEPSPEED, str(error).removeprefix(f"{DEEPSPEED}: ").removesuffix(" Mend it."), ""),
            )
        return
    if settings is None:
        return
    stage = stage_of(settings)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        what = f"zero_optimization.stage is {short(str(stage))}"
        yield (DEEPSPEED,), Problem(DEEPSPEED, what, "Set it to 1 or 2.")
    elif stage == 3:
        what = "ZeRO-3: each process would first load the whole packed model, which ZeRO-3 is there to avoid"
        remedy = "Set zero_optimization.stage: 2, or shard the model by FSDP2 (docs/distributed.md)."
        yield (DEEPSPEED,), Problem(DEEPSPEED, what, remedy)
    for part, remedy in REPLACED.items():
        if settings.get(part):
            what = f"{part} takes the place of what this file says"
            yield (DEEPSPEED,), Problem(DEEPSPEED, what, remedy)
    yield from _given_twice(config, settings)
    if config.experts_offload is not None:
        what = "sends every parameter from the first GPU when it starts, and some lie in host memory"
        keys = (DEEPSPEED, "experts_offload")
        yield keys, Problem(DEEPSPEED, what, "Drop one of the two.")


def _given_twice(
    config: TrainConfig, settings: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Numbers that are given here too, and are others there."""
    pairs = {
        "train_micro_batch_size_per_gpu": ("micro_batch_size", config.micro_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
    }
    for name, (key, wanted) in pairs.items():
        given = settings.get(name, AUTO)
        if given != AUTO and given != wanted:
            what = f"{name} is {short(str(given))}, and {key} is {wanted:g}"
            yield (
                (DEEPSPEED, key),
                Problem(DEEPSPEED, what, f'Write "{AUTO}" for {name}, or make the two agree.'),
            )
    for name in ("bf16", "fp16"):
        part = settings.get(name, {})
        enabled = part.get("enabled", AUTO) if isinstance(part, Mapping) else part
        wanted_here = config.bf16 if name == "bf16" else config.fp16
        if enabled != AUTO and wanted_here != AUTO and enabled != wanted_here:
            what = f"{name}.enabled is {short(str(enabled))}, and {name} is {str(wanted_here).lower()}"
            yield (DEEPSPEED, name), Problem(DEEPSPEED, what, f'Write "{AUTO}" for {name}.enabled.')


def trainer_settings(config: TrainConfig) -> dict[str, Any] | None:
    """What the trainer is given: as it is written, and what is not written as this file says it.

    (Absent, DeepSpeed would accumulate over one micro batch, clip nothing, and choose the format itself.)
    """
    settings = read(config)
    if settings is None:
        return None
    settings.setdefault("zero_optimization", {"stage": 0})
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    for name in (*names, "train_batch_size"):
        settings.setdefault(name, AUTO)
    for name in ("bf16", "fp16"):
        settings.setdefault(name, {}).setdefault("enabled", AUTO)
    return settings


def check_start(config: TrainConfig, *, bf16: bool, has_gpu: bool, installed: bool, launched: str) -> None:
    """What a run with DeepSpeed needs of the machine and of how it was started.

    Args:
        config: of the run.
        bf16: whether it computes in bf16.
        has_gpu: whether this process has a GPU.
        installed: whether DeepSpeed can be imported.
        launched: ``ACCELERATE_USE_DEEPSPEED``, which `accelerate launch` sets.

    Raises:
        ConfigurationError: what is missing, and what to do.
    """
    settings = read(config)
    if settings is None:
        if launched.lower() == "true":
            raise ConfigurationError(
                "`accelerate launch` was told to use DeepSpeed, and this file says nothing of it. Name "
                f"DeepSpeed's configuration here ({DEEPSPEED}: zero2.json), and leave it out there."
            )
        return
    if processes.count() == 1:
        raise ConfigurationError(
            f"{DEEPSPEED}: one process has none to share with. Start the run by "
            "`torchrun --nproc_per_node N -m fourfold train`, or drop the key."
        )
    if not installed:
        raise ConfigurationError(f"{DEEPSPEED}: DeepSpeed is not installed: pip install deepspeed")
    if not has_gpu:
        raise ConfigurationError(
            f"{DEEPSPEED}: there is no GPU, and accelerate starts DeepSpeed on GPUs alone. Drop the key."
        )
    part = settings.get("bf16", {})
    enabled = part.get("enabled", AUTO) if isinstance(part, Mapping) else part
    if enabled not in (AUTO, bf16):
        raise ConfigurationError(
            f"{DEEPSPEED}: bf16.enabled is {str(enabled).lower()}, and this run computes in "
            f'{"bf16" if bf16 else "fp32 or fp16"}. Write "{AUTO}" for it, or set bf16.'
        )
