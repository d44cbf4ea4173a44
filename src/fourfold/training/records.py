"""Records of a dataset, each validated before anything is loaded: conversations here, texts in texts.py.

A bad record is named with its file and line; few of many may be left out (``max_bad_records``), more are an
error. A field that would change the conversation and that nothing here passes on makes a record bad.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fourfold.errors import DataError
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.sources import Bad, raw_records
from fourfold.training.texts import Text, half_a_character, read_text
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

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Conversation:
    """One validated record and where it stands.

    Attributes:
        messages: the turns, ``role`` and ``content`` each.
        source: file and line.
        trained: indices of the turns to train on; None for all of the assistant's.
        ends: which end tokens are trained: "turn" (of those turns), "all", "last" or "none".
        template: (``chat_template``, ``chat_template_jinja``) of its dataset, where that has its own.
    """

    messages: Messages
    source: str
    trained: frozenset[int] | None = None
    ends: str = "turn"
    template: tuple[str, str | None] | None = None

    @property
    def answers(self) -> list[int]:
        """Indices of the turns to train on."""
        if self.trained is not None:
            return sorted(self.trained)
        return [index for index, turn in enumerate(self.messages) if turn["role"] == "assistant"]


Record = Conversation | Text


@dataclass
class Read:
    """What an entry holds.

    Attributes:
        records: the sound ones.
        bad: place and problem of each that was left out.
    """

    records: list[Record] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def read_records(entry: DatasetConfig, train_on_inputs: bool = False, max_bad: float = 0.0) -> Read:
    """Read the records of one entry.

    Args:
        entry: what to read.
        train_on_inputs: whether prompts are trained too.
        max_bad: the share of its records that may be bad.

    Raises:
        DataError: it cannot be read or holds nothing; or more records are bad, and the message names the file
            and line of a handful of them.
    """
    result = Read()
    for source, raw in raw_records(entry):
        record = raw if isinstance(raw, Bad) else _record(raw, entry, source, train_on_inputs)
        if isinstance(record, Bad):
            result.bad.append(f"{source}: {record.why}")
        else:
            result.records.append(record)
    total = len(result.records) + len(result.bad)
    if len(result.bad) > max_bad * total:
        rows, them = ("1 bad row", "it") if len(result.bad) == 1 else (f"{len(result.bad)} bad rows", "them")
        raise DataError(
            f"{entry.path}: {rows} of {total}; mend or remove {them}:\n  "
            + "\n  ".join(shown_problems(result.bad))
        )
    if not total:
        wanted = (
            f"`{entry.field_messages}`, a list of turns"
            if entry.is_chat
            else f"what type: {_name(entry)} reads"
        )
        raise DataError(f"{entry.path}: holds no record. Each is an object with {wanted}.")
    return result


def shown_problems(problems: list[str]) -> list[str]:
    """A handful of them, and how many more there are."""
    more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
    return problems[:SHOWN_PROBLEMS] + more


def left_out(bad: list[str]) -> list[str]:
    """Lines that say which records were left out, and why; none where none was."""
    count = "1 bad record" if len(bad) == 1 else f"{len(bad)} bad records"
    return [f"{count} left out:", *(f"  {line}" for line in shown_problems(bad))] if bad else []


def _name(entry: DatasetConfig) -> str:
    return entry.type if isinstance(entry.type, str) else "{format: ...}"


def _record(raw: Any, entry: DatasetConfig, source: str, train_on_inputs: bool) -> Record | Bad:
    if not entry.is_chat:
        text = read_text(raw, entry, source, train_on_inputs)
        if isinstance(text, dict):  # prompt and completion are turns themselves
            return _conversation(renamed(text, entry), entry, source, train_on_inputs, text["first"])
        return text
    return _conversation(renamed(raw, entry), entry, source, train_on_inputs)


def _conversation(
    record: Any, entry: DatasetConfig, source: str, train_on_inputs: bool, first: int = 0
) -> Conversation | Bad:
    """A validated conversation; turns before ``first`` are not trained."""
    if isinstance(record, Bad):
        return record
    problem = find_problem(record, entry.field_messages, entry.message_field_training)
    if problem is not None:
        return Bad(problem)
    turns = record[entry.field_messages]
    words = {word: role for role, several in entry.roles.items() for word in several}
    roles = {words.get(word, word) for word in entry.roles_to_train}
    trained = frozenset(
        index
        for index, turn in enumerate(turns)
        if index >= first and _is_trained(turn, entry.message_field_training, train_on_inputs, roles)
    )
    if not trained:
        return Bad(_why_untrained(turns, roles))
    return Conversation(
        [{"role": turn["role"], "content": turn["content"]} for turn in turns],
        source,
        trained=trained,
        ends=entry.train_on_eos,
        template=None if entry.chat_template is None else (entry.chat_template, entry.chat_template_jinja),
    )


def _is_trained(turn: dict[str, Any], mark: str | None, train_on_inputs: bool, roles: set[str]) -> bool:
    if mark is not None and turn.get(mark) is not None:
        return bool(turn[mark])
    if turn.get("weight") is not None:
        return bool(turn["weight"] == 1)
    return train_on_inputs or turn["role"] in roles


def _why_untrained(turns: list[dict[str, Any]], roles: set[str]) -> str:
    wanted = [turn for turn in turns if turn["role"] in roles]
    who = "the assistant" if roles == {"assistant"} else " or ".join(sorted(roles))
    if not wanted:
        return f"no turn of {who}, so nothing to train on"
    if all(turn.get("weight") == 0 for turn in wanted):
        return f"every turn of {who} has weight 0, so nothing to train on"
    return "no turn is marked as trained"


def renamed(record: Any, entry: DatasetConfig) -> Any:
    """A record whose turns have ``role`` and ``content``, and our words for who speaks.

    Returns:
        The record, or ``Bad`` where two fields claim the same place; anything malformed is left as it is.
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
                return Bad(f"{entry.field_messages}[{index}] has both {clash[0]} and {names[clash[0]]}")
            kept = {key: value for key, value in turn.items() if key in names or key not in names.values()}
            turn = {names.get(key, key): value for key, value in kept.items()}
            if isinstance(turn.get("role"), str):
                turn["role"] = speakers.get(turn["role"], turn["role"])
                if turn["role"] == "system" and entry.drop_system_message:
                    continue
        result.append(turn)
    return {**record, entry.field_messages: result}


def find_problem(record: Any, name: str, mark: str | None = None) -> str | None:
    """What is wrong with a record whose field ``name`` holds turns, or None; ``mark`` is a field of turns."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, not an object with `{name}`"
    if not record:
        return "empty"
    if name not in record:
        return f"no field `{name}`. {nearest(name, record)} (field_messages names another)"
    # Null and empty values stand for "none" in files exported from tables.
    changing = [key for key in CHANGES_CONVERSATION if key != name and record.get(key)]
    if changing:
        return f"`{changing[0]}` is not supported and would be left out. Write what it says into the turns"
    turns = record[name]
    if not isinstance(turns, list) or not turns:
        return f"`{name}` is no list of turns" if not isinstance(turns, list) else f"`{name}` is empty"
    for index, turn in enumerate(turns):
        problem = _turn_problem(turn, f"{name}[{index}]", mark)
        if problem is not None:
            return problem
    if turns[0]["role"] == "assistant":
        return f"{name}[0] is the assistant's: a conversation begins with another turn"
    return None


def _turn_problem(turn: Any, where: str, mark: str | None) -> str | None:
    if not isinstance(turn, dict):
        return f"{where} is a {type(turn).__name__}, not an object with role and content"
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            return f"{where}.{key} is {'missing' if key not in turn else 'no string'}"
    if turn["role"] not in ROLES:
        return f"{where}.role is {turn['role']!r}. {nearest(turn['role'], ROLES)}"
    if not turn["content"].strip() and turn["role"] != "system":
        return f"{where}.content is empty"
    broken = half_a_character(turn["content"])
    if broken is not None:
        return f"{where}.content {broken}"
    known = (*TURN_FIELDS, mark)
    unknown = [name for name in turn if name not in known and turn[name] not in (None, [], {}, "")]
    if unknown:
        return f"{where}.{unknown[0]} is not supported and would be left out. Write what it says into content"
    if mark is not None and turn.get(mark) is not None and not isinstance(turn[mark], bool):
        return f"{where}.{mark} is {turn[mark]!r}: true (the turn is trained) or false (it is not)"
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        return f"{where}.weight is {weight!r}: 1 (the answer is trained) or 0 (it is not)"
    if weight == 1 and turn["role"] != "assistant":
        return f"{where}.weight is 1, but only the assistant's turns are trained"
    return None
