"""Keys of the adapters: what is trained, and how it begins."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fourfold.training.key_types import (
    BelowOne,
    Names,
    NamesOrPattern,
    OneOrMore,
    PathText,
    Positive,
    PositiveFloat,
    Rank,
    Ranks,
    Share,
    Strict,
    not_number,
)

Start = Annotated[Literal[True, "gaussian", "loftq"], BeforeValidator(not_number)]


class AdapterKeys(Strict):
    """What is trained."""

    lora_r: Rank = Field(8, description="a positive whole number")
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
        None,
        description="a list of parameter names, such as [mlp.experts.gate_up_proj, mlp.experts.down_proj], "
        "or `all`: each projection of the experts; absent or [] means none, so experts are not trained",
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

    peft_init_lora_weights: Start = Field(
        True,
        description="true or `gaussian` (begin with no change), or `loftq` (begin with what packing lost)",
    )
    lora_modules_to_save: Names | None = Field(
        None,
        description="a list of names of modules to train as a whole, such as embed_tokens, lm_head, or a "
        "router (mlp.gate); never one that is held in 4 or 8 bit",
    )
    lora_model_dir: PathText | None = Field(
        None,
        description="the folder of an adapter to go on with; its own settings hold, and lora_* keys that are "
        "given have to agree",
    )
    loraplus_lr_ratio: PositiveFloat | None = Field(
        None, description="LoRA+: how many times learning_rate the factors B are trained with"
    )
    loraplus_lr_embedding: PositiveFloat | None = Field(
        None, description="LoRA+: the rate of adapters on embeddings; absent means 1e-6"
    )
    router_aux_loss_coef: Share | None = Field(
        None,
        description="the weight in the loss of the model's own term that balances its experts; absent or 0 "
        "leaves it out",
    )
