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
        assert len(said) == 4
        for text in said[:2]:  # rows exchanged: the same bytes in another order
            assert "mlp.experts" in text
            assert "down_proj" in text
            assert "same checkpoint" in text
        assert "o_proj.base_layer.weight.absmax" in said[2]
        assert "other names" in said[3]


def test_what_fails_on_one_rank_fails_on_all_and_names_it(job: Path) -> None:
    first, second = ranks.outcome(job, "one_rank_fails")
    assert first.keys() == second.keys()
    assert len(first) == 9
    for what in first:
        assert "rank 1" in first[what], first[what]
        short = what in ("load", "shard", "save short")
        assert first[what].startswith("TrainingError" if short else "CheckpointError"), first[what]
        if short:
            assert "ran out of memory" in first[what]
            assert first[what] == second[what]
    assert "disk full" in first["write"]
    assert "disk full" in first["save"]
    assert "rank 1 failed with CheckpointError: no config.json" in first["read"]
    assert second["read"] == "CheckpointError: no config.json"


def test_loading_and_saving_take_the_shard_an_expert_and_little_more(job: Path) -> None:
    """Anonymous memory, where 256 MiB more would be allowed: a rank that held all of it would fail."""
    for found in ranks.outcome(job, "anonymous_peak"):
        assert found.keys() == {"big", "big-packed", "saving"}
        for sizes in found.values():
            assert sizes["shard"] < 0.52 * sizes["whole"]
            assert sizes["shard"] + sizes["expert"] + 32 * 2**20 < 0.9 * sizes["whole"]
        for kind in ("big", "big-packed"):
            sizes = found[kind]
            assert 0.8 * sizes["shard"] < sizes["peak"], found
            assert sizes["peak"] < sizes["shard"] + sizes["expert"] + 32 * 2**20, found
        assert found["saving"]["peak"] < 16 * 2**20, found


@pytest.mark.parametrize("case", CASES)
def test_shards_are_of_the_sizes_that_are_planned(job: Path, case: str) -> None:
    first, second = ranks.outcome(job, f"planned_shares:{case}")
    assert first["found"] == first["wanted"] == first["planned"] > 0
    assert second["found"] <= first["planned"]
    assert first["gathered"] == first["units"]


def test_8_bit_linears_stay_whole_and_int8_experts_do_not(job: Path) -> None:
    for found in ranks.outcome(job, "int8_linears"):
        assert found["linears"] == found["linears_whole"] > 0
        assert found["experts"] * 2 == found["experts_whole"] > 0


def test_examples_of_a_packed_row_do_not_see_each_other(job: Path) -> None:
    for apart, as_one in ranks.outcome(job, "packing_matters"):
        assert abs(apart - as_one) > 1e-3


def test_an_adapter_trained_in_shards_is_merged_as_one_of_one_process(job: Path) -> None:
    for changed in ranks.outcome(job, "merged"):
        assert len([name for name in changed if ".experts." in name]) >= 2
        assert any("q_proj" in name for name in changed)


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
        assert found["wider"] < 1e-5
