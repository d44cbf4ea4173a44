"""The keys of ``fourfold train``'s YAML file, with axolotl's names and meaning.

Each key does something or is refused; settings that contradict each other are errors, never silently
resolved; a null is the key's default. Keys that are given differently, or not yet, are in ``other_keys.py``;
``read_config.py`` reads a file. Imports neither torch nor transformers: a file is validated in well under a
second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fourfold.training.adapter_keys import AdapterKeys
from fourfold.training.contradictions import ContradictionError, contradictions
from fourfold.training.key_types import (
    OneOrMore,
    PathText,
    Share,
    Strict,
    Text,
    not_bool,
    only,
)
from fourfold.training.model_keys import ModelKeys
from fourfold.training.run_keys import RunKeys
from fourfold.training.templates import TEMPLATES
from fourfold.training.tracker_keys import TrackerKeys

# Who speaks, by the words for it in common files; `roles` replaces the table.
Role = Literal["system", "user", "assistant", "tool"]
ROLES: dict[Role, list[str]] = {
    "system": ["system"],
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt"],
    "tool": ["tool"],
}
DATASET_TYPES = (
    "chat_template",
    "alpaca",
    "alpaca_chat",
    "completion",
    "sharegpt",
    "input_output",
    "context_qa",
    "pretrain",
    "chat_template.default",
    "chat_template.argilla",
)


class Turn(Strict):
    """What a turn's fields are called in a file."""

    role: Text = Field("role", description="the field that says who speaks")
    content: Text = Field("content", description="the field with the text")


class DatasetConfig(Strict):
    """Conversations: a file, a folder of files, or a dataset on the hub.

    A record may hold whatever else says something about it (an id, its source); fields that would change the
    conversation (``tools`` and the like, see ``records.CHANGES_CONVERSATION``) are refused, and so is
    anything in a turn but ``role``, ``content`` and ``weight`` (0: the answer is shown, not trained).
    """

    path: PathText = Field(
        description="a local file (.jsonl, .json, .parquet), a folder, or a dataset's id on the hub"
    )
    type: Annotated[
        Literal["chat_template"],
        only(("chat_template",), "Write conversations, and type: chat_template.", DATASET_TYPES),
    ] = Field("chat_template", description="`chat_template`")
    name: Text | None = Field(None, description="the name of the hub dataset's configuration")
    split: Text | None = Field(
        None, description="a split, or a slice of one, such as train[:20%]; absent means train"
    )
    data_files: OneOrMore | None = Field(None, description="a file, or a list of files, within `path`")
    ds_type: Literal["json", "parquet", "arrow"] | None = Field(
        None, description="`json`, `parquet` or `arrow`, where a file's name does not say"
    )
    revision: Text | None = Field(None, description="a branch, tag or commit of a dataset on the hub")
    field_messages: str = Field("messages", min_length=1, description="the name of the field with the turns")
    message_property_mappings: Turn = Field(
        default_factory=lambda: Turn.model_validate({}),
        description="a mapping of role and content to the turns' own fields, such as {role: from}",
    )
    roles: dict[Role, OneOrMore] = Field(
        default_factory=lambda: ROLES,
        description="a mapping of system, user, assistant and tool to the words for them in the file",
    )


class TrainConfig(TrackerKeys, RunKeys, AdapterKeys, ModelKeys):
    """A training run. Field names are the YAML keys; see ``load_config``."""

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
    chat_template: Literal[TEMPLATES] = Field(  # type: ignore[valid-type]
        "tokenizer_default",
        description="`tokenizer_default` (the model's own), `tokenizer_default_fallback_chatml`, `chatml`, "
        "`jinja` (chat_template_jinja), or the name of the model's family, which means its own as well",
    )
    chat_template_jinja: PathText | None = Field(
        None, description="a Jinja template, or the path of a file with one; with chat_template: jinja"
    )
    sequence_len: Annotated[int, Field(ge=8), BeforeValidator(not_bool)] = Field(
        512, description="a whole number of tokens, at least 8; longer ones: see excess_length_strategy"
    )
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop",
        description="`drop`, `truncate` or `raise`: what becomes of examples longer than sequence_len",
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
        given = {name: value for name, value in self.bnb_config_kwargs.items() if value is not None}
        return {**settings, **given}  # (a null is no type: bitsandbytes' own default would be FP4)

    @property
    def attention(self) -> str | None:
        """The attention asked for, by whichever of the five keys."""
        named = {
            "flash_attention_2": self.flash_attention,
            "sdpa": self.sdp_attention,
            "flex_attention": self.flex_attention,
            "eager": self.eager_attention,
        }
        return self.attn_implementation or next((name for name, asked in named.items() if asked), None)

    @property
    def trackers(self) -> list[str]:
        """Where losses are logged to, by the trainer's names."""
        wandb, mlflow = self.use_wandb, self.use_mlflow
        if wandb is None:
            wandb = self.wandb_project is not None
        if mlflow is None:
            mlflow = self.mlflow_tracking_uri is not None or self.mlflow_experiment_name is not None
        trackio = self.use_trackio
        if trackio is None:
            trackio = self.trackio_project_name is not None
        asked = {"tensorboard": self.use_tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}
        return [name for name, wanted in asked.items() if wanted]

    @property
    def target_modules(self) -> list[str] | str | None:
        """``lora_target_modules``, or all Linears."""
        return "all-linear" if self.lora_target_linear else self.lora_target_modules
