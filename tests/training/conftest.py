"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult, show
from tiny_chat import data_files, dense_folder, moe_folder, quiet, settings, tokenizer, write_config

__all__ = ["data_files", "dense_folder", "moe_folder", "settings", "tokenizer", "write_config"]


@pytest.fixture(scope="session")
def trained(
    moe_folder: Path, data_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunResult, str]:
    """One run that most tests look at, and what it printed."""
    train, held_out = data_files
    config = TrainConfig(
        base_model=str(moe_folder),
        adapter="qlora",
        lora_target_parameters="all",
        load_in_4bit=True,
        datasets=[{"path": str(train)}],
        test_datasets=[{"path": str(held_out)}],
        sequence_len=64,
        micro_batch_size=8,
        max_steps=12,
        learning_rate=0.02,
        warmup_steps=1,
        bf16=False,
        eval_steps=6,
        save_steps=4,  # an epoch is 6 steps: checkpoints in the middle of the first and of the second
        output_dir=str(tmp_path_factory.mktemp("run") / "out"),
    )
    from fourfold.training.run import run

    console = quiet()
    result = run(config, console)
    show(result, console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]
