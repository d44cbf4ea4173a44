"""Conversations from a file, each row validated before anything is loaded.

A bad row is an error naming file and line, never skipped; so is a field that would change the conversation
and that nothing here passes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import DataError
from fourfold.loading.paths import is_meant_as_path
from fourfold.training.schema import DatasetConfig
from fourfold.training.yaml_file import nearest

ROLES = ("system", "user", "assistant", "tool")
TURN_FIELDS = ("role", "content", "weight")
# Fields beside the turns that other programs hand to the chat template, or train on. Whatever else stands
# there (id, source, a score) says something about the record and changes nothing.
CHANGES_CONVERSATION = (
    "tools",
    "functions",
    "documents",
    "system",
    "chat_template",
    "chat_template_kwargs",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "images",
    "image",
    "videos",
    "audios",
)
SHOWN_PROBLEMS = 5
# What `datasets` calls the kinds of files that can hold conversations.
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Conversation:
    """One validated record and where it stands.

    Attributes:
        messages: the turns, ``role`` and ``content`` each.
        source: file and line.
        untrained: indices of the assistant's turns with ``weight: 0``.
    """

    messages: Messages
    source: str
    untrained: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """Indices of the turns to train on."""
        return [
            index
            for index, turn in enumerate(self.messages)
            if turn["role"] == "assistant" and index not in self.untrained
        ]


@dataclass(frozen=True)
class _Bad:
    """In place of a record: why there is none. (A type of its own: a row may well be a JSON string.)"""

    why: str


def read_conversations(entry: DatasetConfig) -> list[Conversation]:
    """Read the records of one entry: a .jsonl (a record a line) or .json (a list of records) file, or what
    `datasets` reads.

    Raises:
        DataError: names the file and line (or record) of every problem, up to a handful.
    """
    path = Path(entry.path)
    if not path.exists() and (path.suffix in KINDS or is_meant_as_path(entry.path)):
        raise DataError(f"{path}: no such file. Relative paths start at the current directory, {Path.cwd()}.")
    records: list[Conversation] = []
    problems: list[str] = []
    for source, raw in _records(path) if is_plain(entry) else from_library(entry):
        record = renamed(raw, entry)
        problem = record.why if isinstance(record, _Bad) else find_problem(record, entry.field_messages)
        if problem is not None:
            problems.append(f"{source}: {problem}")
        else:
            turns = record[entry.field_messages]
            messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
            untrained = frozenset(index for index, turn in enumerate(turns) if turn.get("weight") == 0)
            records.append(Conversation(messages, source, untrained))
    if problems:
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        shown = "\n  ".join(problems[:SHOWN_PROBLEMS])
        raise DataError(f"{path}: {len(problems)} bad rows; mend or remove them:\n  {shown}{more}")
    if not records:
        raise DataError(
            f"{path}: holds no record. Each is an object with `{entry.field_messages}`, a list of turns."
        )
    return records


def renamed(record: Any, entry: DatasetConfig) -> Any:
    """A record whose turns have ``role`` and ``content``, and our words for who speaks.

    Returns:
        The record, or ``_Bad`` where two fields claim the same place; anything malformed is left as it is.
    """
    turns = record.get(entry.field_messages) if isinstance(record, dict) else None
    if not isinstance(turns, list):
        return record
    names = {
        entry.message_property_mappings.role: "role",
        entry.message_property_mappings.content: "content",
    }
    speakers = {word: role for role, words in entry.roles.items() for word in words}
    result = []
    for index, turn in enumerate(turns):
        if isinstance(turn, dict):
            # A null is no value: the library fills what a turn lacks with it, where another turn has it.
            clash = [key for key in turn if names.get(key, key) != key and turn.get(names[key]) is not None]
            clash = [key for key in clash if names[key] not in names]
            if clash:
                return _Bad(f"{entry.field_messages}[{index}] has both {clash[0]} and {names[clash[0]]}")
            kept = {key: value for key, value in turn.items() if key in names or key not in names.values()}
            turn = {names.get(key, key): value for key, value in kept.items()}
            if isinstance(turn.get("role"), str):
                turn["role"] = speakers.get(turn["role"], turn["role"])
        result.append(turn)
    return {**record, entry.field_messages: result}


def is_plain(entry: DatasetConfig) -> bool:
    """Whether an entry is a whole file of JSON, read here so that complaints name its lines."""
    path = Path(entry.path)
    whole = entry.split in (None, "train") and entry.data_files is None and entry.ds_type in (None, "json")
    whole = whole and entry.name is None and entry.revision is None  # (else these are refused by name)
    return whole and not path.is_dir() and path.suffix in (".jsonl", ".json")


def from_library(entry: DatasetConfig) -> Iterator[tuple[str, Any]]:
    """Each record, with its place, of what `datasets` reads: slices, folders, Parquet, the hub.

    Raises:
        DataError: it cannot be read, or a key has no meaning for it.
    """
    import datasets

    path = Path(entry.path)
    arguments: dict[str, Any] = {"path": entry.path, "name": entry.name, "data_files": entry.data_files}
    arguments["revision"] = entry.revision
    kind: str | None = entry.ds_type
    if path.exists():
        unused = [key for key in ("name", "revision") if getattr(entry, key) is not None]
        if path.is_file():
            unused += ["data_files"] if entry.data_files is not None else []
            kind = kind or KINDS.get(path.suffix)
        if unused:
            raise DataError(f"{path}: `{unused[0]}` means nothing for a local file or folder. Drop it.")
        if path.is_file() and kind is None:
            raise DataError(
                f"{path}: not a {', '.join(KINDS)} file. Other kinds are not read yet; ds_type names one of "
                "these where the ending does not."
            )
        if path.is_file():
            arguments = {"path": kind, "data_files": str(path)}
        elif kind is not None:
            files = entry.data_files or ["*"]
            arguments = {"path": kind, "data_files": [str(path / name) for name in files]}
    elif kind is not None:
        raise DataError(f"{path}: `ds_type` means nothing for a dataset on the hub. Drop it.")
    try:
        table = datasets.load_dataset(split=entry.split or "train", **arguments)
    except Exception as error:  # whatever the reader of that kind raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{entry.path}: cannot be read ({reason}). It must be a local file or folder, or a dataset "
            "on the hub, which must be within reach; check split and data_files."
        ) from error
    for index, record in enumerate(table, 1):
        yield f"{entry.path}, record {index}", record


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record, or ``_Bad``, with its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert the file.") from None
    if path.suffix == ".json":
        records = _parse(text)
        if isinstance(records, _Bad):
            raise DataError(f"{path}: {records.why}.")
        if not isinstance(records, list):
            raise DataError(f"{path}: holds a {type(records).__name__}, not a list of records.")
        yield from ((f"{path}, record {index}", record) for index, record in enumerate(records, 1))
        return
    # Not str.splitlines: it also splits at U+2028 and the like, which JSON strings may hold unescaped.
    lines = text.split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield f"{path}, line {number}", _parse(line) if line.strip() else _Bad("empty row")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}: " if "\n" in text else ""
        return _Bad(f"{where}not valid JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return _Bad(f"no JSON that can be read ({error})")


def find_problem(record: Any, field: str) -> str | None:
    """What is wrong with one record, or None."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, not an object with `{field}`"
    if not record:
        return "empty"
    if field not in record:
        return f"no field `{field}`. {nearest(field, record)} (field_messages names another)"
    # Null and empty values stand for "none" in files exported from tables.
    changing = [name for name in CHANGES_CONVERSATION if name != field and record.get(name)]
    if changing:
        return f"`{changing[0]}` is not supported and would be left out. Write what it says into the turns"
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        return f"`{field}` is no list of turns" if not isinstance(turns, list) else f"`{field}` is empty"
    for index, turn in enumerate(turns):
        problem = _turn_problem(turn, f"{field}[{index}]")
        if problem is not None:
            return problem
    if turns[0]["role"] == "assistant":
        return f"{field}[0] is the assistant's: a conversation begins with another turn"
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        return "no turn of the assistant, so nothing to train on"
    if all(turn.get("weight") == 0 for turn in answers):
        return "every turn of the assistant has weight 0, so nothing to train on"
    return None


def _turn_problem(turn: Any, where: str) -> str | None:
    if not isinstance(turn, dict):
        return f"{where} is a {type(turn).__name__}, not an object with role and content"
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            return f"{where}.{key} is {'missing' if key not in turn else 'no string'}"
    if turn["role"] not in ROLES:
        return f"{where}.role is {turn['role']!r}. {nearest(turn['role'], ROLES)}"
    if not turn["content"].strip() and turn["role"] != "system":
        return f"{where}.content is empty"
    if not turn["content"].isascii():
        try:
            turn["content"].encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{where}.content holds half a character (\\u{ord(error.object[error.start]):04x} alone)"
    unknown = [name for name in turn if name not in TURN_FIELDS and turn[name] not in (None, [], {}, "")]
    if unknown:
        return f"{where}.{unknown[0]} is not supported and would be left out. Write what it says into content"
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        return f"{where}.weight is {weight!r}: 1 (the answer is trained) or 0 (it is not)"
    if weight == 1 and turn["role"] != "assistant":
        return f"{where}.weight is 1, but only the assistant's turns are trained"
    return None
