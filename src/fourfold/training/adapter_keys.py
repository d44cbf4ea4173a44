"""Keys of the adapters: what is trained, and how it begins."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fourfold.training.key_types import BelowOne, NamesOrPattern, OneOrMore, Positive, Ranks, Strict


class AdapterKeys(Strict):
    """What is trained."""

    lora_r: Positive = Field(8, description="a positive whole number")
    lora_alpha: Positive = Field(16, description="a positive whole number")
    lora_dropout: BelowOne = Field(
        0.0, description="a fraction below 1, on lora_target_modules; experts take none"
    )
    lora_target_modules: NamesOrPattern | None = Field(
        None,
        description="a list of module names, or a regular expression of whole names; absent means the "
        "attention projections, [] none",
    )
    lora_target_linear: bool = Field(
        False, description="true: every Linear but the head, instead of lora_target_modules"
    )
    lora_target_parameters: OneOrMore | None = Field(
        None, description="a list of parameter names; absent means the experts' projections, [] none"
    )
    lora_exclude_modules: NamesOrPattern | None = Field(
        None, description="module names, or a regular expression: not to be wrapped though a target"
    )
    lora_rank_pattern: Ranks | None = Field(
        None, description="a mapping of names (regular expressions) to ranks other than lora_r"
    )
    lora_alpha_pattern: Ranks | None = Field(
        None, description="a mapping of names (regular expressions) to alphas other than lora_alpha"
    )
    peft_use_rslora: bool = Field(False, description="true: updates scaled by alpha / sqrt(r), not alpha / r")

    peft_init_lora_weights: Literal[True, "gaussian", "loftq"] = Field(
        True,
        description="true or `gaussian` (begin with no change), or `loftq` (begin with what packing lost)",
    )
