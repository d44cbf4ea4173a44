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

# Those of the trainer's optimizers that need no package beside bitsandbytes; the last two need torchao.
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
    "adamw_torch_4bit",
    "adamw_torch_8bit",
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
    """A mapping of known keys; a null is the key's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


def not_bool(value: Any) -> Any:
    """Refuse true and false."""
    # pydantic reads `true` as the number 1; in a file of settings that is a slip of the pen.
    if isinstance(value, bool):
        raise ValueError("is true or false, where a number belongs")
    return value


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


Positive = Annotated[int, Field(gt=0), BeforeValidator(not_bool)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(not_bool)]
Count = Annotated[int, Field(ge=0), BeforeValidator(not_bool)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(not_bool)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(not_bool)]
Text = Annotated[str, Field(min_length=1)]
# `~` is the home directory, as in a shell; expanded here and nowhere else.
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Names = list[Text]
NamesOrPattern = Names | Annotated[Text, AfterValidator(_pattern)]
OneOrMore = Annotated[list[Text], BeforeValidator(_one_is_a_list)]
Ranks = dict[Annotated[Text, AfterValidator(_pattern)], Positive]
Strategy = Annotated[Literal["no", "epoch", "steps"], BeforeValidator(_no_is_false)]
