"""`fourfold validate` and `fourfold schema`: exit statuses, JSON, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fourfold.cli import main

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
    assert "Note:\n  lora_target_parameters: absent, so experts are trained as well" in out
    status, result = validate(capsys, path, "max_steps=7")
    assert (status, result["valid"], result["problems"], result["not_yet"]) == (0, True, [], [])
    assert result["config"]["max_steps"] == 7
    assert [row["key"] for row in result["given_differently"]] == ["lora_mlp_kernel"]


def test_every_problem_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SOUND + "lora_rnk: 4\nsample_packing: true\nseed: 1\nseed: 2\nlora_r: 0\n")
    status, result = validate(capsys, path, "deepspeed=zero3.json", "eval_steps=5")
    assert (status, result["valid"], result["config"]) == (1, False, None)
    assert [(row["line"], row["key"]) for row in result["problems"]] == [
        (6, "lora_rnk"),
        (9, "seed"),
        (10, "lora_r"),
        (None, "eval_steps"),
    ]
    assert [(row["line"], row["key"]) for row in result["not_yet"]] == [
        (7, "sample_packing"),
        (None, "deepspeed"),
    ]
    assert result["not_yet"][1]["where"] == "command line (deepspeed=zero3.json)"
    assert all(row["what"] and row["remedy"] for row in result["problems"] + result["not_yet"])
    assert main(["validate", path]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: 4 problems\n")
    assert "  line 7, sample_packing: not yet: several examples in one row of a batch. Set" in out


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
        "import sys, time; start = time.perf_counter()\n"
        "from fourfold.cli import main\n"
        f"status = main(['validate', {path!r}]) + main(['schema'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert status == 0\n"
        "assert time.perf_counter() - start < 1\n"  # 0.2 s on two cores
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
