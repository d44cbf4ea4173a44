"""Trainers as they are, with accelerate's FSDP2, on two ranks: the numbers and files of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import ranks
import sharded_models
import tiny
import trainer_checks
from trainer_checks import CASES


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    ranks.run("trainer_checks", list(trainer_checks.CHECKS), folder, 2, 300)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_trainer_equals_a_loop_in_one_process(job: Path, case: str) -> None:
    sharded_models.equal(ranks.outcome(job, f"trainer:{case}"))


def test_sft_trainer_equals_a_loop_in_one_process(job: Path) -> None:
    sharded_models.equal(ranks.outcome(job, "sft"))


def test_a_model_loaded_in_shards_is_taken(job: Path) -> None:
    sharded_models.equal(ranks.outcome(job, "loaded_in_shards"))


def test_training_after_an_evaluation(job: Path) -> None:
    sharded_models.equal(ranks.outcome(job, "evaluated_first"))


def test_bf16_leaves_packed_experts_alone(job: Path) -> None:
    for found in ranks.outcome(job, "mixed_precision"):
        assert all(3 < loss < 7 for loss in found["losses"])


@pytest.mark.parametrize("state", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resumed(job: Path, state: str) -> None:
    sharded_models.equal(ranks.outcome(job, f"resumed:{state}"), 1e-6)


def test_what_cannot_be_followed_is_refused_by_name(job: Path) -> None:
    for said in ranks.outcome(job, "refusals"):
        assert "Qwen3MoeAttention is no class of layer" in said["class"]
        assert "Qwen3MoeDecoderLayer" in said["class"]
        assert "fsdp_min_num_params" in said["size"]


EFFICIENT = "fsdp_offload_params: false\n  fsdp_cpu_ram_efficient_loading: true"
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[3])
import accelerate_on_cpu
import torch
from transformers import Trainer, TrainingArguments
import sharded_models as checks
from pathlib import Path
from torch.distributed.tensor import DTensor

args = TrainingArguments(
    sys.argv[2], max_steps=2, use_cpu=True, save_strategy="no", report_to="none",
    per_device_train_batch_size=2,
)
model = checks.adapted(checks.load(Path(sys.argv[1]), checks.NF4, "cpu"))
rows = [{"input_ids": row, "labels": row} for row in checks.batches(1, 8)[0]]
trainer = Trainer(model=model, args=args, train_dataset=rows)
trainer.train()
assert all(isinstance(p.data, DTensor) for p in trainer.model.parameters())
trainer.save_model(sys.argv[2])
"""


@pytest.mark.slow
def test_the_file_of_the_docs_for_accelerate(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "distributed.md").read_text()
    (text,) = [part for part in re.findall(r"```yaml\n(.*?)```", page, re.S) if "num_processes" in part]
    settings = tmp_path / "fsdp.yaml"
    settings.write_text(text.replace("bf16", "'no'").replace("fsdp_offload_params: false", EFFICIENT))
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    tiny.save(tiny.qwen3_moe(), tmp_path / "model")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    helpers = str(Path(tiny.__file__).parent)
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "model"), str(tmp_path / "out"), helpers],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 4
    assert all((tensor.abs().sum(dim=1) > 0).all() for tensor in stored.values())
