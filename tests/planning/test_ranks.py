"""Bytes of each of several GPUs: the cut of real shards, and what a plan makes of it."""

from __future__ import annotations

import pytest

import fourfold
import tiny
from fourfold.errors import ConfigurationError
from fourfold.planning.plan import Planner, Settings
from fourfold.planning.ranks import Unit, cut_shares, plan_ranks
from fourfold.planning.standins import Target

NF4 = fourfold.MoeBitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)
INT8 = fourfold.MoeBitsAndBytesConfig(load_in_8bit=True)
SETTINGS = {"length": 64, "r": 4}


def planned(config: object = NF4, gpus: int = 2, **changes: object) -> list:
    planner = Planner(tiny.qwen3_moe(num_experts=6), Target("cpu", None))
    settings = Settings(quantization=config, **SETTINGS | changes)
    return plan_ranks(planner, settings, planner.plan(settings), gpus)


def test_ways_and_their_order() -> None:
    sharded, stays, replicated = planned()
    assert [way.way for way in (sharded, stays, replicated)] == ["FSDP2", "FSDP2, layers stay", "DDP"]
    assert sharded.resident == stays.resident < replicated.resident
    assert sharded.peak < stays.peak
    assert stays.sent < sharded.sent
    assert replicated.sent == 2 * replicated.adapters * 1 // 2
    assert replicated.loading is None
    # weights that stay whole (scales, buffers), and a row here and there that cannot be halved
    assert replicated.weights / 2 <= sharded.weights < 0.6 * replicated.weights
    assert sharded.adapters * 2 >= replicated.adapters


def test_more_ranks_hold_less_until_experts_are_used_up() -> None:
    weights = [planned(gpus=gpus)[0].weights for gpus in (2, 3, 6)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > weights[-1]
    one = cut_shares(Planner(tiny.qwen3_moe(num_experts=6)).with_adapters(Settings(quantization=NF4)), 1)
    for gpus in (2, 4, 16):
        model = Planner(tiny.qwen3_moe(num_experts=6)).with_adapters(Settings(quantization=NF4))
        shares = cut_shares(model, gpus)
        assert [u.gathered for u in shares.units] == [u.gathered for u in one.units]
        experts = sum(unit.shard for unit in shares.units if unit.kind == "layer")
        assert experts >= sum(unit.gathered for unit in shares.units if unit.kind == "layer") / gpus


def test_units_are_layers_ends_and_what_is_left() -> None:
    model = Planner(tiny.qwen3_moe()).with_adapters(Settings(quantization=NF4))
    units = cut_shares(model, 2).units
    assert [(unit.name, unit.kind) for unit in units] == [
        ("model.layers.0", "layer"),
        ("model.layers.1", "layer"),
        ("model.embed_tokens", "input"),
        ("lm_head", "output"),
        ("", "rest"),
    ]
    assert units[-1] == Unit("", "rest", frozen=2 * 64, trained=0, shard=64)  # the last norm, in bf16
    assert units[0].frozen == units[1].frozen
    tied = Planner(tiny.qwen3_moe(tie_word_embeddings=True)).with_adapters(Settings(quantization=NF4))
    kinds = [unit.kind for unit in cut_shares(tied, 2).units]
    assert kinds == ["layer", "layer", "rest"]


def test_8_bit_linears_are_counted_whole() -> None:
    sharded, _, replicated = planned(INT8)
    model = Planner(tiny.qwen3_moe(num_experts=6)).skeleton(Settings(quantization=INT8))
    linears = [p for p in model.parameters() if type(p).__name__ == "Int8Params"]
    codes = sum(p.numel() + 4 * p.shape[0] for p in linears)
    assert linears
    assert sharded.weights > codes
    assert sharded.weights - codes < 0.55 * (replicated.weights - codes)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(ConfigurationError, match="Write 2 or more"):
        planned(gpus=1)
    for device in ("cpu", "disk"):
        away = fourfold.MoeBitsAndBytesConfig(load_in_4bit=True, experts_device=device)
        with pytest.raises(ConfigurationError, match="exclude each other"):
            planned(away)


def test_activations_and_accumulation_count() -> None:
    assert planned(length=64)[0].peak < planned(length=512)[0].peak
    assert planned(checkpointing=True, length=512)[0].peak < planned(checkpointing=False, length=512)[0].peak
