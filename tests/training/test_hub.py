"""`hub_model_id`: what arrives at a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_hub import TOKEN, Hub, hub
from tiny_chat import Settings

Write = Callable[[dict[str, Any]], Path]
SHORT = {"max_steps": 4, "eval_steps": 0, "save_steps": 2, "hub_model_id": "me/adapter"}


def train(path: Path, place: Hub, tmp_path: Path, token: str | None) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read when its library is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": place.address, "HF_HOME": str(tmp_path / "home")}
    environment |= {} if token is None else {"HF_TOKEN": token}
    command = [sys.executable, "-m", "fourfold", "train", str(path), "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("strategy", ["end", "all_checkpoints"])
def test_the_adapter_arrives(strategy: str, settings: Settings, write_config: Write, tmp_path: Path) -> None:
    values = settings(**SHORT, hub_strategy=strategy)
    with hub() as place:
        done = train(write_config(values), place, tmp_path, TOKEN)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["uploaded"] == "me/adapter"
    out = Path(values["output_dir"])
    made = place.made[0]
    assert made.get("private") is True or made["visibility"] == "private"  # (by the library's release)
    assert not [path for path in place.strangers if path.startswith(("/api/repos", "/api/models"))]
    arrived: dict[str, bytes] = {}
    for _, files in place.commits:
        arrived |= files
    for name in ("adapter_model.safetensors", "adapter_config.json", "fourfold.json", "tokenizer.json"):
        assert arrived[name] == (out / name).read_bytes(), name
    checkpoints = {name.partition("/")[0] for name in arrived if name.startswith("checkpoint-")}
    assert checkpoints == ({"checkpoint-2", "checkpoint-4"} if strategy == "all_checkpoints" else set())
    if strategy == "end":  # (training_args.bin is the trainer's own; nothing here reads it)
        assert {name for name in arrived if name.endswith((".bin", ".pt", ".pkl"))} <= {"training_args.bin"}


def test_nobody_logged_in_is_said_before_the_run(
    settings: Settings, write_config: Write, tmp_path: Path
) -> None:
    with hub() as place:
        for token in (None, "hf_wrong"):
            done = train(write_config(settings(**SHORT)), place, tmp_path, token)
            assert done.returncode == 2
            assert "hub_model_id: nothing can be uploaded to me/adapter" in done.stderr
            assert "loading and packing" not in done.stderr
    assert place.commits == []
