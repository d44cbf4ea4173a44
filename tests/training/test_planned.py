"""The plan of configured runs: measured on a CPU by accounting, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fourfold.errors import ConfigurationError, TrainingError
from fourfold.planning.fit import CONTEXT_BYTES
from fourfold.planning.ranks import plan_ranks
from fourfold.planning.simulate import measuring
from fourfold.planning.standins import Target
from fourfold.training import run as run_module
from fourfold.training.fsdp_keys import Sharding
from fourfold.training.planned import (
    EVERYTHING_ELSE,
    advice_below,
    planner_of,
    remark_on,
    remark_on_share,
)
from fourfold.training.schema import TrainConfig
from tiny_chat import Settings, quiet

CPU = Target("cpu", None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "micro_batch_size": 4},
        {"lora_target_parameters": [], "lora_r": 64},
        {"optimizer": "adamw_torch", "lora_r": 64},
    ],
    ids=str,
)
def test_a_run_on_a_cpu_takes_what_is_planned(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Every storage that the steps of `fourfold train` hold, optimizer included, against the plan's peak."""
    config = TrainConfig(**settings(max_steps=3, test_datasets=None, eval_steps=None, **changes))
    measured: list[int] = []
    lengths: list[int] = []
    train = run_module.train

    def measure(trainer: Any, *arguments: Any) -> None:
        lengths.extend(len(ids) for ids in trainer.train_dataset["input_ids"])
        with measuring(trainer.model) as live:
            train(trainer, *arguments)
        measured.append(live.peak)

    monkeypatch.setattr(run_module, "train", measure)
    result = run_module.run(config, quiet())
    planner, planned = planner_of(config, CPU)
    # (the examples are shorter than sequence_len)
    plan = planner.plan(replace(planned, length=max(lengths), padded=len(set(lengths)) > 1))
    assert plan.weights.bytes == result.packed["bytes"]
    assert plan.trained == result.adapters["trainable_parameters"]
    there = plan.weights.bytes + plan.adapters
    assert plan.peak == pytest.approx(there + measured[0], rel=0.1)
    assert plan.peak - there == pytest.approx(measured[0], rel=0.1)


def _memory_of(config: TrainConfig) -> Any:
    return planner_of(config, Target("cuda", (8, 0)))


def test_what_fits_is_not_worth_a_word(settings: Settings) -> None:
    assert remark_on(*_memory_of(TrainConfig(**settings())), 2**34) is None


def test_what_may_not_fit_is_said_with_what_would(settings: Settings) -> None:
    planner, planned = _memory_of(TrainConfig(**settings(sequence_len=1024, micro_batch_size=8)))
    plan = planner.plan(planned)
    card = int((plan.peak - 2**20) / 0.97) + CONTEXT_BYTES
    said = remark_on(planner, planned, card)
    assert said is not None
    assert "planned peak" in said
    assert "gradient_checkpointing: true (" in said
    assert "micro_batch_size: 4, gradient_accumulation_steps: 2 (" in said


def test_what_cannot_fit_is_an_error_before_loading(settings: Settings) -> None:
    planner, planned = _memory_of(TrainConfig(**settings()))
    with pytest.raises(ConfigurationError, match=r"weights, adapters and optimizer are .* and the GPU has"):
        remark_on(planner, planned, CONTEXT_BYTES + 1000)


def test_memory_that_ran_out_is_answered_with_changes_below_what_was_too_much(settings: Settings) -> None:
    planner, planned = _memory_of(TrainConfig(**settings(sequence_len=1024, micro_batch_size=8)))
    said = advice_below(planner, planned, 2**40)  # a card on which it should have fitted
    assert "gradient_checkpointing: true (" in said


def test_a_run_out_of_memory_says_what_the_plan_suggests(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourfold.training import planned, trainer

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(trainer.MoeTrainer, "training_step", exhausted)
    config = TrainConfig(**settings(test_datasets=None, eval_steps=None))
    with pytest.raises(TrainingError, match="Lower micro_batch_size") as without:
        run_module.run(config, quiet())
    assert EVERYTHING_ELSE in str(without.value)
    monkeypatch.setattr(planned.Memory, "advice", lambda self: "Do as the plan says.")
    with pytest.raises(TrainingError, match=r"CUDA out of memory.*Do as the plan says. Nothing was saved"):
        run_module.run(config, quiet())


def test_modules_trained_as_a_whole_are_counted(settings: Settings) -> None:
    without, with_head = (
        planner_of(TrainConfig(**settings(lora_modules_to_save=names)), CPU) for names in (None, ["lm_head"])
    )
    plans = [planner.plan(planned) for planner, planned in (without, with_head)]
    assert plans[1].trained - plans[0].trained == 32 * 64
    assert plans[1].optimizer - plans[0].optimizer == 8 * 32 * 64


def test_what_is_said_of_a_share(settings: Settings) -> None:
    """A card that two shares fit on, and the whole model does not; and smaller ones."""
    config = TrainConfig(**settings(fsdp_version=2, lora_r=64, optimizer="adamw_torch"))
    planner, planned = planner_of(config, CPU)
    plan = planner.plan(planned)
    (share, staying) = plan_ranks(planner, planned, plan, 2)[:2]
    enough = CONTEXT_BYTES + plan.resident - 1
    with pytest.raises(ConfigurationError, match="base_model: weights"):
        remark_on(planner, planned, enough)
    said = remark_on_share(planner, planned, enough, 2, Sharding())
    assert said is None or said.startswith("planned peak of a GPU's share")
    with pytest.raises(ConfigurationError, match="fsdp_config: a GPU's share"):
        remark_on_share(planner, planned, CONTEXT_BYTES + share.resident - 1, 2, Sharding())
    assert remark_on_share(planner, planned, 1, 2, Sharding(offload=True)) is None
    assert remark_on_share(planner, planned, 100 * CONTEXT_BYTES, 2, Sharding()) is None
    tight = remark_on_share(
        planner, planned, CONTEXT_BYTES + staying.resident, 2, Sharding(reshard_after_forward=False)
    )
    assert tight is not None
    assert "it may not suffice" in tight
