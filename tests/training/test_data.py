"""Labels on exactly the assistant's tokens; every bad row named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import conversation, write_jsonl

from fourfold.errors import DataError
from fourfold.training.data import (
    IGNORED,
    Conversation,
    encode,
    load_conversations,
    read_conversations,
    tokenize,
)
from fourfold.training.schema import DatasetConfig, TrainConfig


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def labelled(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[str], list[str]]:
    """All tokens, and those with a label (others as -)."""
    ids, labels = encode(Conversation(messages, "here"), tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    names = tokenizer.convert_ids_to_tokens(ids)
    return names, [name if label != IGNORED else "-" for name, label in zip(names, labels, strict=True)]


def test_exactly_the_answer_and_its_end_are_labelled(tokenizer: Any) -> None:
    tokens, trained = labelled(turns("what colour is the sky", "the sky is red"), tokenizer)
    answer = ["the", "sky", "is", "red", "<|end|>"]
    asked = ["<|user|>", "what", "colour", "is", "the", "sky", "<|end|>", "\n", "<|assistant|>"]
    assert tokens == [*asked, *answer, "\n"]
    assert trained == ["-"] * 9 + [*answer, "-"]


def test_every_answer_of_several_is_labelled(tokenizer: Any) -> None:
    messages = turns("what is red", "the sky", "what is green", "the grass", "what is white")
    tokens, trained = labelled(messages, tokenizer)
    assert [name for name in trained if name != "-"] == ["the", "sky", "<|end|>", "the", "grass", "<|end|>"]
    assert "white" not in tokens  # what follows the last answer trains nothing and is left out
    assert tokens.count("<|assistant|>") == 2


def test_a_system_turn_is_not_labelled(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": ""}, *turns("what is red", "the rose")]
    assert [name for name in labelled(messages, tokenizer)[1] if name != "-"] == ["the", "rose", "<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drops what the assistant said before, as reasoning templates drop earlier thoughts.
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|> "
        "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }} {% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    labelled(turns("what is red", "the rose"), tokenizer)
    with pytest.raises(DataError, match=r"here: the chat template is not prefix-consistent.*messages\[1\]"):
        labelled(turns("what is red", "the rose", "what is green", "the grass"), tokenizer)


def test_a_template_that_refuses_a_role(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    with pytest.raises(DataError, match=r"here: .* refuses the turns \(user, assistant\): no system"):
        labelled(turns("what", "red"), tokenizer)


def test_a_tokenizer_without_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="has no chat template"):
        tokenize([Conversation(turns("what", "red"), "here")], tokenizer, 64, "datasets")


def test_long_examples_are_cut_and_counted(tokenizer: Any) -> None:
    short, long = turns("what", "red"), turns("what", " ".join(["red"] * 40))
    hopeless = turns(" ".join(["what"] * 40), "red")
    result = tokenize(
        [Conversation(messages, "here") for messages in (short, long, short, hopeless)],
        tokenizer,
        16,
        "datasets",
    )
    assert [len(ids) for ids in result.dataset["input_ids"]] == [8, 16, 8]
    assert result.to_dict() == {
        "examples": 3,
        "truncated": 2,
        "dropped": 1,
        "tokens": 32,
        "trained_tokens": 2 + 11 + 2,
    }
    assert all(len(row["input_ids"]) == len(row["labels"]) == row["length"] for row in result.dataset)


def test_answers_lost_to_truncation_are_an_error(tokenizer: Any) -> None:
    hopeless = Conversation(turns(" ".join(["what"] * 40), "red"), "here")
    with pytest.raises(DataError, match=r"datasets: 3 of 3 .* no token of an answer within sequence_len: 16"):
        tokenize([hopeless] * 3, tokenizer, 16, "datasets")


BAD_ROWS: list[tuple[Any, str]] = [
    ("", "empty row"),
    ("   ", "empty row"),
    ("{not json", "not valid JSON"),
    ("[]", "a list, not an object with `messages`"),
    ("{}", "empty"),
    ({"message": []}, "no field `messages`. Did you mean `message`?"),
    ({"messages": "hello"}, "`messages` is no list of turns"),
    ({"messages": []}, "`messages` is empty"),
    ({"messages": ["hello"]}, "messages[0] is a str"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is no string"),
    ({"messages": [{"from": "user", "content": "a"}]}, "messages[0].role is missing"),
    ({"messages": turns("a", " ")}, "messages[1].content is empty"),
    ({"messages": [{"role": "asistant", "content": "a"}]}, "messages[0].role is 'asistant'. Did you mean"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0] is the assistant's"),
    ({"messages": turns("a")}, "no turn of the assistant"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: Any, said: str) -> None:
    good = json.dumps(conversation(0))
    path = tmp_path / "rows.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text("\n".join([good, text, good, ""]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_conversations(DatasetConfig(path=str(path)))
    assert f"{path}, line 2: {said}" in str(caught.value)
    assert "1 bad rows" in str(caught.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{}] * 9)
    with pytest.raises(DataError, match="9 bad rows") as caught:
        read_conversations(DatasetConfig(path=str(path)))
    assert "and 4 more" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.jsonl", "", "holds no record"),
        ("d.json", "[]", "holds no record"),
        ("d.json", "{}", "holds a dict, not a list of records"),
        ("d.json", "[1,\n2,]", "line 2: not valid JSON"),
        ("d.parquet", "x", "not a .jsonl or .json file"),
    ],
)
def test_files_that_hold_no_records(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_conversations(DatasetConfig(path=str(tmp_path / name)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_conversations(DatasetConfig(path=str(tmp_path / "nowhere.jsonl")))


def test_json_lists_and_other_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"turns": turns("a", "b c")}]))
    [record] = read_conversations(DatasetConfig(path=str(path), field_messages="turns"))
    assert record.messages == turns("a", "b c")
    assert record.source == f"{path}, record 1"


def test_a_line_separator_inside_a_string_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    text = json.dumps({"messages": turns("a\u2028b", "c")}, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    assert len(read_conversations(DatasetConfig(path=str(path)))) == 1


def config_of(path: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(base_model="m", adapter="lora", datasets=[{"path": str(path)}], **changes)


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (0.25, 5), (3, 3)])
def test_val_set_size_splits_without_overlap(tmp_path: Path, size: float, held_out: int) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": turns("what", f"answer {i}")} for i in range(20)])
    train, test = load_conversations(config_of(path, val_set_size=size))
    assert (len(train), len(test)) == (20 - held_out, held_out)
    assert len({record.source for record in (*train, *test)}) == 20
    assert load_conversations(config_of(path, val_set_size=size))[1] == test
    if held_out:
        assert load_conversations(config_of(path, val_set_size=size, seed=1))[1] != test


@pytest.mark.parametrize(("size", "said"), [(20, "none is left"), (0.01, "is none")])
def test_val_set_size_that_leaves_nothing(tmp_path: Path, size: float, said: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": turns("what", "red")}] * 20)
    with pytest.raises(DataError, match=said):
        load_conversations(config_of(path, val_set_size=size))
