"""Labels on exactly the assistant's tokens; every bad row named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl

from fourfold.errors import DataError
from fourfold.training.data import load_records, tokenize
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.encode import IGNORED, encode
from fourfold.training.records import Conversation, read_records
from fourfold.training.schema import TrainConfig
from tiny_chat import conversation, write_jsonl


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def labelled(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[str], list[str]]:
    """All tokens, and those with a label (others as -)."""
    [(ids, labels)] = encode(Conversation(messages, "here"), tokenizer)
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


def answers_of(conversation: Conversation, tokenizer: Any) -> list[tuple[str, str]]:
    """For each example what is shown before its first label, and what is labelled."""
    result = []
    for ids, labels in encode(conversation, tokenizer):
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        first = next(index for index, label in enumerate(labels) if label != IGNORED)
        trained = [label for label in labels if label != IGNORED]
        result.append((tokenizer.decode(ids[:first]), tokenizer.decode(trained)))
    return result


def test_a_template_that_rewrites_earlier_turns_gives_an_example_an_answer(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drops what the assistant said before, as reasoning templates drop earlier thoughts.
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|> "
        "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }} {% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    both = Conversation(turns("what is red", "the rose", "what is green", "the grass"), "here")
    [(shown, first), (then, second)] = answers_of(both, tokenizer)
    assert (first, second) == ("the rose <|end|>", "the grass <|end|>")
    assert "rose" not in shown
    assert "rose" not in then  # dropped by the template: as the model will see it
    assert tokenize([both], tokenizer, 64, "datasets").to_dict()["examples"] == 2


def test_a_template_that_rewrites_what_the_answer_follows_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {% if loop.last %}{{ m['content'] }} {% endif %}"
        "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(
        DataError, match=r"here: .* before messages\[1\] differently once that answer follows"
    ):
        labelled(turns("what is red", "the rose"), tokenizer)


TRL_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
# Their content is lists of parts, and not text.
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")


def byte_tokenizer(template: str) -> Any:
    """Every text to ids and back, as real tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eos|>", bos_token="<|bos|>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("answers", [1, 2, 3])
def test_templates_of_published_models(path: Path, answers: int) -> None:
    said = ["It is alpha.", "It is beta.", "It is gamma."][:answers]
    asked = [f"Question {letter}?" for letter in "PQR"][:answers]
    messages = turns(*(text for pair in zip(asked, said, strict=True) for text in pair))
    tokenizer = byte_tokenizer(path.read_text(encoding="utf-8"))
    if path.stem.startswith(PARTS_ONLY):
        with pytest.raises(DataError, match=r"leaves out the text of messages\[1\]|refuses the turns"):
            encode(Conversation(messages, "here"), tokenizer)
        return
    examples = encode(Conversation(messages, "here"), tokenizer)
    assert len(examples) in (1, answers)
    labelled_text = ""
    for ids, labels in examples:
        text = tokenizer.decode([label for label in labels if label != IGNORED])
        assert "Question" not in text
        labelled_text += text
        assert asked[0] in tokenizer.decode(ids)
    for answer in said:
        assert labelled_text.count(answer) == 1, labelled_text


def test_an_end_of_text_token_within_an_answer_does_not_cut_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Turns end otherwise here, and the end-of-text token is a word like any other.
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    trained = labelled(turns("what is red", "the rose <|end|> is red the sky"), tokenizer)[1]
    assert [name for name in trained if name != "-"] == ["the", "rose", "<|end|>", "is", "red", "the", "sky"]


def test_weight_0_is_shown_and_not_trained(tokenizer: Any, tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = [
        *turns("what is red", "the rose", "what is green", "the grass", "what is white", "the snow")
    ]
    for index, weight in ((1, 0), (3, 1), (5, 0)):
        messages[index]["weight"] = weight
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages, "id": 7, "tools": None}])
    [record] = read_records(DatasetConfig(path=str(path))).records
    [(shown, trained)] = answers_of(record, tokenizer)
    assert trained == "the grass <|end|>"
    assert "rose" in shown


def test_a_template_that_refuses_a_role(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    with pytest.raises(DataError, match=r"here: .* refuses the turns \(user, assistant\): no system"):
        labelled(turns("what", "red"), tokenizer)


def test_a_tokenizer_without_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    monkeypatch.setattr(tokenizer, "name_or_path", "some/model")
    said = "here: a conversation, and the tokenizer of some/model has no chat template"
    with pytest.raises(DataError, match=said):
        tokenize([Conversation(turns("what", "red"), "here")], tokenizer, 64, "datasets")


@pytest.mark.parametrize(
    ("excess", "lengths", "counts"),
    [
        ("drop", [8, 8, 8], {"truncated": 0, "dropped": 2, "tokens": 24, "trained_tokens": 6}),
        ("truncate", [8, 16, 8, 8], {"truncated": 1, "dropped": 1, "tokens": 40, "trained_tokens": 17}),
    ],
)
def test_long_examples_are_dropped_or_cut_and_counted(
    tokenizer: Any, excess: str, lengths: list[int], counts: dict[str, int]
) -> None:
    short, long = turns("what", "red"), turns("what", " ".join(["red"] * 40))
    hopeless = turns(" ".join(["what"] * 40), "red")
    records = [Conversation(messages, "here") for messages in (short, long, short, hopeless, short)]
    result = tokenize(records, tokenizer, 16, "datasets", excess)
    assert [len(ids) for ids in result.dataset["input_ids"]] == lengths
    assert result.to_dict() == {"examples": len(lengths), **counts}
    said, *places = result.too_long("datasets")
    assert said.startswith(f"datasets: {counts['truncated'] or counts['dropped']} ")
    assert places == ["  here: 47 tokens", "  here: 47 tokens"]
    assert all(len(row["input_ids"]) == len(row["labels"]) == row["length"] for row in result.dataset)


def test_long_examples_may_be_an_error(tokenizer: Any) -> None:
    long = Conversation(turns("what", " ".join(["red"] * 40)), "d.jsonl, line 3")
    with pytest.raises(DataError, match=r"d\.jsonl, line 3: 47 tokens, and sequence_len is 16"):
        tokenize([long], tokenizer, 16, "datasets", "raise")


@pytest.mark.parametrize(
    ("excess", "said"), [("drop", "are longer than"), ("truncate", "have no token of an answer within")]
)
def test_most_examples_dropped_is_an_error(tokenizer: Any, excess: str, said: str) -> None:
    hopeless = Conversation(turns(" ".join(["what"] * 40), "red"), "here")
    expected = rf"datasets: 3 of 3 examples {said} sequence_len: 16[^\n]*\n  here: \d+ tokens"
    with pytest.raises(DataError, match=expected):
        tokenize([hopeless] * 3, tokenizer, 16, "datasets", excess)


def test_the_digest_tells_data_apart(tokenizer: Any) -> None:
    records = [Conversation(turns("what", answer), "here") for answer in ("red", "green")]
    digests = {tokenize(some, tokenizer, 64, "d").digest for some in (records, records[::-1], records[:1])}
    assert len(digests) == 3
    assert tokenize(records, tokenizer, 64, "d").digest in digests


def with_turn(**fields: Any) -> dict[str, Any]:
    """A sound record whose answer has further fields."""
    messages: list[dict[str, Any]] = [*turns("a", "b")]
    messages[1].update(fields)
    return {"messages": messages}


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
    ('""', "a str, not an object with `messages`"),
    ('"hello"', "a str, not an object with `messages`"),
    ("[" * 100_000, "no JSON that can be read"),
    ("1" * 5000, "no JSON that can be read"),
    (with_turn(content="a\ud800"), "messages[1].content holds half a character (\\ud800 alone)"),
    ({**with_turn(), "tools": [{"name": "f"}]}, "`tools` is not supported and would be left out"),
    (with_turn(tool_calls=[{"id": 1}]), "messages[1].tool_calls is not supported"),
    (with_turn(reasoning_content="hm"), "messages[1].reasoning_content is not supported"),
    (with_turn(name="Bo"), "messages[1].name is not supported"),
    (with_turn(weight=0.5), "messages[1].weight is 0.5"),
    (with_turn(weight=True), "messages[1].weight is True"),
    (with_turn(weight=0), "every turn of the assistant has weight 0"),
    ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages[0].weight is 1, but only"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: Any, said: str) -> None:
    good = json.dumps(conversation(0))
    path = tmp_path / "rows.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text("\n".join([good, text, good, ""]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_records(DatasetConfig(path=str(path)))
    assert f"{path}, line 2: {said}" in str(caught.value)
    assert "1 bad row of " in str(caught.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{}] * 9)
    with pytest.raises(DataError, match="9 bad rows") as caught:
        read_records(DatasetConfig(path=str(path)))
    assert "and 4 more" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.jsonl", "", "holds no record"),
        ("d.json", "[]", "holds no record"),
        ("d.json", "{}", "holds a dict, not a list of records"),
        ("d.json", "[1,\n2,]", "line 2: not valid JSON"),
        ("d.parquet", "x", "cannot be read"),
        ("d.xml", "x", "not a .jsonl, .json, .csv, .tsv, .txt, .text, .parquet, .arrow file"),
    ],
)
def test_files_that_hold_no_records(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_records(DatasetConfig(path=str(tmp_path / name)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(DatasetConfig(path=str(tmp_path / "nowhere.jsonl")))


def test_json_lists_and_other_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"turns": turns("a", "b c")}]))
    [record] = read_records(DatasetConfig(path=str(path), field_messages="turns")).records
    assert record.messages == turns("a", "b c")
    assert record.source == f"{path}, record 1"


def test_a_line_separator_inside_a_string_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    text = json.dumps({"messages": turns("a\u2028b", "c")}, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    assert len(read_records(DatasetConfig(path=str(path))).records) == 1


def config_of(path: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(base_model="m", adapter="lora", datasets=[{"path": str(path)}], **changes)


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (0.25, 5), (3, 3)])
def test_val_set_size_splits_without_overlap(tmp_path: Path, size: float, held_out: int) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": turns("what", f"answer {i}")} for i in range(20)])
    loaded = load_records(config_of(path, val_set_size=size))
    train, test = loaded.train, loaded.held_out
    assert (len(train), len(test)) == (20 - held_out, held_out)
    assert len({record.source for record in (*train, *test)}) == 20
    assert load_records(config_of(path, val_set_size=size)).held_out == test
    if held_out:
        assert load_records(config_of(path, val_set_size=size, seed=1)).held_out != test


@pytest.mark.parametrize(("size", "said"), [(20, "none is left"), (0.01, "is none")])
def test_val_set_size_that_leaves_nothing(tmp_path: Path, size: float, said: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": turns("what", "red")}] * 20)
    with pytest.raises(DataError, match=said):
        load_records(config_of(path, val_set_size=size))
