"""FSDP2 and DDP over packed experts on two ranks: the numbers, files and bytes of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks
import sharded_checks
from sharded_checks import CASES, LOADED, REPLICATED


@pytest.mark.parametrize("case", CASES)
def test_fsdp_equals_one_process(job: Path, case: str) -> None:
    sharded_checks.equal(ranks.outcome(job, f"fsdp:{case}"))


@pytest.mark.parametrize("case", REPLICATED)
def test_ddp_equals_one_process(job: Path, case: str) -> None:
    sharded_checks.equal(ranks.outcome(job, f"ddp:{case}"))


@pytest.mark.parametrize("case", LOADED)
def test_loaded_in_shards_is_the_model_and_trains_as_it(job: Path, case: str) -> None:
    sharded_checks.equal(ranks.outcome(job, f"loaded:{case}"))


def test_experts_of_other_formats_are_packed_and_cut(job: Path) -> None:
    assert ranks.outcome(job, "foreign") == [3, 3]


def test_mixed_precision_leaves_packed_experts_alone(job: Path) -> None:
    ranks.outcome(job, "mixed_precision")


def test_ddp_sends_no_packed_bytes_when_it_is_made(job: Path) -> None:
    for found in ranks.outcome(job, "sent_by_ddp"):
        assert found["sent"] == found["trained"] > 0


def test_ranks_with_other_weights_are_told(job: Path) -> None:
    for said in ranks.outcome(job, "other_weights"):
        assert "mlp.experts" in said
        assert "down_proj" in said
        assert "same checkpoint" in said


@pytest.mark.parametrize("stored", ["plain", "packed"])
def test_a_rank_reads_and_holds_its_share(job: Path, stored: str) -> None:
    for rank, found in enumerate(ranks.outcome(job, f"read_share:{stored}")):
        assert found["experts_read"] * 2 == found["experts_stored"] > 0
        assert found["ends_read"] * 2 == found["ends_stored"] > 0
        assert found["experts_held"] * 2 == found["experts_whole"] > 0
        if stored == "plain":  # of a file for each expert, those of its own alone
            assert (found["first_expert"], found["experts"]) == (8 * rank, 8)


def test_evaluates_and_generates_as_one_process(job: Path) -> None:
    one, other = ranks.outcome(job, "generated")
    assert one == other
    assert len(one) == 11


def test_save_pretrained_writes_what_one_process_writes(job: Path) -> None:
    for zero_rows in ranks.outcome(job, "saved_adapter"):
        assert zero_rows
        assert not any(zero_rows.values())


@pytest.mark.parametrize("case", ["nf4", "int8", "tied"])
def test_packed_checkpoint_from_shards_is_that_of_one_process(job: Path, case: str) -> None:
    for files in ranks.outcome(job, f"saved_packed:{case}"):
        assert files > 1


def test_what_cannot_be_is_refused_by_name(job: Path) -> None:
    said, _ = ranks.outcome(job, "refusals")
    assert "differ in dtype" in said["dtypes"]
    assert "q_proj.lora_A" in said["dtypes"]
    assert "sharded already" in said["twice"]
    assert "spread over processes" in said["offload"]
    assert "mlp.experts" in said["offloaded"]
    assert "onload" in said["offloaded"]
    assert "experts_device" in said["experts_device"]
    assert "nothing in the model is trained" in said["nothing"]
    assert "q_proj was made for (32, 64)" in said["widths"]
    assert "load_sharded" in said["loader"]
    assert "down_proj was cast to torch.bfloat16" in said["cast"]
    assert "no list of layers" in said["no layers"]
    assert "nowhere" in said["no checkpoint"]
    assert "adapters" in said["adapters"]
    assert "MoeBitsAndBytesConfig" in said["not packed"]


def test_resumed_sharded_and_in_one_process(job: Path) -> None:
    for found in ranks.outcome(job, "resumed"):
        assert found["sharded"] == 0
        assert found["alone"] < 1e-5
