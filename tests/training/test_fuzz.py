"""Whatever a file says, the answer is success or one screen that names key, place and remedy."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from config_text import MINIMAL
from fourfold.cli import main
from fourfold.training.json_schema import json_schema
from fourfold.training.other_keys import DIFFERENT, NOT_YET, take_others
from fourfold.training.read_config import examine
from fourfold.training.schema import TrainConfig
from json_fits import fits
from mutations import VALUES, mutate, places, put
from tiny_chat import Settings

KEYS = [*TrainConfig.model_fields, *DIFFERENT, *NOT_YET]
RICH: dict[str, Any] = {
    **MINIMAL,
    "datasets": [
        {
            "path": "train.jsonl",
            "type": "chat_template",
            "split": "train",
            "data_files": ["a.jsonl"],
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["human"], "assistant": ["gpt"]},
        }
    ],
    "special_tokens": {"pad_token": "<pad>"},
    "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head"]},
    "lora_target_modules": ["q_proj"],
    "lora_rank_pattern": {"layers.0.q_proj": 2},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "lr_scheduler_kwargs": {"num_cycles": 1.0},
    "fsdp_config": {"fsdp_version": 2},
    "plugins": ["a.LigerPlugin"],
}


def answered(path: Path, verb: str, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    """Exit status and output; no exception reaches anybody."""
    status = main([verb, str(path), *overrides])
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "Traceback" not in text, text
    return status, text


@pytest.mark.parametrize("seed", range(8))
def test_validate_answers_whatever_a_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    chance = random.Random(seed)
    path = tmp_path / "config.yaml"
    for _ in range(60):
        values = mutate(RICH, KEYS, chance)
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        status, text = answered(path, "validate", capsys)
        assert status in (0, 1, 2), (values, text)
        assert len(text) < 8000, text
        if status:
            for problem in examine(path).problems if status == 1 else ():
                assert problem.key, problem
                assert problem.what, problem
                assert problem.remedy.endswith((".", "?")), problem


@pytest.mark.parametrize("seed", range(4))
def test_validate_answers_damaged_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "config.yaml"
    sound = yaml.safe_dump(RICH).encode()
    marks = [
        b"\x00",
        b"&a ",
        b"*a",
        b"!!binary ",
        b"!!python/name:os.system ",
        b"- ",
        b"{",
        b": ",
        b"%",
        b"\t",
    ]
    for _ in range(60):
        text = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(text))
            text[at : at + chance.randint(0, 3)] = chance.choice(marks)
        path.write_bytes(bytes(text))
        status, said = answered(path, "validate", capsys)
        assert status in (0, 1, 2), (bytes(text), said)
        assert len(said) < 8000


def test_the_schema_for_editors_and_validate_agree_on_types(tmp_path: Path) -> None:
    """Each place of a file with each kind of value: what one takes, the other takes."""
    schema = json_schema()
    alone = [({**MINIMAL, key: None}, (key,)) for key in KEYS]
    within = [(RICH, path) for path in places(RICH) if len(path) > 1]
    checked = 0
    for whole, path in alone + within:
        for value in VALUES:
            values = put(whole, path, value)
            if value in ("1e999", "(") or (type(value) in (int, float) and abs(value) > 1e300):
                continue  # (how large a number may be is no matter of types)
            fitting = fits(values, schema, schema["$defs"])
            wrong = errors_of_types(values)
            if fitting:
                assert not wrong, (path, value, wrong)
            else:
                assert wrong or problems(tmp_path, values), (path, value)
            checked += 1
    assert checked > 5000


def errors_of_types(values: dict[str, Any]) -> list[Any]:
    try:
        TrainConfig.model_validate(take_others(values)[0])
    except ValidationError as error:
        return [item["loc"] for item in error.errors() if item["type"] != "value_error"]
    return []


def problems(tmp_path: Path, values: dict[str, Any]) -> list[Any]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return examine(path).problems


OF_A_RUN: list[dict[str, Any]] = [
    {"base_model": "/dev/null"},
    {"base_model": "/"},
    {"base_model": "\x01"},
    {"datasets": [{"path": "/dev/null"}]},
    {"datasets": [{"path": "/"}]},
    {"datasets": [{"path": "data", "split": "train[5:"}]},
    {"output_dir": "/dev/null/out"},
    {"output_dir": "\x01/\x02" * 200},
    {"lora_target_modules": ".*"},
    {"lora_target_modules": ["norm"]},
    {"lora_target_parameters": ["weight"]},
    {"lora_r": 65536},
    {"lora_rank_pattern": {"nothing": 2}},
    {"lora_exclude_modules": ["nothing"]},
    {"num_epochs": 1e6, "max_steps": None, "warmup_steps": 10**8 * 6},
    {"micro_batch_size": 2**31 - 1, "max_steps": 1, "warmup_steps": None},
    {"sequence_len": 8},
    {"special_tokens": {"pad_token": "\x00"}},
    {"chat_template": "jinja", "chat_template_jinja": "{% for"},
    {"chat_template": "jinja", "chat_template_jinja": "/dev"},
    {"resume_from_checkpoint": "/dev"},
    {"lora_model_dir": "/dev/null"},
    {"bnb_config_kwargs": {"experts_blocksize": 7}},
    {"bnb_config_kwargs": {"llm_int8_skip_modules": ["("]}},
]


@pytest.mark.parametrize("changes", OF_A_RUN, ids=lambda changes: "-".join(changes))
def test_train_answers_in_one_screen(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    from fourfold.training import run as run_module

    class StopError(Exception):
        pass

    def load(*args: Any) -> Any:
        raise StopError("it would begin")

    monkeypatch.setattr(run_module, "load", load)
    monkeypatch.chdir(tmp_path)  # where mutated values of output_dir lead
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # relative folders are written to: the project's own must not be theirs
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(**changes)), encoding="utf-8")
    status, text = answered(path, "train", capsys)
    assert len(text) < 4000
    if "it would begin" not in text:
        assert status == 2, text
        names = [key for key in changes if key in text]
        files = [entry["path"] for entry in changes.get("datasets", ()) if entry["path"] in text]
        assert names or files or "train.jsonl, line 1: the chat template" in text, text
