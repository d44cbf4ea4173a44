"""Types of the values in a configuration file, and how a value that is known but not built is refused.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fourfold.training.yaml_file import short

# Those of the trainer's optimizers that train adapters; which packages they need is in remarks.py.
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
    "adagrad",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "stable_adamw",
    "grokadamw",
    "adamw_anyprecision",
]
# Made for whole matrices, for other devices, or with another state for evaluations than for training; and
# some that other trainers bring.
NOT_YET_OPTIMIZERS = (
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "lomo",
    "adalomo",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "optimi_adamw",
    "ao_adamw_4bit",
    "ao_adamw_8bit",
    "ao_adamw_fp8",
    "adopt_adamw",
    "came_pytorch",
    "muon",
    "dion",
)
Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
NOT_YET_SCHEDULERS = ("reduce_lr_on_plateau", "greedy", "one_cycle", "rex")
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


class NotYetError(ValueError):
    """A value with a meaning that Fourfold does not have yet.

    Attributes:
        what: what is missing, without a full stop.
        remedy: what to write meanwhile.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"not yet: {what}. {remedy}")
        self.what, self.remedy = what, remedy


class Strict(BaseModel):
    """A mapping of known keys; a null is the key's default.

    Strict: each value is of its own type, as the JSON Schema says. (Read loosely, `yes` in quotes is true, a
    text of digits a number, and bytes a text.)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


# YAML 1.1 reads 1e-3 as text (it wants 1.0e-3), and people's files are full of them.
EXPONENT = r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"


def not_bool(value: Any) -> Any:
    """Refuse true and false; read 8.0 as the whole number that it is."""
    # bool is a kind of int to Python; in a file of settings `true` for 1 is a slip of the pen.
    if isinstance(value, bool):
        raise ValueError("is true or false, where a number belongs")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def not_number(value: Any) -> Any:
    """Refuse numbers where true is one of the choices: to Python 1 is equal to it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError("is a number, where none belongs")
    return value


def number(value: Any) -> Any:
    """Refuse true and false; read a text such as 1e-3 as a number."""
    if isinstance(value, bool):
        raise ValueError("is true or false, where a number belongs")
    if isinstance(value, int) and abs(value) > 10**300:  # (no float holds it)
        raise ValueError("is too large for a number")
    return float(value) if isinstance(value, str) and re.match(EXPONENT, value) else value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression ({error})") from None
    return value


def _one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _no_is_false(value: Any) -> Any:
    # YAML 1.1 reads an unquoted `no` as false.
    return "no" if value is False else value


def false_is_none(value: Any) -> Any:
    """Read false as nothing."""
    return None if value is False else value


def only(allowed: tuple[str, ...], remedy: str, known: tuple[str, ...] | None = None) -> BeforeValidator:
    """Refuse, as "not yet", any string but ``allowed``; with ``known``, only those, and others are wrong."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in allowed and (known is None or value in known):
            raise NotYetError(f"`{short(value)}`", remedy)
        return value

    return BeforeValidator(check)


def refuse_yet(test: Callable[[Any], bool], what: str, remedy: str) -> BeforeValidator:
    """Refuse, as "not yet", values for which ``test`` holds."""

    def check(value: Any) -> Any:
        if test(value):
            raise NotYetError(what, remedy)
        return value

    return BeforeValidator(check)


# What 32 bits hold: nothing that is counted here comes near it, and libraries count in them.
MOST = 2**31 - 1
Positive = Annotated[int, Field(gt=0, le=MOST), BeforeValidator(not_bool)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(number)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(number)]
Epochs = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False), BeforeValidator(number)]
Count = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(not_bool)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(number)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(number)]
# No weight matrix of a model has more rows or columns.
Rank = Annotated[int, Field(gt=0, le=65536), BeforeValidator(not_bool)]
Text = Annotated[str, Field(min_length=1)]
# `~` is the home directory, as in a shell; expanded here and nowhere else.
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Names = list[Text]
NamesOrPattern = Names | Annotated[Text, AfterValidator(_pattern)]
OneOrMore = Annotated[list[Text], BeforeValidator(_one_is_a_list)]
Ranks = dict[Annotated[Text, AfterValidator(_pattern)], Rank]
Strategy = Annotated[Literal["no", "epoch", "steps"], BeforeValidator(_no_is_false)]
