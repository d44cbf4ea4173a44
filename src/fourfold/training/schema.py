"""The keys of ``fourfold train``'s YAML file, with axolotl's names and meaning.

Each key does something or is refused; settings that contradict each other are errors, never silently
resolved; a null is the key's default. ``load_config`` reads a file and lists every problem at once: key,
line, what, remedy. Imports neither torch nor transformers: a file is validated in well under a second.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fourfold.errors import ConfigurationError
from fourfold.training.contradictions import ContradictionError, contradictions
from fourfold.training.yaml_file import (
    KeyPath,
    Problem,
    YamlFile,
    apply_overrides,
    dotted,
    nearest,
    read_yaml,
)

# Those of the trainer's optimizers that need no further package.
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "adafactor",
    "sgd",
]
Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]


def _not_bool(value: Any) -> Any:
    # pydantic reads `true` as the number 1; in a file of settings that is a slip of the pen.
    if isinstance(value, bool):
        raise ValueError("is true or false, where a number belongs")
    return value


Positive = Annotated[int, BeforeValidator(_not_bool), Field(gt=0)]
PositiveFloat = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Share = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, allow_inf_nan=False)]
# `~` is the home directory, as in a shell; expanded here and nowhere else.
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


class DatasetConfig(_Strict):
    """One file of conversations.

    A record may hold whatever else says something about it (an id, its source); fields that would change the
    conversation (``tools`` and the like, see ``records.CHANGES_CONVERSATION``) are refused, and so is
    anything in a turn but ``role``, ``content`` and ``weight`` (0: the answer is shown, not trained).
    """

    path: PathText = Field(description="the path of a local .jsonl or .json file")
    type: Literal["chat_template"] = Field("chat_template", description="`chat_template`")
    field_messages: str = Field("messages", min_length=1, description="the name of the field with the turns")


class TrainConfig(_Strict):
    """A training run. Field names are the YAML keys; see ``load_config``."""

    base_model: PathText = Field(description="a folder, or a model's id on the hub")
    adapter: Literal["qlora", "lora"] = Field(description="`qlora` (with load_in_4bit) or `lora`")
    load_in_4bit: bool = Field(False, description="true or false")
    load_in_8bit: bool = Field(False, description="true or false")
    quantize_moe_experts: bool | None = Field(
        None, description="true or false; absent means true wherever load_in_4bit or load_in_8bit is"
    )
    bnb_config_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="a mapping of quantization settings"
    )

    lora_r: Positive = Field(8, description="a positive whole number")
    lora_alpha: Positive = Field(16, description="a positive whole number")
    lora_target_modules: list[str] | None = Field(
        None, description="a list of module names; absent means the attention projections, [] none"
    )
    lora_target_parameters: list[str] | None = Field(
        None, description="a list of parameter names; absent means the experts' projections, [] none"
    )

    peft_init_lora_weights: Literal[True, "gaussian", "loftq"] = Field(
        True,
        description="true or `gaussian` (begin with no change), or `loftq` (begin with what packing lost)",
    )

    datasets: list[DatasetConfig] = Field(
        min_length=1, description="a list of entries with `path` and `type`"
    )
    test_datasets: list[DatasetConfig] | None = Field(
        None, min_length=1, description="a list of entries as in datasets, held out for evaluation"
    )
    val_set_size: Share = Field(
        0.0,
        description="a fraction below 1 or a whole number of examples to hold out of datasets; 0 for none",
    )
    sequence_len: Annotated[int, BeforeValidator(_not_bool), Field(ge=8)] = Field(
        512, description="a whole number of tokens, at least 8; longer ones: see excess_length_strategy"
    )
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop",
        description="`drop`, `truncate` or `raise`: what becomes of examples longer than sequence_len",
    )

    micro_batch_size: Positive = Field(1, description="a positive whole number of examples")
    gradient_accumulation_steps: Positive = Field(1, description="a positive whole number")
    max_steps: Positive | None = Field(
        None, description="a positive whole number; takes precedence over num_epochs"
    )
    num_epochs: PositiveFloat = Field(1.0, description="a positive number")
    learning_rate: PositiveFloat = Field(2e-4, description="a positive number")
    lr_scheduler: Scheduler = Field("cosine", description="the name of a schedule")
    warmup_steps: Count | None = Field(
        None, description="a whole number, less than the steps of the run; absent means 3 % of them"
    )
    optimizer: Optimizer = Field("adamw_torch_fused", description="the name of an optimizer")
    bf16: bool | Literal["auto"] = Field(
        "auto", description="true, false or auto (true where a GPU supports it)"
    )
    gradient_checkpointing: bool = Field(False, description="true or false")

    logging_steps: Positive = Field(
        1, description="a positive whole number of steps, no more than the run has"
    )
    eval_steps: Share | None = Field(
        None,
        description="a whole number of steps, or a fraction of the run; absent means each epoch, 0 never",
    )
    save_steps: Share | None = Field(
        None,
        description="a whole number of steps, or a fraction of the run; absent means each epoch, 0 never",
    )
    output_dir: PathText = Field("./model-out", description="the folder for checkpoints and the adapter")
    # numpy, which the trainer seeds as well, takes no more than 32 bits.
    seed: Annotated[int, BeforeValidator(_not_bool), Field(ge=0, lt=2**32)] = Field(
        42, description="a whole number below 2**32"
    )
    resume_from_checkpoint: bool | PathText = Field(
        False,
        description="true (the last checkpoint in output_dir), false, or a checkpoint's folder; the settings "
        "that decide batches and adapters must be those it was written with",
    )

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        found = list(contradictions(self))
        if found:
            raise ContradictionError(found)
        return self

    @property
    def quantized(self) -> bool:
        """Whether the base model is held in 4 or 8 bit."""
        return self.load_in_4bit or self.load_in_8bit

    def quantization_kwargs(self) -> dict[str, Any] | None:
        """Arguments for ``MoeBitsAndBytesConfig``, or None where nothing is to be quantized.

        4 bit means NF4 with double quantization unless ``bnb_config_kwargs`` says otherwise.
        """
        if not self.quantized:
            return None
        settings: dict[str, Any] = {"load_in_8bit": True}
        if self.load_in_4bit:
            settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        if self.quantize_moe_experts is False:
            settings["experts_quant_type"] = "none"
        return {**settings, **self.bnb_config_kwargs}


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read and validate a YAML file; relative paths in it are relative to the current directory.

    Args:
        path: the file.
        overrides: ``key=value`` pairs that replace what the file says; dotted keys reach inside.

    Raises:
        ConfigurationError: lists every problem: line, key, what is wrong, how to mend it.
    """
    parsed = read_yaml(path)
    overridden = apply_overrides(parsed, overrides or ())
    problems = list(parsed.problems)
    config, errors = _validate(parsed.values)
    problems += [_placed(error, parsed, overridden) for _, error in errors]
    if errors:
        # Contradictions are looked for only once each value is sound. Look again without the unsound ones, so
        # that the whole list shows at once; what involves an unsound key is left out, its default proves
        # nothing.
        unsound = {loc[0] for loc, _ in errors if loc}
        sound = {key: value for key, value in parsed.values.items() if key not in unsound}
        sound = {"base_model": "-", "adapter": "lora", "datasets": [{"path": "-"}], **sound}
        problems += [
            _placed(problem, parsed, overridden)
            for keys, problem in _contradictions_among(sound)
            if not unsound.intersection(keys) and str(problem) not in {str(error) for _, error in errors}
        ]
    if problems or config is None:
        problems.sort(key=lambda problem: (not problem.where, len(problem.where), problem.where))  # by line
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigurationError(f"{path}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def _validate(values: Mapping[str, Any]) -> tuple[TrainConfig | None, list[tuple[KeyPath, Problem]]]:
    try:
        return TrainConfig.model_validate(values), []
    except ValidationError as error:
        problems: list[tuple[KeyPath, Problem]] = []
        seen: set[KeyPath] = set()
        for item in error.errors():
            original = item.get("ctx", {}).get("error")
            if isinstance(original, ContradictionError):
                problems += [((), problem) for _, problem in original.found]
                continue
            path = _key_path(item["loc"], values)
            if path not in seen:  # a union reports each of its members
                problems.append((path, _explain(path, item)))
            seen.add(path)
        return None, problems


def _contradictions_among(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Problem]]:
    try:
        TrainConfig.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            original = item.get("ctx", {}).get("error")
            if isinstance(original, ContradictionError):
                return original.found
    return []


def _key_path(loc: tuple[int | str, ...], values: Any) -> KeyPath:
    """pydantic's location without the names of union members, which are no keys of the file."""
    path: list[int | str] = []
    for index, part in enumerate(loc):
        in_mapping = isinstance(values, Mapping) and (part in values or index == len(loc) - 1)
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not (in_mapping or in_list):
            continue
        path.append(part)
        values = values.get(part) if isinstance(values, Mapping) else values[part]
    return tuple(path)


def _explain(path: KeyPath, item: Mapping[str, Any]) -> Problem:
    """One pydantic error as a problem."""
    model: type[BaseModel] = DatasetConfig if len(path) > 1 and "dataset" in str(path[0]) else TrainConfig
    name = str(path[-1]) if path else "configuration"
    key = dotted(path) or name
    if item["type"] == "extra_forbidden":
        return Problem(key, "unknown key", nearest(name, model.model_fields))
    wanted = next(
        (
            model.model_fields[str(part)].description
            for part in reversed(path)
            if str(part) in model.model_fields
        ),
        "a mapping of keys to values",
    )
    if item["type"] == "missing":
        return Problem(key, "missing", f"Give {wanted}.")
    given = item["input"]
    if item["type"] == "literal_error":
        return Problem(key, f"{given!r} is not one of {item['ctx']['expected']}", f"Give {wanted}.")
    reason = str(item.get("ctx", {}).get("error") or item["msg"].removeprefix("Input "))
    shown = repr(given)
    return Problem(key, f"{shown if len(shown) < 60 else shown[:57] + '...'} {reason}", f"Give {wanted}.")


def _placed(problem: Problem, parsed: YamlFile, overridden: set[KeyPath]) -> Problem:
    """The problem with its line, or the nearest enclosing key's; or with "command line"."""
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in problem.key.split("."))
    if any(path[: len(override)] == override or override[: len(path)] == path for override in overridden):
        return Problem(problem.key, problem.what, problem.remedy, "command line")
    while path and path not in parsed.lines:
        path = path[:-1]
    where = f"line {parsed.lines[path]}" if path else ""
    return Problem(problem.key, problem.what, problem.remedy, where)
