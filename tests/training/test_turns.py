"""Which turns, and which end tokens, are trained: by role, by mark, by dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import DataError
from fourfold.training.data import tokenize
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.encode import IGNORED, encode, sample_of
from fourfold.training.prepared import templates_of
from fourfold.training.read_config import examine
from fourfold.training.records import Conversation, read_records
from fourfold.training.schema import TrainConfig
from tiny_chat import byte_tokenizer, write_jsonl

SAID = [
    ("system", "is"),
    ("user", "what is red"),
    ("assistant", "the rose"),
    ("user", "what is green"),
    ("assistant", "the grass"),
]


def record(*marks: Any, said: Any = SAID, field: str = "train") -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    for turn, mark in zip(turns, marks, strict=False):
        turn[field] = mark
    return {"messages": turns}


def read(tmp_path: Path, row: Any, train_on_inputs: bool = False, **keys: Any) -> Conversation:
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    [found] = read_records(DatasetConfig(path=str(path), **keys), train_on_inputs).records
    assert isinstance(found, Conversation)
    return found


def trained(conversation: Conversation, tokenizer: Any) -> list[str]:
    """The trained tokens, each run of them as text."""
    [(ids, labels)] = encode(conversation, tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


END = "<|end|>"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [f"the rose {END}", f"the grass {END}"]),
        ({"roles_to_train": ["gpt"]}, [f"the rose {END}", f"the grass {END}"]),
        ({"roles_to_train": "user"}, [f"what is red {END}", f"what is green {END}"]),
        (
            {"roles_to_train": ["human", "assistant"]},
            [f"what is red {END}", f"the rose {END}", f"what is green {END}", f"the grass {END}"],
        ),
        ({"train_on_eos": "none"}, ["the rose", "the grass"]),
        ({"train_on_eos": "last"}, ["the rose", f"the grass {END}"]),
        ({"train_on_eot": "none"}, ["the rose", "the grass"]),
        ({"train_on_eos": "all"}, [END, END, f"the rose {END}", END, f"the grass {END}"]),
        (
            {"train_on_eos": "all", "roles_to_train": ["user"]},
            [END, f"what is red {END}", END, f"what is green {END}"],
        ),
        ({"drop_system_message": True}, [f"the rose {END}", f"the grass {END}"]),
    ],
)
def test_roles_and_ends(keys: dict[str, Any], expected: list[str], tmp_path: Path, tokenizer: Any) -> None:
    conversation = read(tmp_path, record(), **keys)
    assert trained(conversation, tokenizer) == expected
    assert len(conversation.messages) == (4 if "drop_system_message" in keys else 5)


def test_every_turn_with_train_on_inputs(tmp_path: Path, tokenizer: Any) -> None:
    conversation = read(tmp_path, record(), True)
    runs = trained(conversation, tokenizer)
    assert runs == [f"{text} {END}" for _, text in SAID]
    sample = sample_of(conversation, tokenizer)
    assert (sample.question, sample.reference) == ("what is red", "the rose")


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((None, None, False), [f"the grass {END}"]),
        ((None, True, False, None, True), [f"what is red {END}", f"the grass {END}"]),
        ((), [f"the rose {END}", f"the grass {END}"]),
    ],
)
def test_marks_come_before_roles(marks: Any, expected: list[str], tmp_path: Path, tokenizer: Any) -> None:
    conversation = read(tmp_path, record(*marks), message_field_training="train")
    assert trained(conversation, tokenizer) == expected


def test_marks_that_train_nothing_or_are_none(tmp_path: Path) -> None:
    for marks, said in (
        ([False] * 5, "no turn is marked as trained"),
        ([None, 1], r"messages\[1\].train is 1: true"),
    ):
        with pytest.raises(DataError, match=said):
            read(tmp_path, record(*marks), message_field_training="train")
    with pytest.raises(DataError, match=r"messages\[0\].train is not supported and would be left out"):
        read(tmp_path, record(True))  # a mark that nobody named
    with pytest.raises(DataError, match="no turn of tool, so nothing to train on"):
        read(tmp_path, record(), roles_to_train=["tool"])


def test_bytes_show_the_boundary_to_the_character(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    rows = record(said=[("user", " Hä? "), ("assistant", "Ja…")])
    assert trained(read(tmp_path, rows), tokenizer) == ["Ja…</s>"]
    assert trained(read(tmp_path, rows, roles_to_train=["user"]), tokenizer) == ["Hä?</s>"]
    assert trained(read(tmp_path, rows, True), tokenizer) == ["Hä?</s>", "Ja…</s>"]


@pytest.mark.parametrize("text", ["user", "use", "s", "a", "[", "You", "Xa", "X"])
def test_a_text_that_the_template_writes_too_is_trained_where_it_stands(tmp_path: Path, text: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "[system]\nYou are Xa.{{ eos_token }}\n{% for m in messages %}[{{ m['role'] }}]\n"
        "{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    rows = record(said=[("user", text), ("assistant", "A"), ("user", text), ("assistant", "B")])
    expected = [f"{text}</s>", "A</s>", f"{text}</s>", "B</s>"]
    assert trained(read(tmp_path, rows, True), tokenizer) == expected


def test_sharegpt_is_read_under_its_own_names(tmp_path: Path, tokenizer: Any) -> None:
    row = {"conversations": [{"from": "human", "value": "what is red"}, {"from": "gpt", "value": "the rose"}]}
    conversation = read(tmp_path, row, type="sharegpt")
    assert trained(conversation, tokenizer) == [f"the rose {END}"]
    names = {
        "message_field_role": "from",
        "message_field_content": "value",
        "field_messages": "conversations",
    }
    assert read(tmp_path, row, type="chat_template", **names).messages == conversation.messages


def test_a_dataset_may_have_a_template_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    row = record(said=[("user", "what is red"), ("assistant", "the rose")])
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", [row])) for name in "ab"]
    own = "{% for m in messages %}{{ m['content'] }} <|end|>{% endfor %}"
    config = TrainConfig(
        base_model="m",
        adapter="lora",
        datasets=[
            {"path": paths[0]},
            {"path": paths[1], "chat_template": "jinja", "chat_template_jinja": own},
        ],
    )
    records = [r for entry in config.datasets for r in read_records(entry).records]
    result = tokenize(records, tokenizer, 64, "datasets", "drop", templates_of(config, tokenizer))
    first, second = (tokenizer.decode(ids) for ids in result.dataset["input_ids"])
    assert "<|assistant|>" in first
    assert "<|assistant|>" not in second
    assert tokenizer.decode([x for x in result.dataset["labels"][1] if x != IGNORED]) == "the rose <|end|>"


@pytest.mark.parametrize(
    ("entry", "key", "said"),
    [
        ("type: alpaca, roles_to_train: [user]", "roles_to_train", "is about turns, and this type has none"),
        ("type: completion, chat_template: chatml", "chat_template", "is about turns"),
        ("field: body", "field", "names the text of type: completion"),
        ("roles_to_train: [narrator]", "roles_to_train", "`narrator` is no role here"),
        ("chat_template: jinja", "chat_template", "belong together"),
        ("chat_template_jinja: x", "chat_template_jinja", "belong together"),
        ("message_field_training: role", "message_field_training", "has a meaning of its own"),
        ("type: {format: a, fmt: b}", "type.fmt", "unknown key"),
        ("type: alpca", "type", "is not one of"),
        ("train_on_eos: never", "train_on_eos", "is not one of"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, entry: str, key: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"base_model: m\nadapter: lora\ndatasets:\n  - {{path: d.jsonl, {entry}}}\n", encoding="utf-8"
    )
    [problem] = examine(path).problems
    assert (problem.key, problem.where) == (f"datasets.0.{key}", "line 4")
    assert said in str(problem)


def test_every_turn_and_chosen_roles_contradict_each_other(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    text = "base_model: m\nadapter: lora\ntrain_on_inputs: true\n"
    path.write_text(text + "datasets: [{path: d.jsonl, roles_to_train: [user]}]\n", encoding="utf-8")
    assert (
        "line 4, datasets.0.roles_to_train: train_on_inputs: true trains every turn"
        in examine(path).complaint()
    )
