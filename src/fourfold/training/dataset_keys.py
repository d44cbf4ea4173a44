"""The keys of an entry of ``datasets`` and ``test_datasets``. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from fourfold.training.key_types import OneOrMore, PathText, Strict, Text, only
from fourfold.training.templates import TEMPLATES

# Who speaks, by the words for it in common files; `roles` replaces the table.
Role = Literal["system", "user", "assistant", "tool"]
ROLES: dict[Role, list[str]] = {
    "system": ["system"],
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt"],
    "tool": ["tool"],
}
Type = Literal[
    "chat_template",
    "sharegpt",
    "alpaca",
    "alpaca_chat",
    "alpaca_chat.load_qa",
    "alpaca_w_system.load_open_orca",
    "completion",
    "prompt_completion",
    "input_output",
]
TYPES: tuple[str, ...] = Type.__args__  # type: ignore[attr-defined]
# Types of axolotl's that are not read.
OTHER_TYPES = (
    "context_qa",
    "pretrain",
    "alpaca_w_system",
    "chat_template.argilla",
    "alpaca_instruct",
    "gpteacher",
    "metharme",
    "orcamini",
    "user_defined",
    "stepwise_supervised",
)
CHAT_TYPES = ("chat_template", "sharegpt")
Ends = Literal["turn", "all", "last", "none"]


class Turn(Strict):
    """What a turn's fields are called in a file."""

    role: Text = Field("role", description="the field that says who speaks")
    content: Text = Field("content", description="the field with the text")


class PromptFormat(Strict):
    """A prompt of one's own, made of a record's fields; what follows it is the answer."""

    format: Text = Field(
        "{instruction}\n{input}\n",
        description="the prompt, with `{instruction}` and, if there is one, `{input}`",
    )
    no_input_format: Text | None = Field(
        None, description="the prompt of a record whose input is empty; absent means `format`"
    )
    system_prompt: str = Field("", description="what is said before each prompt")
    system_format: str = Field("{system}", description="how it is written, with `{system}`")
    field_system: Text | None = Field(None, description="a field that says it for each record")
    field_instruction: Text = Field("instruction", description="the field with the task")
    field_input: Text = Field("input", description="the field with what it is about; it may be absent")
    field_output: Text = Field("output", description="the field with the answer")


def _plain_type(value: Any) -> Any:
    return "chat_template" if value == "chat_template.default" else value


_TypeName = Annotated[
    Type,
    only(TYPES, f"Write one of {', '.join(TYPES)}, or a mapping with `format`.", TYPES + OTHER_TYPES),
    BeforeValidator(_plain_type),
]


class DatasetConfig(Strict):
    """Training data: a file, a folder of files, or a dataset on the hub.

    A record may hold whatever else says something about it (an id, its source); fields that would change the
    conversation (``tools`` and the like, see ``records.CHANGES_CONVERSATION``) are refused, and so is
    anything in a turn but ``role``, ``content``, ``weight`` (0: the answer is shown, not trained) and what
    ``message_field_training`` names.
    """

    path: PathText = Field(
        description="a local file (.jsonl, .json, .csv, .tsv, .txt, .parquet), a folder (of files, or one "
        "saved by `datasets`), or a dataset's id on the hub"
    )
    type: Annotated[
        Annotated[PromptFormat, Tag("mapping")] | Annotated[_TypeName, Tag("name")],
        Discriminator(lambda value: "mapping" if isinstance(value, Mapping | PromptFormat) else "name"),
    ] = Field(
        "chat_template",
        description="`chat_template` or `sharegpt` (turns), `alpaca`, `alpaca_chat`, `alpaca_chat.load_qa`, "
        "`alpaca_w_system.load_open_orca` (instructions), `prompt_completion`, `input_output` (segments), "
        "`completion` (text), or a mapping with `format`",
    )
    name: Text | None = Field(None, description="the name of the hub dataset's configuration")
    split: Text | None = Field(
        None, description="a split, or a slice of one, such as train[:20%]; absent means train"
    )
    data_files: OneOrMore | None = Field(None, description="a file, or a list of files, within `path`")
    ds_type: Literal["json", "csv", "text", "parquet", "arrow"] | None = Field(
        None, description="`json`, `csv`, `text`, `parquet` or `arrow`, where a file's name does not say"
    )
    revision: Text | None = Field(None, description="a branch, tag or commit of a dataset on the hub")
    field: Text = Field("text", description="the name of the field with the text; type: completion")
    field_messages: Text = Field(
        "messages", description="the name of the field with the turns; of sharegpt, `conversations`"
    )
    message_property_mappings: Turn = Field(
        default_factory=lambda: Turn.model_validate({}),
        description="a mapping of role and content to the turns' own fields, such as {role: from}, which is "
        "sharegpt's",
    )
    roles: dict[Role, OneOrMore] = Field(
        default_factory=lambda: ROLES,
        description="a mapping of system, user, assistant and tool to the words for them in the file",
    )
    roles_to_train: OneOrMore = Field(
        default_factory=lambda: ["assistant"], description="a list of roles whose turns are trained"
    )
    train_on_eos: Ends = Field(
        "turn",
        description="which end tokens are trained: `turn` (of trained turns), `all`, `last` (of the last "
        "turn) or `none`",
    )
    message_field_training: Text | None = Field(
        None, description="a field of turns that says, true or false, whether one is trained"
    )
    chat_template: Literal[TEMPLATES] | None = Field(  # type: ignore[valid-type]
        None, description="as the run's, for this dataset alone"
    )
    chat_template_jinja: PathText | None = Field(None, description="as the run's, for this dataset alone")
    drop_system_message: bool = Field(False, description="true: turns of the system are left out")

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, data: Any) -> Any:
        """Older names of keys, and what `type: sharegpt` means."""
        if not isinstance(data, Mapping):
            return data
        values = dict(data)
        names = values.get("message_property_mappings")
        for old, new in (("message_field_role", "role"), ("message_field_content", "content")):
            value = values.pop(old, None)
            if value is not None and (names is None or isinstance(names, Mapping)):
                names = {**(names or {}), new: value}
        if values.get("train_on_eos") is None and values.get("train_on_eot") is not None:
            values["train_on_eos"] = values["train_on_eot"]
        if values.get("train_on_eot") == values.get("train_on_eos"):
            values.pop("train_on_eot", None)
        if values.get("type") == "sharegpt":
            values["field_messages"] = values.get("field_messages") or "conversations"
            names = names or {"role": "from", "content": "value"}
        if names is not None:
            values["message_property_mappings"] = names
        return values

    @property
    def is_chat(self) -> bool:
        """Whether records hold turns for a chat template."""
        return self.type in CHAT_TYPES
