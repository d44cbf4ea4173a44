"""Lines, anchors, key=value pairs, and files that are no configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from config_text import MINIMAL, SOUND, complaints, load
from fourfold.errors import ConfigurationError
from fourfold.training.read_config import load_config


def test_duplicates_name_both_lines(tmp_path: Path) -> None:
    [line] = complaints(tmp_path, SOUND + "    type: chat_template\nlora_r: 4\n")
    assert line == "line 7, datasets.0.type: given twice, first on line 6. Keep one of the two."


def test_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    text = SOUND.replace("  - path", "  - &one\n    path") + "  - <<: *one\n    path: other.jsonl\n"
    assert [entry.path for entry in load(tmp_path, text).datasets] == ["train.jsonl", "other.jsonl"]


def test_home_is_expanded_wherever_a_path_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = SOUND.replace("some/model", "~/model").replace("train.jsonl", "~/train.jsonl")
    text += (
        "output_dir: ~/out\nresume_from_checkpoint: ~/out/checkpoint-1\ntest_datasets: [{path: ~/t.json}]\n"
    )
    config = load(tmp_path, text)
    assert config.base_model == "/home/me/model"
    assert config.datasets[0].path == "/home/me/train.jsonl"
    assert config.test_datasets is not None
    assert config.test_datasets[0].path == "/home/me/t.json"
    assert config.output_dir == "/home/me/out"
    assert config.resume_from_checkpoint == "/home/me/out/checkpoint-1"


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        SOUND,
        "max_steps=3",
        "datasets.0.path=b.json",
        "lora_r=null",
        "bnb_config_kwargs.experts_blocksize=32",
    )
    assert (config.max_steps, config.datasets[0].path, config.lora_r) == (3, "b.json", 8)
    assert config.bnb_config_kwargs == {"experts_blocksize": 32}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_step=3", "command line (max_step=3), max_step: unknown key. Did you mean `max_steps`?"),
        ("lora_r=-1", "command line (lora_r=-1), lora_r: -1 should be greater than 0"),
        ("adapter=lora", "command line (adapter=lora), adapter: lora contradicts load_in_4bit"),
    ],
)
def test_wrong_overrides_are_placed_on_the_command_line(tmp_path: Path, override: str, said: str) -> None:
    [line] = complaints(tmp_path, SOUND, override)
    assert line.startswith(said)


@pytest.mark.parametrize("override", ["max_steps", "=3", "datasets.4.path=x", "seed.deep=1", "lora_r=[1"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError, match="command line"):
        load(tmp_path, SOUND, override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "the top level is a list, not a mapping"),
        ("a: [1\nb: 2\n", r"line \d: not valid YAML"),
        ("a: !!python/object:os.system {}\n", "line 1: not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load(tmp_path, text)


def test_missing_file() -> None:
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        load_config("nowhere.yaml")


def test_an_override_changes_one_place_of_an_anchor_that_stands_in_two(tmp_path: Path) -> None:
    text = """\
base_model: some/model
adapter: qlora
load_in_4bit: true
datasets:
  - {path: a.jsonl, type: chat_template, message_property_mappings: &names {role: from, content: value}}
  - {path: b.jsonl, type: chat_template, message_property_mappings: *names}
"""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    config = load_config(path, ["datasets.1.message_property_mappings.role=speaker"])
    assert [each.message_property_mappings.role for each in config.datasets] == ["from", "speaker"]


def test_keys_that_are_no_decimal_number(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="²"):
        load_config(path, ["²=1"])


def test_an_override_of_a_mapping_of_names_takes_the_rest_as_one_name(tmp_path: Path) -> None:
    config = load(tmp_path, SOUND, "lora_rank_pattern.layers.0.q_proj=4", "lora_alpha_pattern.a.b=2")
    assert config.lora_rank_pattern == {"layers.0.q_proj": 4}
    assert config.lora_alpha_pattern == {"a.b": 2}
    [line] = complaints(tmp_path, SOUND, "lora_rank_pattern.a.b=0")
    assert line.startswith("command line (lora_rank_pattern.a.b=0), lora_rank_pattern.a.b: 0 should be")


def test_keys_with_dots_keep_their_line(tmp_path: Path) -> None:
    [line] = complaints(tmp_path, SOUND + "lora.rank: 4\n")
    assert line.startswith("line 7, lora.rank: unknown key")
    [line] = complaints(tmp_path, SOUND + "lora_rank_pattern:\n  q_proj: 2\n  layers.1.v_proj: 0\n")
    assert line.startswith("line 9, lora_rank_pattern.layers.1.v_proj: 0 should be greater than 0")


@pytest.mark.parametrize("key", ["datasets", "lora_target_modules", "bnb_config_kwargs", "plugins", "seed"])
def test_aliases_upon_aliases_at_a_known_key(tmp_path: Path, key: str) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    bomb = "*a11" if key != "bnb_config_kwargs" else "{llm_int8_skip_modules: *a11}"
    kept = "\n".join(line for line in SOUND.splitlines() if key != "datasets" or line[:1] not in "d ")
    found = complaints(tmp_path, "\n".join([*lines, kept, f"{key}: {bomb}"]) + "\n")
    assert all(len(line) < 400 for line in found)
    assert any(f" {key}" in line for line in found)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("base_model: !!binary aGVsbG8=", "base_model: b'hello' should be a valid string"),
        ("num_epochs: 1e308", "num_epochs: 1e+308 should be less than or equal to 1000000"),
        (
            "max_steps: 99999999999999999999",
            "max_steps: 99999999999999999999 should be less than or equal",
        ),
        ("learning_rate: " + "9" * 400, "learning_rate"),
        ("use_tensorboard: 'yes'", "use_tensorboard: 'yes' should be a valid boolean"),
        ("lora_r: '8'", "lora_r: '8' should be a valid integer"),
        ("peft: {backend: x}", "peft: not yet: settings by PEFT's own names. For loftq_config, write"),
    ],
)
def test_values_that_were_read_too_loosely(tmp_path: Path, line: str, said: str) -> None:
    text = "".join(f"{each}\n" for each in SOUND.splitlines() if each.split(":")[0] != line.split(":")[0])
    [found] = complaints(tmp_path, text + line + "\n")
    assert found.partition(", ")[2].startswith(said)
