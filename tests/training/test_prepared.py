"""Tokenized data are kept by all that decides them, whole or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import ConfigurationError, DataError
from fourfold.training import prepared
from fourfold.training.prepared import META, Prepared, key_of, prepare_data, templates_of
from fourfold.training.schema import TrainConfig
from tiny_chat import conversation, make_tokenizer, write_jsonl


def config_of(tmp_path: Path, count: int = 12, **changes: Any) -> TrainConfig:
    path = tmp_path / "d.jsonl"
    if not path.exists():
        write_jsonl(path, [conversation(index) for index in range(count)])
    values: dict[str, Any] = {
        "base_model": "m",
        "adapter": "lora",
        "datasets": [{"path": str(path)}],
        "val_set_size": 3,
        "sequence_len": 64,
        "max_bad_records": 0.2,
        "dataset_prepared_path": str(tmp_path / "kept"),
    }
    return TrainConfig(**{**values, **changes})


def prepare(config: TrainConfig, tokenizer: Any) -> Prepared:
    return prepare_data(config, tokenizer, templates_of(config, tokenizer))


def folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kept").iterdir())


def same(one: Prepared, other: Prepared) -> None:
    for name in ("train", "held_out"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dataset.to_dict() == right.dataset.to_dict()
        assert (left.to_dict(), left.digest, left.largest_id) == (
            right.to_dict(),
            right.digest,
            right.largest_id,
        )
    assert (one.sample, one.bad) == (other.sample, other.bad)


def test_what_is_kept_is_what_was_made(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write("{}\n")
    made = prepare(config, tokenizer)
    assert made.kept is None
    assert made.notes == ["1 bad record left out:", f"  {tmp_path / 'd.jsonl'}, line 13: empty"]
    [folder] = folders(tmp_path)
    assert not list(folder.rglob("*.pkl"))
    monkeypatch.setattr(prepared, "load_records", None)  # not read again
    found = prepare(config, tokenizer)
    assert found.kept == str(folder)
    same(made, found)
    monkeypatch.undo()
    same(made, prepare(config.model_copy(update={"dataset_prepared_path": None}), tokenizer))


def test_packing_what_is_kept_leaves_it_whole(tmp_path: Path, tokenizer: Any) -> None:
    from fourfold.training.packing import pack

    config = config_of(tmp_path)
    prepare(config, tokenizer)
    for _ in range(2):
        found = prepare(config, tokenizer)
        assert found.kept is not None
        assert len(pack(found.train.dataset, 64)) < len(found.train.dataset)


def other_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{# changed #}" + tokenizer.chat_template


def other_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|user|>"


def other_word(tokenizer: Any) -> None:
    tokenizer.add_tokens(["extra"])


@pytest.mark.parametrize("change", [other_template, other_end, other_word])
def test_another_tokenizer_is_another_key(change: Any, tmp_path: Path) -> None:
    config, one, other = config_of(tmp_path), make_tokenizer(), make_tokenizer()
    key = key_of(config, one, {})
    assert key == key_of(config, copy.deepcopy(one), {}) == key_of(config, other, {})
    change(other)
    assert key_of(config, other, {}) != key


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_len": 32},
        {"excess_length_strategy": "truncate"},
        {"train_on_inputs": True},
        {"val_set_size": 2},
        {"seed": 7},
        {"max_bad_records": 0.1},
    ],
)
def test_other_settings_are_another_key(changes: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    assert key_of(config_of(tmp_path), tokenizer, {}) != key_of(config_of(tmp_path, **changes), tokenizer, {})


@pytest.mark.parametrize(
    "entry",
    [
        {"split": "train[:50%]"},
        {"roles_to_train": ["user"]},
        {"train_on_eos": "all"},
        {"message_field_training": "train"},
        {"chat_template": "jinja", "chat_template_jinja": "{{ messages }}"},
    ],
)
def test_other_settings_of_a_dataset_are_another_key(
    entry: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    one = config_of(tmp_path)
    other = config_of(tmp_path, datasets=[{"path": str(tmp_path / "d.jsonl"), **entry}])
    assert key_of(one, tokenizer, {}) != key_of(other, tokenizer, templates_of(other, tokenizer))


def test_other_content_is_another_key_and_another_place_is_not(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(tmp_path)
    key = key_of(config, tokenizer, {})
    moved = shutil.copy(tmp_path / "d.jsonl", tmp_path / "e.jsonl")
    assert key_of(config_of(tmp_path, datasets=[{"path": str(moved)}]), tokenizer, {}) == key
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write("\n")
    assert key_of(config, tokenizer, {}) != key
    both = config_of(tmp_path, datasets=[{"path": str(moved)}] * 2, val_set_size=0)
    held = config_of(
        tmp_path,
        datasets=[{"path": str(moved)}],
        test_datasets=[{"path": str(tmp_path / "d.jsonl")}],
        val_set_size=0,
    )
    assert key_of(both, tokenizer, {}) != key_of(held, tokenizer, {})


def test_settings_that_change_no_token_share_what_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    one = key_of(config_of(tmp_path), tokenizer, {})
    assert one == key_of(config_of(tmp_path, learning_rate=1e-3, sample_packing=True), tokenizer, {})


def damage_table(folder: Path) -> None:
    [table] = (folder / "train").glob("*.arrow")
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(bytes(content))


def lose_table(folder: Path) -> None:
    shutil.rmtree(folder / "held_out")


def cut_meta(folder: Path) -> None:
    text = (folder / META).read_text()
    (folder / META).write_text(text[: len(text) // 2])


def lose_meta(folder: Path) -> None:
    (folder / META).unlink()


def change_meta(folder: Path) -> None:
    meta = json.loads((folder / META).read_text())
    del meta["train"]["digest"]
    (folder / META).write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", [damage_table, lose_table, cut_meta, lose_meta, change_meta])
def test_what_is_not_whole_is_made_anew(damage: Any, tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(tmp_path)
    made = prepare(config, tokenizer)
    [folder] = folders(tmp_path)
    damage(folder)
    again = prepare(config, tokenizer)
    assert again.kept is None
    same(made, again)
    assert folders(tmp_path) == [folder]
    assert prepare(config, tokenizer).kept == str(folder)


def test_stopped_while_writing_leaves_nothing_that_is_taken(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    config, whole = config_of(tmp_path), datasets.Dataset.save_to_disk
    written: list[str] = []

    def stop(self: Any, path: str, **kwargs: Any) -> None:
        whole(self, path, **kwargs)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer)
    assert folders(tmp_path) == []
    monkeypatch.setattr(datasets.Dataset, "save_to_disk", whole)
    assert prepare(config, tokenizer).kept is None


def test_another_process_may_have_been_faster(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, rename = config_of(tmp_path), Path.rename

    def late(self: Path, target: Path) -> Path:
        if self.name.startswith(".") and not target.name.startswith("."):
            shutil.copytree(self, target)  # the other one's
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    prepare(config, tokenizer)
    monkeypatch.undo()
    [folder] = folders(tmp_path)
    assert prepare(config, tokenizer).kept == str(folder)


def test_a_place_that_cannot_be_written(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path, dataset_prepared_path=str(tmp_path / "file" / "kept"))
    with pytest.raises(ConfigurationError, match="dataset_prepared_path: cannot write to"):
        prepare(config, tokenizer)


def test_bad_data_are_an_error_and_nothing_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{}] * 3)
    with pytest.raises(DataError, match="3 bad rows of 3"):
        prepare(config_of(tmp_path), tokenizer)
    assert not (tmp_path / "kept").exists()
