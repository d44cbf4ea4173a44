"""Checkpoints that do not belong to a model, in one process."""

from pathlib import Path

import pytest
from torch import nn

from fourfold.distributed.checkpoint import load_checkpoint, save_checkpoint
from fourfold.errors import CheckpointError


def test_one_of_more_adapters_is_refused(tmp_path: Path) -> None:
    both = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    save_checkpoint(tmp_path, both)
    load_checkpoint(tmp_path, both)
    with pytest.raises(
        CheckpointError, match=r"holds model\.second\.bias and 1 more, which the model has not"
    ):
        load_checkpoint(tmp_path, nn.ModuleDict({"first": nn.Linear(4, 4)}))


def test_a_damaged_one_is_said_to_be(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    save_checkpoint(tmp_path, model)
    (tmp_path / ".metadata").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"is damaged: .*Take an earlier checkpoint"):
        load_checkpoint(tmp_path, model)
