"""Records to token ids and labels: loss on what is trained, -100 elsewhere. Labels are not shifted (models do
that).

The tokenizer's own chat template is applied incrementally: for each answer once up to and including the
generation prompt (what the model will be shown), once with the answer. What the second adds is the answer,
end-of-turn token included. Of a turn that is not the assistant's what is trained begins with its text.

Two habits of templates are allowed for. A generation prompt may end in text that the rendered answer does not
begin with (an opened thought, ``<think>``): the answer is then what follows their common beginning. And a
template may render an earlier answer differently once more turns follow (thoughts dropped, another end
token): such a conversation becomes one example an answer, each as the model will see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.errors import DataError
from fourfold.training.records import Conversation, Messages, Record
from fourfold.training.texts import Text

IGNORED = -100
SHOWN_WORDS = 8

Example = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Sample:
    """One question to put to the model.

    Attributes:
        ids: what it is shown.
        question: the same for people.
        reference: the answer in the data.
    """

    ids: list[int]
    question: str
    reference: str


def encode(record: Record, tokenizer: Any, template: str | None = None) -> list[Example]:
    """Token ids and labels (-100 outside what is trained) of one record.

    Args:
        record: a conversation or a text.
        tokenizer: with a chat template, where there are conversations.
        template: instead of the tokenizer's.

    Returns:
        One example; or one for each answer, where the template renders earlier turns differently once later
        ones follow.

    Raises:
        DataError: the template renders the turns before an answer differently once the answer follows, or
            leaves the answer's text out; or a text's end cannot be marked.
    """
    if isinstance(record, Text):
        return [_encode_text(record, tokenizer)]
    rendered = _Rendered(record, tokenizer, template)
    whole = _encode(rendered, record.answers)
    if whole is not None:
        return [whole]
    examples = [_encode(rendered, [index]) for index in record.answers]
    for index, example in zip(record.answers, examples, strict=True):
        if example is None:
            raise DataError(
                f"{record.source}: the chat template renders the turns before messages[{index}] "
                "differently once that answer follows, so it cannot be told from the rest. Use a template "
                "that leaves earlier turns as they are."
            )
    return [example for example in examples if example is not None]


def sample_of(record: Record, tokenizer: Any, template: str | None = None) -> Sample:
    """What comes before the first answer, and that answer; of plain text its beginning, and what follows."""
    if isinstance(record, Text):
        ids = _start_of_text(tokenizer) if record.framed else []
        question, reference = record.question, record.pieces[record.asked][0]
        for text, _ in record.pieces[: record.asked]:
            ids = ids + _ids(text, tokenizer)
        if not record.asked:
            question = " ".join(reference.split()[:SHOWN_WORDS])
            reference = " ".join(reference.split()[SHOWN_WORDS : 4 * SHOWN_WORDS])
            ids = ids + _ids(question, tokenizer)
        return Sample(ids, question, reference)
    rendered = _Rendered(record, tokenizer, template)
    spoken = [index for index, turn in enumerate(record.messages) if turn["role"] == "assistant"]
    index = next((index for index in spoken if index in record.answers), next(iter(spoken), None))
    if index is None:  # only others speak
        index = len(record.messages)
    reference = record.messages[index]["content"] if index < len(record.messages) else ""
    return Sample(rendered(index, prompt=True)[1], record.messages[index - 1]["content"], reference)


class _Rendered:
    """A conversation's turns as text and as token ids, by the template; each rendered once."""

    def __init__(self, conversation: Conversation, tokenizer: Any, template: str | None) -> None:
        self.conversation, self.tokenizer, self.template = conversation, tokenizer, template
        self.known: dict[tuple[int, bool], tuple[str, list[int]]] = {}

    def __call__(self, length: int, prompt: bool = False) -> tuple[str, list[int]]:
        """The first ``length`` turns, with the generation prompt after them if asked for."""
        if (length, prompt) not in self.known:
            self.known[length, prompt] = self._render(self.conversation.messages[:length], prompt)
        return self.known[length, prompt]

    def with_another_text(self, index: int) -> str:
        """The turns up to one of them, that one with a text that begins with another character; nothing where
        the template refuses that."""
        *before, turn = self.conversation.messages[: index + 1]
        other = "Y" if turn["content"].strip()[:1] == "X" else "X"
        try:
            return self._render([*before, {**turn, "content": other}], prompt=False)[0]
        except DataError:  # (one that reads a turn's text as JSON)
            return ""

    def _render(self, messages: Messages, prompt: bool) -> tuple[str, list[int]]:
        given = {} if self.template is None else {"chat_template": self.template}
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **given
            )
        except Exception as error:  # templates raise what they like (jinja2's own, TypeError...)
            roles = ", ".join(turn["role"] for turn in messages)
            raise DataError(
                f"{self.conversation.source}: the chat template refuses the turns ({roles}): {error}"
            ) from error
        return text, _ids(text, self.tokenizer)


def _encode(rendered: _Rendered, answers: Sequence[int]) -> Example | None:
    """One example with labels on ``answers``, ending with the last of them; None where what comes before any
    of them is rendered differently there."""
    conversation, tokenizer = rendered.conversation, rendered.tokenizer
    # Turns after the last answer carry no label and nothing after them is predicted: leave them out.
    last = answers[-1]
    text, ids = rendered(last + 1)
    labels = [IGNORED] * len(ids)
    for index in answers:
        # Templates for content in parts render nothing of a plain text, and raise nothing. The last word:
        # what comes first may be a thought, which templates rewrite.
        if conversation.messages[index]["content"].split()[-1:] and (
            conversation.messages[index]["content"].split()[-1] not in text
        ):
            if len(answers) > 1:
                return None  # an earlier one may be left out once later turns follow: tried one by one
            raise DataError(
                f"{conversation.source}: the chat template leaves out the text of messages[{index}]. It may "
                "be one for images; put a chat_template.jinja for plain text beside the tokenizer."
            )
        start = _start_of_turn(rendered, index, text, ids)
        turn_ids = ids
        if index != last:
            turn_text, turn_ids = rendered(index + 1)
            if not text.startswith(turn_text):
                return None
        if start is None:
            return None
        stop = _end_of_turn(ids, start, _common_prefix(turn_ids, ids), tokenizer)
        labels[start:stop] = ids[start:stop]
        if conversation.ends != "turn" and ids[stop - 1] == tokenizer.eos_token_id:
            labels[stop - 1] = IGNORED
    if conversation.ends in ("all", "last"):
        return _with_ends(rendered, last, ids, labels)
    return ids, labels


def _start_of_turn(rendered: _Rendered, index: int, text: str, ids: list[int]) -> int | None:
    """Where in ``ids``, the whole ``text``, the trained part of a turn begins; None where what comes before
    is rendered differently there.

    A token that straddles the boundary belongs to the turn: the common prefix ends before it.
    """
    turn = rendered.conversation.messages[index]
    before_text = rendered(index)[0] if index else ""
    if turn["role"] == "assistant":
        prompt_text, prompt_ids = rendered(index, prompt=True)
        # The two differ in what opens the answer alone; all that precedes it must be there in the end.
        if not text.startswith(prompt_text[: _common_prefix(before_text, prompt_text)]):
            return None
        return _common_prefix(prompt_ids, ids)
    if not text.startswith(before_text):
        return None
    # Where the text begins is where another text would show: looked for as it is, it may be found in what
    # the template writes before it (a user's "use" in "user").
    at = max(len(before_text), _common_prefix(text, rendered.with_another_text(index)))
    if not text.startswith(turn["content"].strip(), at):
        at = text.find(turn["content"].strip(), at)
    return None if at < 0 else _common_prefix(_ids(text[:at], rendered.tokenizer), ids)


def _with_ends(rendered: _Rendered, last: int, ids: list[int], labels: list[int]) -> Example | None:
    """With labels on the end tokens of every turn, or of the last one."""
    every = rendered.conversation.ends == "all"
    before = 0
    for index in range(last + 1):
        stop = len(ids) if index == last else _common_prefix(rendered(index + 1)[1], ids)
        stop = _end_of_turn(ids, before, stop, rendered.tokenizer)
        if stop > before and (every or index == last) and ids[stop - 1] == rendered.tokenizer.eos_token_id:
            labels[stop - 1] = ids[stop - 1]
        before = max(before, stop)
    return ids, labels


def _encode_text(record: Text, tokenizer: Any) -> Example:
    ids = _start_of_text(tokenizer) if record.framed else []
    labels = [IGNORED] * len(ids)
    for text, trained in record.pieces:
        piece = _ids(text, tokenizer)
        ids = ids + piece
        labels += piece if trained else [IGNORED] * len(piece)
    if record.framed:
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError(
                f"{record.source}: the tokenizer has no end-of-text token, so that a text's end could not be "
                "learned. Name one in special_tokens: {eos_token: ...}."
            )
        ids, labels = [*ids, end], [*labels, end]
    return ids, labels


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _start_of_text(tokenizer: Any) -> list[int]:
    """What the tokenizer writes before a text: its beginning-of-text token, or nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


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
