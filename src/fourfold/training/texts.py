"""Records without turns: instructions, prompts with their completions, segments, plain text.

Each becomes pieces of text, tokenized one by one, of which some are trained. A prompt and its answer are
tokenized apart, so that no token straddles them; a text begins with the tokenizer's beginning-of-text token,
if it writes one, and ends with its end-of-text token. Segments (``input_output``) are taken as they stand,
without either.

The prompts are Stanford Alpaca's, and those that axolotl writes for its variants of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fourfold.training.dataset_keys import DatasetConfig, PromptFormat
from fourfold.training.sources import Bad
from fourfold.training.yaml_file import nearest


@dataclass(frozen=True)
class Text:
    """One validated record and where it stands.

    Attributes:
        pieces: texts in their order, and whether each is trained.
        source: file and line.
        asked: how many of the pieces come before the first answer; 0 of plain text.
        framed: whether the tokenizer's beginning and end of text are put around it.
        cut: whether a long one is cut into several examples (plain text), rather than dropped or truncated.
    """

    pieces: tuple[tuple[str, bool], ...]
    source: str
    asked: int
    framed: bool = True
    cut: bool = False

    @property
    def question(self) -> str:
        """What comes before the first answer."""
        return "".join(text for text, _ in self.pieces[: self.asked])


_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n"
_WITH_INPUT = f"{_TASK}, paired with an input that provides further context. {_REQUEST}"
_WITHOUT = f"{_TASK}. {_REQUEST}"
_CHAT: dict[str, Any] = {
    "format": _WITH_INPUT + "USER: {instruction}\n{input}\nASSISTANT:",
    "no_input_format": _WITHOUT + "USER: {instruction}\nASSISTANT:",
}


def _prompt(**values: Any) -> PromptFormat:
    return PromptFormat.model_validate(values)


# Type -> the prompt, and what the fields are called.
PROMPTS: dict[str, PromptFormat] = {
    "alpaca": _prompt(
        format=_WITH_INPUT + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        no_input_format=_WITHOUT + "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "alpaca_chat": _prompt(**_CHAT),
    "alpaca_chat.load_qa": _prompt(**_CHAT, field_instruction="question", field_output="answer"),
    "alpaca_w_system.load_open_orca": _prompt(
        format="### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
        no_input_format="### Human:\n{instruction}\n### Assistant:\n",
        system_format="### System:\n{system}\n",
        field_system="system_prompt",
        field_instruction="question",
        field_output="response",
    ),
}
# Fields of such records that other programs put before the prompt.
_CHANGES_PROMPT = ("system", "history")


def read_text(
    raw: Any, entry: DatasetConfig, source: str, train_on_inputs: bool
) -> Text | Bad | dict[str, Any]:
    """One record of an entry that is no chat; a mapping with turns where prompt and completion are turns."""
    if not isinstance(raw, dict):
        return Bad(f"a {type(raw).__name__}, not an object")
    if not raw:
        return Bad("empty")
    if entry.type == "completion":
        problem = _text_problem(raw, entry.field, "field")
        text = raw.get(entry.field)
        return Bad(problem) if problem else Text(((str(text), True),), source, 0, cut=True)
    if entry.type == "input_output":
        return _segments(raw, source, train_on_inputs)
    if entry.type == "prompt_completion":
        return _prompt_completion(raw, entry, source, train_on_inputs)
    prompt = entry.type if isinstance(entry.type, PromptFormat) else PROMPTS[entry.type]
    return _instruction(raw, prompt, source, train_on_inputs)


def half_a_character(text: str) -> str | None:
    """What is wrong with a text that is no Unicode, or None."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half a character (\\u{ord(error.object[error.start]):04x} alone)"
    return None


def _text_problem(record: dict[str, Any], name: str, key: str | None = None) -> str | None:
    """What is wrong with a field that must hold a text, or None."""
    if name not in record:
        other = f" ({key} names another)" if key else ""
        return f"no field `{name}`. {nearest(name, record)}{other}"
    value = record[name]
    if not isinstance(value, str):
        return f"`{name}` is {'null' if value is None else f'a {type(value).__name__}'}, not a text"
    if not value.strip():
        return f"`{name}` is empty"
    broken = half_a_character(value)
    return None if broken is None else f"`{name}` {broken}"


def _instruction(raw: dict[str, Any], prompt: PromptFormat, source: str, train_on_inputs: bool) -> Text | Bad:
    for name in (prompt.field_instruction, prompt.field_output):
        problem = _text_problem(raw, name)
        if problem:
            return Bad(problem)
    optional = [prompt.field_input, *([prompt.field_system] if prompt.field_system else [])]
    for name in optional:
        if raw.get(name) not in (None, ""):
            problem = _text_problem(raw, name)
            if problem and not problem.endswith("is empty"):
                return Bad(problem)
    used = (prompt.field_instruction, prompt.field_output, *optional)
    left = [name for name in _CHANGES_PROMPT if name not in used and raw.get(name)]
    if left:
        return Bad(f"`{left[0]}` is not part of the prompt and would be left out. See type: {{format: ...}}")
    values = {"instruction": raw[prompt.field_instruction], "input": raw.get(prompt.field_input) or ""}
    system = (raw.get(prompt.field_system) or "") if prompt.field_system else ""
    system = system or prompt.system_prompt
    form = prompt.format
    if not values["input"].strip() and prompt.no_input_format is not None:
        form = prompt.no_input_format
    text = (_filled(prompt.system_format, {"system": system}) if system else "") + _filled(form, values)
    pieces = ((text, train_on_inputs), (raw[prompt.field_output], True))
    return Text(pieces, source, 1)


def _filled(form: str, values: dict[str, str]) -> str:
    """A format with its names filled in; other braces, and those within values, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), form)


def _prompt_completion(
    raw: dict[str, Any], entry: DatasetConfig, source: str, train_on_inputs: bool
) -> Text | Bad | dict[str, Any]:
    kinds = {type(raw.get(name)) for name in ("prompt", "completion")}
    if kinds == {list}:
        turns = [*raw["prompt"], *raw["completion"]]
        return {entry.field_messages: turns, "first": 0 if train_on_inputs else len(raw["prompt"])}
    for name in ("prompt", "completion"):
        problem = _text_problem(raw, name)
        if problem:
            return Bad(problem)
    pieces = ((raw["prompt"], train_on_inputs), (raw["completion"], True))
    return Text(pieces, source, 1)


def _segments(raw: dict[str, Any], source: str, train_on_inputs: bool) -> Text | Bad:
    segments = raw.get("segments")
    if not isinstance(segments, list) or not segments:
        return Bad("`segments` is no list of segments, each with `label` (true or false) and `text`")
    pieces: list[tuple[str, bool]] = []
    asked: int | None = None
    for index, segment in enumerate(segments):
        where = f"segments[{index}]"
        if not isinstance(segment, dict):
            return Bad(f"{where} is a {type(segment).__name__}, not an object with label and text")
        if not isinstance(segment.get("label"), bool):
            return Bad(f"{where}.label is {segment.get('label')!r}: true (trained) or false (not)")
        if not isinstance(segment.get("text"), str):
            return Bad(f"{where}.text is {'missing' if 'text' not in segment else 'no string'}")
        broken = half_a_character(segment["text"])
        if broken:
            return Bad(f"{where}.text {broken}")
        if segment["text"]:
            asked = len(pieces) if asked is None and segment["label"] else asked
            pieces.append((segment["text"], segment["label"] or train_on_inputs))
    if not any(trained for _, trained in pieces):
        return Bad("no segment has label: true, so nothing to train on")
    return Text(tuple(pieces), source, asked or 0, framed=False)
