"""Conversations from a file to token ids, with loss on the assistant's turns only.

A record holds a list of messages. The tokenizer's own chat template is applied incrementally: for each answer
once up to and including the generation prompt (what the model will be shown), once with the answer. What the
second adds is the answer, end-of-turn token included; everything else gets the label -100. A template for
which the shorter text is no prefix of the longer one cannot be labelled this way and is an error. Labels are
not shifted (models do that).

Every row is validated before anything is loaded; a bad one is an error naming file and line, never skipped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import DataError
from fourfold.training.schema import DatasetConfig, TrainConfig
from fourfold.training.yaml_file import nearest

IGNORED = -100
ROLES = ("system", "user", "assistant", "tool")
SHOWN_PROBLEMS = 5
# Above this share of examples that lost their whole answer to truncation, sequence_len is wrong, not the
# data.
MAX_DROPPED = 0.5

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Conversation:
    """One validated record and where it stands."""

    messages: Messages
    source: str


@dataclass
class Tokenized:
    """Token ids and labels of a set of conversations.

    Attributes:
        dataset: a ``datasets.Dataset`` with ``input_ids``, ``labels`` and ``length``.
        truncated: how many examples were cut to ``sequence_len``.
        dropped: how many of those had no token of an answer left, and are not in ``dataset``.
        tokens: all tokens in ``dataset``.
        trained_tokens: those with a label.
    """

    dataset: Any
    truncated: int
    dropped: int
    tokens: int
    trained_tokens: int

    def to_dict(self) -> dict[str, int]:
        """Counts only."""
        return {
            "examples": len(self.dataset),
            "truncated": self.truncated,
            "dropped": self.dropped,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }


def load_conversations(config: TrainConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Read and validate the files of ``config``; returns (training, held-out).

    Raises:
        DataError: a file is missing or empty, a row malformed, or nothing is left to train on.
    """
    train = [record for entry in config.datasets for record in read_conversations(entry)]
    if config.test_datasets:
        return train, [record for entry in config.test_datasets for record in read_conversations(entry)]
    size = config.val_set_size
    held_out = round(len(train) * size) if size < 1 else int(size)
    if size and held_out == 0:
        raise DataError(
            f"val_set_size: {size} of {len(train)} examples is none. Give a larger fraction, or a whole "
            "number."
        )
    if held_out >= len(train):
        raise DataError(
            f"val_set_size holds out {held_out} of {len(train)} examples: none is left. Lower it."
        )
    chosen = set(random.Random(config.seed).sample(range(len(train)), held_out))
    return (
        [record for index, record in enumerate(train) if index not in chosen],
        [record for index, record in enumerate(train) if index in chosen],
    )


def read_conversations(entry: DatasetConfig) -> list[Conversation]:
    """Read one .jsonl (a record a line) or .json (a list of records) file.

    Raises:
        DataError: names the file and line (or record) of every problem, up to a handful.
    """
    path = Path(entry.path)
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(
            f"{path}: not a .jsonl or .json file. Only local files of these kinds can be read for now."
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file. Relative paths start at the current directory, {Path.cwd()}.")
    records: list[Conversation] = []
    problems: list[str] = []
    for source, record in _records(path):
        problem = record if isinstance(record, str) else find_problem(record, entry.field_messages)
        if problem:
            problems.append(f"{source}: {problem}")
        else:
            turns = [
                {"role": turn["role"], "content": turn["content"]} for turn in record[entry.field_messages]
            ]
            records.append(Conversation(turns, source))
    if problems:
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        shown = "\n  ".join(problems[:SHOWN_PROBLEMS])
        raise DataError(f"{path}: {len(problems)} bad rows; mend or remove them:\n  {shown}{more}")
    if not records:
        raise DataError(
            f"{path}: holds no record. Each is an object with `{entry.field_messages}`, a list of turns."
        )
    return records


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record with its place; a string in place of a record is a problem."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert the file.") from None
    if path.suffix == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.") from None
        if not isinstance(records, list):
            raise DataError(f"{path}: holds a {type(records).__name__}, not a list of records.")
        yield from ((f"{path}, record {index}", record) for index, record in enumerate(records, 1))
        return
    # Not str.splitlines: it also splits at U+2028 and the like, which JSON strings may hold unescaped.
    lines = text.split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        source = f"{path}, line {number}"
        if not line.strip():
            yield source, "empty row"
            continue
        try:
            yield source, json.loads(line)
        except json.JSONDecodeError as error:
            yield source, f"not valid JSON: {error.msg} (column {error.colno})"


def find_problem(record: Any, field: str) -> str | None:
    """What is wrong with one record, or None."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, not an object with `{field}`"
    if field not in record:
        return (
            f"no field `{field}`. {nearest(field, record)} (field_messages names another)"
            if record
            else "empty"
        )
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        return f"`{field}` is no list of turns" if not isinstance(turns, list) else f"`{field}` is empty"
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict):
            return f"{where} is a {type(turn).__name__}, not an object with role and content"
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                return f"{where}.{key} is {'missing' if key not in turn else 'no string'}"
        if turn["role"] not in ROLES:
            return f"{where}.role is {turn['role']!r}. {nearest(turn['role'], ROLES)}"
        if not turn["content"].strip() and turn["role"] != "system":
            return f"{where}.content is empty"
    if turns[0]["role"] == "assistant":
        return f"{field}[0] is the assistant's: a conversation begins with another turn"
    if not any(turn["role"] == "assistant" for turn in turns):
        return "no turn of the assistant, so nothing to train on"
    return None


def tokenize(
    conversations: Sequence[Conversation], tokenizer: Any, sequence_len: int, what: str
) -> Tokenized:
    """Token ids and labels of every conversation, cut to ``sequence_len``.

    Raises:
        DataError: no chat template, one that is not prefix-consistent, or too many answers lost to
        truncation.
    """
    import datasets

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{type(tokenizer).__name__} has no chat template, so turns cannot be told apart. "
            "Use the model's chat variant, or put a chat_template.jinja beside its tokenizer."
        )
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    truncated = dropped = 0
    for conversation in conversations:
        ids, labels = encode(conversation, tokenizer)
        if len(ids) > sequence_len:
            truncated += 1
            ids, labels = ids[:sequence_len], labels[:sequence_len]
        # The first label is never predicted: models shift.
        if all(label == IGNORED for label in labels[1:]):
            dropped += 1
            continue
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
        columns["length"].append(len(ids))
    if dropped > MAX_DROPPED * len(conversations):
        raise DataError(
            f"{what}: {dropped} of {len(conversations)} examples have no token of an answer within "
            f"sequence_len: {sequence_len}. Raise sequence_len."
        )
    trained = sum(label != IGNORED for labels in columns["labels"] for label in labels[1:])
    return Tokenized(datasets.Dataset.from_dict(columns), truncated, dropped, sum(columns["length"]), trained)


def encode(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 outside the assistant's turns) of one conversation.

    Raises:
        DataError: the template renders a longer conversation differently from the start of it.
    """
    messages = conversation.messages
    # Turns after the last answer carry no label and nothing after them is predicted: leave them out.
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "assistant")
    messages = messages[: last + 1]
    text, ids = _render(messages, tokenizer, prompt=False, source=conversation.source)
    labels = [IGNORED] * len(ids)
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        prompt_text, prompt_ids = _render(
            messages[:index], tokenizer, prompt=True, source=conversation.source
        )
        turn_text, turn_ids = text, ids
        if index != last:
            turn_text, turn_ids = _render(
                messages[: index + 1], tokenizer, prompt=False, source=conversation.source
            )
        if not (text.startswith(turn_text) and turn_text.startswith(prompt_text)):
            raise DataError(
                f"{conversation.source}: the chat template is not prefix-consistent: it renders the turns "
                f"before messages[{index}] differently once later turns follow, so the answers cannot be "
                "told from the rest. Use a template that renders each turn on its own, or split the "
                "conversation into single answers."
            )
        # Where a token straddles the boundary it belongs to the answer: the common prefix ends before it.
        start, stop = _common_prefix(prompt_ids, ids), _common_prefix(turn_ids, ids)
        stop = _end_of_turn(ids, start, stop, tokenizer)
        labels[start:stop] = ids[start:stop]
    return ids, labels


def _render(messages: Messages, tokenizer: Any, prompt: bool, source: str) -> tuple[str, list[int]]:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # templates raise what they like (jinja2's own, TypeError...)
        roles = ", ".join(turn["role"] for turn in messages)
        raise DataError(f"{source}: the chat template refuses the turns ({roles}): {error}") from error
    return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _end_of_turn(ids: list[int], start: int, stop: int, tokenizer: Any) -> int:
    """``stop``, less what templates put after the end-of-turn token (a newline): it is never generated."""
    for index in range(stop - 1, start - 1, -1):
        if ids[index] == tokenizer.eos_token_id:
            return index + 1
    return stop
