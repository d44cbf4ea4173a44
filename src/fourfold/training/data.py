"""Training data from the files to tokenized sets: read, split, tokenized, counted."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourfold.errors import DataError
from fourfold.training.encode import IGNORED, Example, encode
from fourfold.training.records import SHOWN_PROBLEMS, Conversation, Record, read_records
from fourfold.training.schema import TrainConfig
from fourfold.training.texts import Text

# Above this share of examples that are dropped for their length, sequence_len is wrong, not the data.
MAX_DROPPED = 0.5

Templates = Mapping[tuple[str, str | None], str | None]


@dataclass
class Tokenized:
    """Token ids and labels of a set of records.

    Attributes:
        dataset: a ``datasets.Dataset`` with ``input_ids``, ``labels`` and ``length``.
        truncated: how many of its examples were cut to ``sequence_len``.
        dropped: how many examples were longer than that and are not in ``dataset``.
        tokens: all tokens in ``dataset``.
        trained_tokens: those with a label.
        largest_id: the largest token id.
        digest: a hash of ids and labels, in their order.
        first: the index of the first record that is in ``dataset``.
        long: place and length of the first few examples that were longer.
        packed: several examples a row (see packing.py), where that is asked for.
    """

    dataset: Any
    truncated: int
    dropped: int
    tokens: int
    trained_tokens: int
    largest_id: int
    digest: str
    first: int
    long: list[str]
    packed: Any = None

    @property
    def rows(self) -> Any:
        """What the trainer draws from: packed rows, or examples."""
        return self.dataset if self.packed is None else self.packed

    def too_long(self, what: str) -> list[str]:
        """Lines that say what became of examples longer than ``sequence_len``, and where they are."""
        counted = [(self.truncated, "cut to sequence_len"), (self.dropped, "dropped for their length")]
        said = ", ".join(f"{count} {fate}" for count, fate in counted if count)
        return [f"{what}: {said}; the first:", *(f"  {line}" for line in self.long)] if said else []

    def to_dict(self) -> dict[str, int]:
        """Counts only."""
        packed = {} if self.packed is None else {"packed_rows": len(self.packed)}
        return {
            "examples": len(self.dataset),
            **packed,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }


@dataclass
class Loaded:
    """Records, before they are tokenized.

    Attributes:
        train: to train on.
        held_out: to evaluate on.
        bad: place and problem of each record that was left out.
    """

    train: list[Record]
    held_out: list[Record]
    bad: list[str] = field(default_factory=list)


def load_records(config: TrainConfig) -> Loaded:
    """Read and validate the data of ``config``.

    Raises:
        DataError: a file is missing or empty, too many rows are malformed, or nothing is left to train on.
    """
    bad: list[str] = []

    def read(entries: Sequence[Any]) -> list[Record]:
        found = [read_records(entry, config.train_on_inputs, config.max_bad_records) for entry in entries]
        bad.extend(problem for each in found for problem in each.bad)
        return [record for each in found for record in each.records]

    train = read(config.datasets)
    if config.test_datasets:
        return Loaded(train, read(config.test_datasets), bad)
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
    return Loaded(
        [record for index, record in enumerate(train) if index not in chosen],
        [record for index, record in enumerate(train) if index in chosen],
        bad,
    )


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    sequence_len: int,
    what: str,
    excess: str = "drop",
    templates: Templates | None = None,
) -> Tokenized:
    """Token ids and labels of every record, none longer than ``sequence_len``.

    Args:
        records: validated ones.
        tokenizer: with a chat template, where there are conversations.
        sequence_len: the most tokens an example may have.
        what: what the records are, for messages.
        excess: what becomes of longer ones: ``drop``, ``truncate`` or ``raise``; plain text is cut.
        templates: the chat template that each of the conversations' ``template`` means.

    Raises:
        DataError: no chat template, one whose answers cannot be told apart, a long example where
            ``excess`` is ``raise``, or too many examples dropped.
    """
    import datasets

    templates = templates or {}
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    digest = hashlib.sha256()
    total = truncated = dropped = largest = 0
    first: int | None = None
    long: list[str] = []
    for index, record in enumerate(records):
        template = None
        if isinstance(record, Conversation):
            template = templates[record.template] if record.template else tokenizer.chat_template
            if not template:
                raise DataError(
                    f"{record.source}: a conversation, and the tokenizer of {tokenizer.name_or_path or what} "
                    "has no chat template, so turns cannot be told apart. Use the model's chat variant, or "
                    "put a chat_template.jinja beside its tokenizer."
                )
        for ids, labels in _examples(record, tokenizer, template, sequence_len):
            total += 1
            is_long = len(ids) > sequence_len
            if is_long and excess == "raise":
                raise DataError(
                    f"{record.source}: {len(ids)} tokens, and sequence_len is {sequence_len}. Raise "
                    "it, shorten the example, or set excess_length_strategy: drop or truncate."
                )
            if is_long and len(long) < SHOWN_PROBLEMS:
                long.append(f"{record.source}: {len(ids)} tokens")
            ids, labels = ids[:sequence_len], labels[:sequence_len]
            # The first label is never predicted: models shift.
            if is_long and (excess == "drop" or all(label == IGNORED for label in labels[1:])):
                dropped += 1
                continue
            truncated += is_long
            largest = max(largest, *ids)
            first = index if first is None else first
            digest.update(array("q", [len(ids), *ids, *labels]).tobytes())
            columns["input_ids"].append(ids)
            columns["labels"].append(labels)
            columns["length"].append(len(ids))
    if dropped > MAX_DROPPED * total:
        reason = "are longer than" if excess == "drop" else "have no token of an answer within"
        remedy = ", or set excess_length_strategy: truncate" if excess == "drop" else ""
        raise DataError(
            f"{what}: {dropped} of {total} examples {reason} sequence_len: {sequence_len}. "
            f"Raise sequence_len{remedy}. The first ones:\n  " + "\n  ".join(long)
        )
    trained = sum(label != IGNORED for labels in columns["labels"] for label in labels[1:])
    return Tokenized(
        dataset=datasets.Dataset.from_dict(columns),
        truncated=truncated,
        dropped=dropped,
        tokens=sum(columns["length"]),
        trained_tokens=trained,
        largest_id=largest,
        digest=digest.hexdigest(),
        first=first or 0,
        long=long,
    )


def _examples(record: Record, tokenizer: Any, template: str | None, sequence_len: int) -> list[Example]:
    examples = encode(record, tokenizer, template)
    if not isinstance(record, Text) or not record.cut:
        return examples
    [(ids, labels)] = examples
    return [
        (ids[start : start + sequence_len], labels[start : start + sequence_len])
        for start in range(0, len(ids), sequence_len)
        # (of a single token at the end nothing is predicted)
        if start == 0 or start + 1 < len(ids)
    ]
