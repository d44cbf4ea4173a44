"""Keys that are given differently or not yet: every one is said or refused, none is ignored."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fourfold.errors import ConfigurationError
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.json_schema import json_schema
from fourfold.training.other_keys import DATASET_NOT_YET, DIFFERENT, ELSEWHERE, NOT_YET, PLUGINS
from fourfold.training.read_config import Examined, examine, load_config
from fourfold.training.reference import render
from fourfold.training.schema import TrainConfig
from json_fits import fits

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "base_model": "some/model",
    "adapter": "qlora",
    "load_in_4bit": True,
    "datasets": [{"path": "train.jsonl", "type": "chat_template"}],
}


def look(tmp_path: Path, values: dict[str, Any], *overrides: str) -> Examined:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**BASE, **values}, sort_keys=False), encoding="utf-8")
    return examine(path, list(overrides))


def test_no_key_is_of_two_kinds() -> None:
    kinds = [set(TrainConfig.model_fields), set(DIFFERENT), set(NOT_YET), set(ELSEWHERE)]
    assert sum(map(len, kinds)) == len(set.union(*kinds))
    assert not set(DatasetConfig.model_fields) & set(DATASET_NOT_YET)
    assert set(ELSEWHERE.values()) <= set.union(*kinds[:3])


@pytest.mark.parametrize("key", sorted(set(DIFFERENT) - {"plugins"}))
def test_what_is_given_differently_is_said(tmp_path: Path, key: str) -> None:
    examined = look(tmp_path, {key: True})
    assert examined.sound
    [note] = examined.instead
    assert (note.key, note.where, note.what) == (key, "line 7", DIFFERENT[key])
    assert not look(tmp_path, {key: None}).instead


@pytest.mark.parametrize("key", sorted(NOT_YET))
def test_what_is_not_yet_is_refused_by_name(tmp_path: Path, key: str) -> None:
    [problem] = look(tmp_path, {key: {"some": "value"}}).problems
    assert problem.not_yet
    assert str(problem).startswith(f"line 7, {key}: not yet: {NOT_YET[key].what}. ")
    with pytest.raises(ConfigurationError, match=f"1 problem\n  line 7, {key}: not yet"):
        load_config(tmp_path / "config.yaml")
    for off in (None, *NOT_YET[key].off):
        assert look(tmp_path, {key: off}).sound, off


@pytest.mark.parametrize("key", sorted(DATASET_NOT_YET))
def test_the_same_within_a_dataset(tmp_path: Path, key: str) -> None:
    entry = {**BASE["datasets"][0], key: "x"}
    [problem] = look(tmp_path, {"datasets": [BASE["datasets"][0], entry]}).problems
    assert (problem.key, problem.where, problem.not_yet) == (f"datasets.1.{key}", "line 9", True)
    for off in (None, *DATASET_NOT_YET[key].off):
        assert look(tmp_path, {"datasets": [{**entry, key: off}]}).sound


def test_a_value_is_no_false_for_looking_like_it(tmp_path: Path) -> None:
    [problem] = look(tmp_path, {"sample_packing_sequentially": 0}).problems
    assert problem.key == "sample_packing_sequentially"
    [problem] = look(tmp_path, {"context_parallel_size": True}).problems
    assert problem.key == "context_parallel_size"


def test_plugins_are_known_one_by_one(tmp_path: Path) -> None:
    examined = look(tmp_path, {"plugins": ["a.b.LigerPlugin", "mine.OtherPlugin"]})
    [note] = examined.instead
    assert note.what == f"LigerPlugin: {PLUGINS['LigerPlugin']}"
    [problem] = examined.problems
    assert str(problem).startswith("line 7, plugins: not yet: the plugin OtherPlugin. Take it out.")


@pytest.mark.parametrize(
    ("changes", "key", "what"),
    [
        ({"optimizer": "galore_adamw"}, "optimizer", "`galore_adamw`"),
        ({"lr_scheduler": "rex"}, "lr_scheduler", "`rex`"),
        ({"model_type": "LlamaForCausalLM"}, "model_type", "`LlamaForCausalLM`"),
        ({"tokenizer_type": "LlamaTokenizer"}, "tokenizer_type", "`LlamaTokenizer`"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation", "kernels from the hub"),
        ({"save_strategy": "best"}, "save_strategy", "`best`"),
        ({"datasets": [{"path": "d", "type": "context_qa"}]}, "datasets.0.type", "`context_qa`"),
    ],
)
def test_values_that_are_not_yet(tmp_path: Path, changes: dict[str, Any], key: str, what: str) -> None:
    [problem] = look(tmp_path, changes).problems
    assert (problem.key, problem.what, problem.not_yet) == (key, what, True)
    assert problem.where.startswith("line ")


def test_a_value_that_nobody_knows_is_wrong_and_not_missing(tmp_path: Path) -> None:
    [problem] = look(tmp_path, {"datasets": [{"path": "d", "type": "alpacca"}]}).problems
    assert not problem.not_yet


def test_names_of_other_tools_lead_to_the_key(tmp_path: Path) -> None:
    for name, key in ELSEWHERE.items():
        [problem] = look(tmp_path, {name: 1}).problems
        assert str(problem) == f"line 7, {name}: unknown key. It is `{key}` here."


def test_a_key_like_none_is_answered_in_one_line(tmp_path: Path) -> None:
    [problem] = look(tmp_path, {"qqqqqqqq": 1}).problems
    assert str(problem) == "line 7, qqqqqqqq: unknown key. `fourfold schema` prints all keys."
    [problem] = look(tmp_path, {"datasets": [{"path": "d", "splitt": "x"}]}).problems
    assert str(problem).endswith("unknown key. Did you mean `split`?")
    [problem] = look(tmp_path, {"special_tokens": {"padtoken": "x"}}).problems
    assert "Did you mean `pad_token`?" in str(problem)


def test_remarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = {note.key for note in look(tmp_path, {"evals_per_epoch": 4, "use_wandb": True}).remarks}
    absent = {"lora_target_parameters", "quantize_moe_experts", "lora_target_modules"}
    assert said == absent | {"evals_per_epoch", "use_wandb"}
    targets = {"lora_target_parameters": "all", "lora_target_modules": ["q_proj"]}
    [note] = look(tmp_path, {**targets, "quantize_moe_experts": False}).remarks
    assert note.what.startswith("false: experts, most of the model, stay in high precision")
    sound = {**targets, "quantize_moe_experts": True, "max_steps": 20}
    further = {"router_aux_loss_coef": 0.1, "trust_remote_code": True, "save_steps": 50, "use_trackio": True}
    notes = {note.key: note.what for note in look(tmp_path, {**sound, **further}).remarks}
    assert notes.keys() == further.keys()
    assert notes["save_steps"] == "50, and the run has 20 steps, so the adapter is saved at the end only"
    assert notes["use_trackio"] == "trackio needs a further package: pip install trackio"


def test_the_page_is_that_of_the_tables() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render(), "python -m fourfold.training.reference > docs/configuration.md"
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert {*TrainConfig.model_fields, *DIFFERENT, *NOT_YET, *DATASET_NOT_YET, *PLUGINS} <= rows


def test_the_schema_for_editors_has_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {*TrainConfig.model_fields, *DIFFERENT, *NOT_YET}
    assert set(schema["$defs"]["DatasetConfig"]["properties"]) == {
        *DatasetConfig.model_fields,
        *DATASET_NOT_YET,
    }
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    assert set(schema["required"]) == {"base_model", "adapter", "datasets"}
    for name, entry in schema["properties"].items():
        assert entry["description"], name
    scheduler = schema["properties"]["lr_scheduler"]
    assert scheduler["default"] == "cosine"
    assert "polynomial" in scheduler["anyOf"][0]["enum"]
    assert {"type": "null"} in scheduler["anyOf"]


def test_the_shipped_file_fits_the_schema_and_wrong_ones_do_not() -> None:
    schema = json_schema()
    values = yaml.safe_load((ROOT / "examples" / "quickstart" / "config.yaml").read_text(encoding="utf-8"))
    assert fits(values, schema, schema["$defs"])
    assert fits(
        {**values, "lora_r": None, "plugins": ["x"], "sample_packing": False}, schema, schema["$defs"]
    )
    for wrong in (
        {"lora_rank": 8},
        {"lora_r": 0},
        {"lora_r": True},
        {"lr_scheduler": "cosin"},
        {"sample_packing_sequentially": True},
        {"datasets": []},
        {"datasets": [{"path": "x", "splt": "y"}]},
        {"special_tokens": {"pad": "x"}},
    ):
        assert not fits({**values, **wrong}, schema, schema["$defs"]), wrong
