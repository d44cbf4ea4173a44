"""Conversations to token ids, with loss on the assistant's turns only, and the split that holds some out.

The tokenizer's own chat template is applied incrementally: for each answer once up to and including the
generation prompt (what the model will be shown), once with the answer. What the second adds is the answer,
end-of-turn token included; everything else gets the label -100. Labels are not shifted (models do that).

Two habits of templates are allowed for. A generation prompt may end in text that the rendered answer does not
begin with (an opened thought, ``<think>``): the answer is then what follows their common beginning. And a
template may render an earlier answer differently once more turns follow (thoughts dropped, another end
token): such a conversation becomes one example an answer, each as the model will see it.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.errors import DataError
from fourfold.training.records import Conversation, Messages, read_conversations
from fourfold.training.schema import TrainConfig

IGNORED = -100
# Above this share of examples that are dropped for their length, sequence_len is wrong, not the data.
MAX_DROPPED = 0.5

Example = tuple[list[int], list[int]]


@dataclass
class Tokenized:
    """Token ids and labels of a set of conversations.

    Attributes:
        dataset: a ``datasets.Dataset`` with ``input_ids``, ``labels`` and ``length``.
        truncated: how many of its examples were cut to ``sequence_len``.
        dropped: how many examples were longer than that and are not in ``dataset``.
        tokens: all tokens in ``dataset``.
        trained_tokens: those with a label.
        largest_id: the largest token id.
        digest: a hash of ids and labels, in their order.
        first: the index of the first conversation that is in ``dataset``.
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
    packed: Any = None

    @property
    def rows(self) -> Any:
        """What the trainer draws from: packed rows, or examples."""
        return self.dataset if self.packed is None else self.packed

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


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    sequence_len: int,
    what: str,
    excess: str = "drop",
) -> Tokenized:
    """Token ids and labels of every conversation, none longer than ``sequence_len``.

    Args:
        conversations: validated records.
        tokenizer: with a chat template.
        sequence_len: the most tokens an example may have.
        what: what the conversations are, for messages.
        excess: what becomes of longer ones: ``drop``, ``truncate`` or ``raise``.

    Raises:
        DataError: no chat template, one whose answers cannot be told apart, a long example where
            ``excess`` is ``raise``, or too many examples dropped.
    """
    import datasets

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{type(tokenizer).__name__} has no chat template, so turns cannot be told apart. "
            "Use the model's chat variant, or put a chat_template.jinja beside its tokenizer."
        )
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    digest = hashlib.sha256()
    total = truncated = dropped = largest = 0
    first: int | None = None
    for index, conversation in enumerate(conversations):
        for ids, labels in encode(conversation, tokenizer):
            total += 1
            is_long = len(ids) > sequence_len
            if is_long and excess == "raise":
                raise DataError(
                    f"{conversation.source}: {len(ids)} tokens, and sequence_len is {sequence_len}. Raise "
                    "it, shorten the example, or set excess_length_strategy: drop or truncate."
                )
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
            f"Raise sequence_len{remedy}."
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
    )


def encode(conversation: Conversation, tokenizer: Any) -> list[Example]:
    """Token ids and labels (-100 outside the trained answers) of one conversation.

    Returns:
        One example; or one for each answer, where the template renders earlier turns differently once later
        ones follow.

    Raises:
        DataError: the template renders the turns before an answer differently once the answer follows, or
            leaves the answer's text out.
    """
    whole = _encode(conversation, conversation.answers, tokenizer)
    if whole is not None:
        return [whole]
    examples = [_encode(conversation, [index], tokenizer) for index in conversation.answers]
    for index, example in zip(conversation.answers, examples, strict=True):
        if example is None:
            raise DataError(
                f"{conversation.source}: the chat template renders the turns before messages[{index}] "
                "differently once that answer follows, so it cannot be told from the rest. Use a template "
                "that leaves earlier turns as they are."
            )
    return [example for example in examples if example is not None]


def _encode(conversation: Conversation, answers: Sequence[int], tokenizer: Any) -> Example | None:
    """One example with labels on ``answers``, ending with the last of them; None where what comes before any
    of them is rendered differently there."""

    def render(length: int, prompt: bool = False) -> tuple[str, list[int]]:
        return _render(conversation.messages[:length], tokenizer, prompt, conversation.source)

    # Turns after the last answer carry no label and nothing after them is predicted: leave them out.
    last = answers[-1]
    text, ids = render(last + 1)
    labels = [IGNORED] * len(ids)
    for index in answers:
        # Templates for content in parts render nothing of a plain text, and raise nothing. The last word:
        # what comes first may be a thought, which templates rewrite.
        if conversation.messages[index]["content"].split()[-1] not in text:
            if len(answers) > 1:
                return None  # an earlier one may be left out once later turns follow: tried one by one
            raise DataError(
                f"{conversation.source}: the chat template leaves out the text of messages[{index}]. It may "
                "be one for images; put a chat_template.jinja for plain text beside the tokenizer."
            )
        prompt_text, prompt_ids = render(index, prompt=True)
        before_text, _ = render(index)
        # The two differ in what opens the answer alone; all that precedes it must be there in the end.
        if not text.startswith(prompt_text[: _common_prefix(before_text, prompt_text)]):
            return None
        turn_ids = ids
        if index != last:
            turn_text, turn_ids = render(index + 1)
            if not text.startswith(turn_text):
                return None
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


def _common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _end_of_turn(ids: list[int], start: int, stop: int, tokenizer: Any) -> int:
    """``stop``, less the white space that templates put after the end-of-turn token: it is never generated.

    Only white space: where turns end otherwise, an end-of-text token may stand within an answer.
    """
    for index in range(stop - 1, start - 1, -1):
        if ids[index] == tokenizer.eos_token_id:
            return index + 1 if not tokenizer.decode(ids[index + 1 : stop]).strip() else stop
    return stop
