"""Trainers as they are, with accelerate's FSDP2, on two ranks: the numbers and files of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks
import sharded_models
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
