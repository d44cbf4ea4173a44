"""A sound configuration file, and what reading a changed one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import ConfigurationError
from fourfold.training.read_config import load_config
from fourfold.training.schema import TrainConfig

SOUND = """\
base_model: some/model
adapter: qlora
load_in_4bit: true
datasets:
  - path: train.jsonl
    type: chat_template
"""

MINIMAL: dict[str, Any] = {
    "base_model": "some/model",
    "adapter": "qlora",
    "load_in_4bit": True,
    "datasets": [{"path": "train.jsonl", "type": "chat_template"}],
}


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def complaints(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, less the heading."""
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text, *overrides)
    heading, *lines = str(caught.value).splitlines()
    assert heading.endswith("1 problem" if len(lines) == 1 else f"{len(lines)} problems")
    return [line.strip() for line in lines]
