"""Records without turns: exactly their prompts, exactly the answer trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import DataError
from fourfold.training.data import tokenize
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.encode import IGNORED, encode, sample_of
from fourfold.training.records import Conversation, Record, read_records
from fourfold.training.texts import Text
from tiny_chat import byte_tokenizer, write_jsonl

TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request.\n\n"


def read(tmp_path: Path, record: Any, train_on_inputs: bool = False, **keys: Any) -> Record:
    path = write_jsonl(tmp_path / "d.jsonl", [record])
    [found] = read_records(DatasetConfig(path=str(path), **keys), train_on_inputs).records
    return found


def told_apart(record: Record, tokenizer: Any) -> tuple[str, str]:
    """What is shown before the trained tokens, and these, both as text; they must be two runs."""
    [(ids, labels)] = encode(record, tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    assert IGNORED not in labels[first:]
    return tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])


@pytest.mark.parametrize(
    ("type_", "record", "prompt", "answer"),
    [
        (
            "alpaca",
            {"instruction": "Add.", "input": "2 and 3", "output": "5"},
            f"{TASK}, paired with an input that provides further context. {REQUEST}### Instruction:\nAdd.\n\n"
            "### Input:\n2 and 3\n\n### Response:\n",
            "5",
        ),
        (
            "alpaca",
            {"instruction": "Say {input}.", "input": "", "output": "x", "text": "said elsewhere"},
            f"{TASK}. {REQUEST}### Instruction:\nSay {{input}}.\n\n### Response:\n",
            "x",
        ),
        (
            "alpaca_chat",
            {"instruction": "Add.", "input": None, "output": "5"},
            f"{TASK}. {REQUEST}USER: Add.\nASSISTANT:",
            "5",
        ),
        (
            "alpaca_chat.load_qa",
            {"question": "2 + 3?", "answer": "5"},
            f"{TASK}. {REQUEST}USER: 2 + 3?\nASSISTANT:",
            "5",
        ),
        (
            "alpaca_w_system.load_open_orca",
            {"system_prompt": "Be brief.", "question": "2 + 3?", "response": "5"},
            "### System:\nBe brief.\n### Human:\n2 + 3?\n### Assistant:\n",
            "5",
        ),
        (
            {
                "format": "Q: {instruction} {input}\nA:",
                "system_prompt": "Sum.",
                "system_format": "<{system}>",
            },
            {"instruction": "2 {and}", "input": "3", "output": " 5"},
            "<Sum.>Q: 2 {and} 3\nA:",
            " 5",
        ),
        (
            {"format": "{input}?", "no_input_format": "{instruction}!", "field_instruction": "do"},
            {"do": "Go", "output": "done"},
            "Go!",
            "done",
        ),
        ("prompt_completion", {"prompt": "2 + 3 =", "completion": " 5"}, "2 + 3 =", " 5"),
    ],
)
@pytest.mark.parametrize("begin", [True, False])
def test_prompts_are_shown_and_answers_trained(
    type_: Any, record: Any, prompt: str, answer: str, begin: bool, tmp_path: Path
) -> None:
    found = read(tmp_path, record, type=type_)
    tokenizer = byte_tokenizer(begin)
    start = "<s>" if begin else ""
    assert told_apart(found, tokenizer) == (start + prompt, answer + "</s>")
    sample = sample_of(found, tokenizer)
    assert tokenizer.decode(sample.ids) == start + prompt
    assert (sample.question, sample.reference) == (prompt, answer)


def test_prompts_are_trained_with_train_on_inputs(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "output": "5"}
    found = read(tmp_path, record, True, type="alpaca")
    shown, trained = told_apart(found, byte_tokenizer())
    assert shown == "<s>"
    assert trained.startswith(TASK)
    assert trained.endswith("### Response:\n5</s>")
    assert sample_of(found, byte_tokenizer()).reference == "5"  # still the answer is asked for


def test_segments_are_taken_as_they_stand(tmp_path: Path) -> None:
    segments = [{"label": False, "text": "<s>Q "}, {"label": True, "text": "A</s>"}]
    record = read(tmp_path, {"segments": segments}, type="input_output")
    tokenizer = byte_tokenizer()
    assert told_apart(record, tokenizer) == ("<s>Q ", "A</s>")
    [(ids, _)] = encode(record, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


def test_prompt_and_completion_may_be_turns(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": role, "content": said} for role, said in (("user", "what"), ("assistant", "the sky"))]
    again = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "red"}]
    record = read(
        tmp_path, {"prompt": [*turns, again[0]], "completion": [again[1]]}, type="prompt_completion"
    )
    assert isinstance(record, Conversation)
    [(ids, labels)] = encode(record, tokenizer)
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "red <|end|>"
    assert "sky" in tokenizer.decode(ids)  # shown, not trained: it is the prompt's


def test_plain_text_is_cut_into_lengths_of_sequence_len(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    record = read(tmp_path, {"body": "a" * 29}, type="completion", field="body")
    result = tokenize([record], tokenizer, 10, "datasets", "raise")  # (nothing is too long: it is cut)
    assert result.to_dict() == {
        "examples": 3,
        "truncated": 0,
        "dropped": 0,
        "tokens": 30,
        "trained_tokens": 27,  # each first one is predicted by nothing
    }
    # (31 tokens: the last one alone would be predicted by nothing)
    assert "".join(tokenizer.decode(ids) for ids in result.dataset["input_ids"]) == "<s>" + "a" * 29
    sample = sample_of(read(tmp_path, {"text": " ".join("abcdefghij")}, type="completion"), tokenizer)
    assert (sample.question, sample.reference) == ("a b c d e f g h", "i j")


def test_a_text_whose_end_cannot_be_marked(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: the tokenizer has no end-of-text token"):
        encode(read(tmp_path, {"prompt": "a", "completion": "b"}, type="prompt_completion"), tokenizer)


BAD: list[tuple[str, Any, str]] = [
    ("alpaca", {"input": "x", "output": "y"}, "no field `instruction`"),
    ("alpaca", {"instruction": "x", "outptu": "y"}, "no field `output`. Did you mean `outptu`?"),
    ("alpaca", {"instruction": "x", "output": " "}, "`output` is empty"),
    ("alpaca", {"instruction": "x", "output": None}, "`output` is null, not a text"),
    ("alpaca", {"instruction": "x", "output": ["y"]}, "`output` is a list, not a text"),
    ("alpaca", {"instruction": "x", "input": 5, "output": "y"}, "`input` is a int, not a text"),
    ("alpaca", {"instruction": "x", "output": "y", "history": [["a", "b"]]}, "`history` is not part of the"),
    ("alpaca", {"instruction": "x", "output": "y", "system": "z"}, "`system` is not part of the prompt"),
    ("alpaca", {"instruction": "x\ud800", "output": "y"}, "`instruction` holds half a character"),
    ("alpaca", [], "a list, not an object"),
    ("alpaca", {}, "empty"),
    ("completion", {"body": "x"}, "no field `text`"),
    ("completion", {"text": ""}, "`text` is empty"),
    ("prompt_completion", {"prompt": "x"}, "no field `completion`"),
    ("prompt_completion", {"prompt": [], "completion": "y"}, "`prompt` is a list, not a text"),
    ("prompt_completion", {"prompt": [{"role": "user"}], "completion": []}, "messages[0].content is missing"),
    ("input_output", {"segments": "x"}, "`segments` is no list"),
    ("input_output", {"segments": [{"label": 1, "text": "x"}]}, "segments[0].label is 1"),
    ("input_output", {"segments": [{"label": True}]}, "segments[0].text is missing"),
    ("input_output", {"segments": ["x"]}, "segments[0] is a str"),
    ("input_output", {"segments": [{"label": False, "text": "x"}]}, "no segment has label: true"),
]


@pytest.mark.parametrize(("type_", "row", "said"), BAD)
def test_a_bad_row_is_named_with_file_and_line(type_: str, row: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_records(DatasetConfig(path=str(path), type=type_))
    assert f"{path}, line 1: {said}" in str(caught.value)


def test_few_bad_rows_of_many_are_left_out_and_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"row {index}"} for index in range(99)]
    path = write_jsonl(tmp_path / "d.jsonl", [*rows[:40], {"text": " "}, *rows[40:]])
    entry = DatasetConfig(path=str(path), type="completion")
    found = read_records(entry, max_bad=0.01)
    assert len(found.records) == 99
    assert all(isinstance(record, Text) for record in found.records)
    assert found.bad == [f"{path}, line 41: `text` is empty"]
    with pytest.raises(DataError, match=r"1 bad row of 100; mend or remove it:\n  .*line 41: `text` is"):
        read_records(entry, max_bad=0.009)
