"""`fourfold validate` and `fourfold schema`: exit statuses, JSON, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from fourfold.cli import main
from fourfold.training.other_keys import DIFFERENT, NOT_YET

SOUND = """\
base_model: some/model
adapter: qlora
load_in_4bit: true
lora_mlp_kernel: true
datasets: [{path: train.jsonl, type: chat_template}]
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def validate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["validate", *arguments, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, result


def test_a_sound_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SOUND)
    assert main(["validate", path]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: valid\nGiven differently:\n  line 4, lora_mlp_kernel: attention")
    assert "Note:\n  lora_target_parameters: absent, so experts are not trained; name" in out
    status, result = validate(capsys, path, "max_steps=7")
    assert (status, result["valid"], result["problems"], result["not_yet"]) == (0, True, [], [])
    assert result["config"]["max_steps"] == 7
    assert [row["key"] for row in result["given_differently"]] == ["lora_mlp_kernel"]


def test_every_problem_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path, SOUND + "lora_rnk: 4\nsample_packing_sequentially: true\nseed: 1\nseed: 2\nlora_r: 0\n"
    )
    status, result = validate(capsys, path, "deepspeed=zero3.json", "eval_steps=5")
    assert (status, result["valid"], result["config"]) == (1, False, None)
    assert [(row["line"], row["key"]) for row in result["problems"]] == [
        (6, "lora_rnk"),
        (9, "seed"),
        (10, "lora_r"),
        (None, "eval_steps"),
    ]
    assert [(row["line"], row["key"]) for row in result["not_yet"]] == [
        (7, "sample_packing_sequentially"),
    ]
    [card] = result["refused_at_start"]
    assert (card["key"], card["where"]) == ("deepspeed", "command line (deepspeed=zero3.json)")
    assert all(row["what"] and row["remedy"] for row in result["problems"] + result["not_yet"])
    assert main(["validate", path]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: 4 problems\n")
    assert "  line 7, sample_packing_sequentially: not yet: packing in the files' order. Drop" in out


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\x01\xff",
        b"- a list",
        b"a: [1",
        b"a: &x [*x]",
        b"[" * 5000,
        b"a: " + b"9" * 5000,
        b"a: 2020-99-99",
        b"? [1, 2]\n: 3",
    ],
    ids=["binary", "list", "torn", "recursive", "deep", "digits", "date", "key"],
)
def test_what_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert main(["validate", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fourfold validate: {path}")
    assert len(err) < 2000


def test_aliases_upon_aliases_take_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    started = time.perf_counter()
    assert main(["validate", write(tmp_path, "\n".join(lines))]) == 1
    assert time.perf_counter() - started < 5
    assert "a11: unknown key" in capsys.readouterr().out


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tmp_path / "none.yaml")]) == 2
    assert "no such configuration file" in capsys.readouterr().err
    assert main(["validate", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_schema_is_the_same_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plain
    assert plain["properties"]["lora_r"]["default"] == 8


def test_answers_in_well_under_a_second_and_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path, SOUND)
    code = (
        "import sys, time\n"
        "from fourfold.cli import main\n"
        f"status = main(['validate', {path!r}]) + main(['schema'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert status == 0\n"
        "assert time.process_time() < 1\n"  # 0.2 s; of the processor: others may be at work beside
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


HUGE = 10**30
NUMBERS: list[Any] = [0, -1, 1, HUGE, -HUGE, 1e308, 1e-320, float("nan"), float("inf")]
OTHERS: list[Any] = ["", "x", "(", "~", "\u0000", "x" * 5000, None, True, False]
NESTED: list[Any] = [[], [None], [[]], [{}], ["a", 1], {}, {"": ""}, {"x": {"y": [1]}}, {1: 2}, {None: None}]
VALUES = NUMBERS + OTHERS + NESTED


def mutate(values: Any, random: Random) -> Any:
    """One change anywhere: another value, another key, one more, one fewer."""
    if isinstance(values, dict) and values and random.random() < 0.8:
        key = random.choice(list(values))
        kind = random.randrange(5)
        if kind == 0:
            return {**values, random.choice(["x", "", 7, None, "datasets", str(key) + "s"]): values[key]}
        if kind == 1:
            return {name: value for name, value in values.items() if name != key}
        return {**values, key: mutate(values[key], random)}
    if isinstance(values, list) and values and random.random() < 0.7:
        index = random.randrange(len(values))
        return [*values[:index], mutate(values[index], random), *values[index + 1 :]]
    return random.choice(VALUES)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_file_says_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    random = Random(seed)
    everything = {key: random.choice(VALUES) for key in [*DIFFERENT, *NOT_YET] if random.random() < 0.1}
    sound = yaml.safe_load(SOUND) | {
        "datasets": [{"path": "a", "message_property_mappings": {"role": "r"}, "roles": {"user": ["u"]}}],
        "special_tokens": {"pad_token": "p"},
        "lora_rank_pattern": {"q": 1},
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"},
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    for _ in range(60):
        values: Any = {**sound, **everything} if random.random() < 0.2 else sound
        for _ in range(random.randrange(1, 4)):
            values = mutate(values, random)
        path = write(tmp_path, yaml.safe_dump(values))
        assert main(["validate", path, "--json"]) in (0, 1, 2), values
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        result = json.loads(captured.out)
        if "error" not in result:
            rows = result["problems"] + result["not_yet"]
            assert result["valid"] is not bool(rows), values
            assert not [row for row in rows if len(row["what"]) + len(row["remedy"]) > 1000]
            assert not [row for row in rows if not row["remedy"]]
