"""Expert parallelism on two ranks: the numbers and files of one process, each rank with its own experts."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks
import spread_checks
from spread_checks import CASES, STORED


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    ranks.run("spread_checks", list(spread_checks.CHECKS), folder, 2, 400)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_trains_as_one_process(job: Path, case: str) -> None:
    for found in ranks.outcome(job, f"trained:{case}"):
        assert found["losses"] < 1e-5
        assert found["adapters"] < 1e-5
        assert found["moved"] > 1e-3


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", ["nf4", "interleaved", "int8"])
def test_a_rank_reads_and_keeps_its_own_experts(job: Path, case: str, stored: str) -> None:
    one, other = ranks.outcome(job, f"loaded:{case}:{stored}")
    assert one == other
    assert 2 * one["held"] == one["total"] > 0
    assert one["reported"] == one["packed"]
    assert one["read"] == one["numbers"]


def test_adapters_are_saved_whole_and_read_by_any_number_of_ranks(job: Path) -> None:
    for found in ranks.outcome(job, "adapters"):
        assert found == {"logits": True}


def test_generates_as_one_process(job: Path) -> None:
    one, other = ranks.outcome(job, "generated")
    assert one == other
    assert len(one) == 10


def test_the_packed_base_is_saved_whole(job: Path) -> None:
    assert ranks.outcome(job, "saved") == [True, True]


def test_ranks_that_do_not_compute_the_same_are_told(job: Path) -> None:
    for said in ranks.outcome(job, "unlike"):
        assert "q_proj.lora_A" in said["seeds"]
        assert "torch.manual_seed" in said["seeds"]
        assert "different batches" in said["batches"]
        assert "different batches" in said["lengths"]
        assert "fourfold.distributed.clip_grad_norm_" in said["clipped"]


def test_what_takes_all_experts_is_refused(job: Path) -> None:
    for said in ranks.outcome(job, "refusals"):
        assert "DTensor" in said.pop("ddp")  # (torch's own word: DDP by itself cannot be had by accident)
        for what, message in said.items():
            assert message.startswith("ConfigurationError: "), what
            assert "mlp.experts" in message, what
            assert "spread over processes" in message, what


def test_what_cannot_be_is_said_before_loading(job: Path) -> None:
    wanted = {
        "uneven": "5 experts, which 2 ranks do not divide",
        "own_forward": "feed_forward.experts",
        "tensor": "DistributedConfig(tp_size=2, ep_size=2)",
        "tp_plan": "Leave it out",
        "shards": "load_sharded",
        "pipeline": "pp_size",
        "host": "experts_device='cpu'",
        "other_format": "fourfold quantize",
        "plan": "'model.layers.*.mlp.experts': 'ep_dispatch_experts'",
    }
    for said in ranks.outcome(job, "before_loading"):
        assert said.keys() == wanted.keys()
        for what, words in wanted.items():
            assert said[what].startswith("ConfigurationError: "), (what, said[what])
            assert words in said[what], what
