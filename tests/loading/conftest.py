"""A checkpoint that many tests load."""

from pathlib import Path

import pytest

import tiny


@pytest.fixture
def mixtral(tmp_path) -> Path:
    tiny.save(tiny.mixtral(), tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"
