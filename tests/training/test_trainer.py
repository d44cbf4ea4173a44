"""What is ours in the trainer: the order of examples, the adapters' dtype, the checks on the way."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fourfold.errors import TrainingError
from fourfold.planning.units import format_bytes
from fourfold.training.callbacks import Curve, FirstStepGradients, HeldOut, Progressing
from fourfold.training.schema import TrainConfig
from fourfold.training.trainer import LengthGroupedSampler, keep_adapter_dtype, trainer_arguments

LENGTHS = [(index * 37) % 50 + 1 for index in range(103)]


def test_every_example_once_an_epoch_and_lengths_together() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(103))
    assert len(sampler) == 103
    batches = [order[i : i + 8] for i in range(0, 103, 8)]
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in batches]
    assert max(spread) < 10  # of a range of 50
    assert max(LENGTHS) == LENGTHS[order[0]]  # a run that will exhaust memory does so at once


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first, second = LengthGroupedSampler(LENGTHS, 8, seed=1), LengthGroupedSampler(LENGTHS, 8, seed=1)
    torch.manual_seed(5)
    order = list(first)
    torch.manual_seed(6)
    assert list(second) == order
    second.set_epoch(1)
    assert list(second) != order
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=2)) != order


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_few_examples(count: int) -> None:
    assert sorted(LengthGroupedSampler(LENGTHS[:count], 8, seed=1)) == list(range(count))


def test_trainable_parameters_keep_their_dtype_and_values() -> None:
    model = torch.nn.Linear(4, 4)
    model.bias.requires_grad = False
    weight = model.weight.detach().clone()
    with keep_adapter_dtype(model):
        for parameter in model.parameters():  # as SFTTrainer does, frozen ones too to tell them apart
            parameter.data = parameter.data.to(torch.bfloat16)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, weight)  # not bf16 and back
    assert model.bias.dtype == torch.bfloat16


def test_a_parameter_without_gradient_is_named_at_the_first_step_only() -> None:
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    state = SimpleNamespace(global_step=0)
    with pytest.raises(TrainingError, match=r"2 of 4 .* no gradient .*unused\.weight, unused\.bias\."):
        FirstStepGradients().on_pre_optimizer_step(None, state, None, model=model)
    model["unused"].requires_grad_(False)
    check = FirstStepGradients()
    check.on_pre_optimizer_step(None, state, None, model=model)
    model.zero_grad()
    check.on_pre_optimizer_step(None, state, None, model=model)  # costs nothing after the first step


class Factors(torch.nn.Module):
    """Two LoRA pairs; the second may lie beside the path of the data, multiplied by zero."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        linear = {f"{pair}_lora_{side}": torch.nn.Linear(2, 2, bias=False) for pair in "ab" for side in "AB"}
        self.layers = torch.nn.ModuleDict(
            {
                pair: torch.nn.ModuleDict({f"lora_{s}": linear[f"{pair}_lora_{s}"] for s in "AB"})
                for pair in "ab"
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.layers[p]["lora_B"](self.layers[p]["lora_A"](x)) for p in "ab")
        return (first + self.share * second).sum()


@pytest.mark.parametrize("zero_b", [True, False])
def test_a_factor_whose_gradient_is_zero_throughout_is_named(zero_b: bool) -> None:
    state = SimpleNamespace(global_step=0)
    for share in (1.0, 0.0):
        model = Factors(share)
        if zero_b:  # as LoRA begins: A has a zero gradient then, rightly
            for pair in "ab":
                torch.nn.init.zeros_(model.layers[pair]["lora_B"].weight)
        model(torch.ones(1, 2)).backward()
        check = FirstStepGradients()
        if share:
            check.on_pre_optimizer_step(None, state, None, model=model)
            continue
        with pytest.raises(TrainingError, match=r"layers\.b\.lora_B\.weight") as caught:
            check.on_pre_optimizer_step(None, state, None, model=model)
        assert "layers.a." not in str(caught.value)
        assert ("layers.b.lora_A" in str(caught.value)) is not zero_b


@pytest.mark.parametrize(
    ("every", "steps"), [(4, [4, 8]), (0.25, [3, 6, 9]), (0, []), (None, [5, 10]), (100, [])]
)
def test_held_out_evaluations_and_none_at_the_last_step(every: float | None, steps: list[int]) -> None:
    curve = Curve()
    callback = HeldOut(lambda: SimpleNamespace(mean=1.0), curve, every)  # type: ignore[arg-type,return-value]
    for step in range(1, 13):
        state: Any = SimpleNamespace(global_step=step, max_steps=12)
        callback.on_step_end(None, state, None)
        if step in (5, 10, 12):
            callback.on_epoch_end(None, state, None)
    assert [step for step, _ in curve.held_out] == steps


def test_progress_is_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    curve = Curve(training_seconds=10.0, tokens=1000)
    progress = Progressing(Console(file=out, width=40), curve)
    state: Any = SimpleNamespace(global_step=0, max_steps=4)
    progress.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for step in (1, 2, 3, 4):
        state.global_step = step
        progress.on_log(None, state, None, logs={"loss": 2.5})
    progress.on_log(None, state, None, logs={"train_runtime": 1.0})
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 4/4"]  # at most one in five seconds
    assert "loss 2.500  100 tokens/s" in lines[0]
    assert lines[0].endswith("0:30 left")  # not wrapped at 40 columns


def test_bytes_are_readable() -> None:
    assert [format_bytes(n) for n in (7, 1500, 2.5e6, 3.21e9)] == ["7 B", "1.5 kB", "2.5 MB", "3.21 GB"]


def config(**changes: Any) -> TrainConfig:
    values = {"base_model": "m", "adapter": "qlora", "load_in_4bit": True, "datasets": [{"path": "d.jsonl"}]}
    return TrainConfig(**{**values, **changes})


def test_settings_reach_the_trainer(tmp_path: Any) -> None:
    arguments = trainer_arguments(
        config(
            output_dir=str(tmp_path),
            micro_batch_size=3,
            gradient_accumulation_steps=2,
            max_steps=7,
            num_epochs=2.5,
            learning_rate=1e-3,
            lr_scheduler="linear",
            warmup_steps=4,
            optimizer="sgd",
            gradient_checkpointing=True,
            logging_steps=3,
            save_steps=5,
            seed=11,
        ),
        bf16=False,
        use_cpu=True,
        examples=48,
    )
    expected = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "num_train_epochs": 2.5,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 4,
        "optim": "sgd",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 3,
        "save_steps": 5,
        "seed": 11,
        "bf16": False,
        "report_to": [],
        "logging_nan_inf_filter": False,
        "router_aux_loss_coef": 0.0,
        "max_length": None,
    }
    assert {key: getattr(arguments, key) for key in expected} == expected


def test_one_process_trains_on_one_card(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTConfig

    plain = SFTConfig.__post_init__

    def as_with_two_cards(self: Any) -> None:
        plain(self)
        self._n_gpu = 2

    monkeypatch.setattr(SFTConfig, "__post_init__", as_with_two_cards)
    arguments = trainer_arguments(
        config(output_dir=str(tmp_path), micro_batch_size=3), bf16=False, use_cpu=True, examples=48
    )
    assert arguments.n_gpu == 1  # more is DataParallel, which TRL refuses
    assert arguments.train_batch_size == 3


@pytest.mark.parametrize(
    ("save_steps", "strategy", "value"), [(None, "epoch", 500), (0, "no", 500), (0.5, "steps", 0.5)]
)
def test_when_checkpoints_are_written(
    tmp_path: Any, save_steps: float | None, strategy: str, value: float
) -> None:
    arguments = trainer_arguments(
        config(output_dir=str(tmp_path), save_steps=save_steps), bf16=False, use_cpu=True, examples=48
    )
    assert (arguments.save_strategy.value, arguments.save_steps) == (strategy, value)
    assert arguments.gradient_checkpointing is False


@pytest.mark.parametrize(("warmup", "steps"), [(None, 3), (0, 0), (1, 1), (20, 20)])
def test_warm_up(tmp_path: Any, warmup: int | None, steps: int) -> None:
    arguments = trainer_arguments(
        config(output_dir=str(tmp_path), warmup_steps=warmup), bf16=False, use_cpu=True, examples=48
    )
    assert arguments.get_warmup_steps(100) == steps


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTTrainer

    from fourfold.training.trainer import MoeTrainer

    rows = [{"input_ids": [3 + n, 4, 5], "labels": [-100, 4, 5]} for n in range(6)]
    trainer = MoeTrainer.__new__(MoeTrainer)
    trainer.tokens_seen, trainer.step_inputs, trainer.examples = 0, (-1, []), len(rows)
    trainer.train_dataset = rows
    trainer.processing_class = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    trainer.state = SimpleNamespace(global_step=4)
    batch = {
        "input_ids": torch.tensor([[5, 4, 5, 0], [8, 4, 5, 0]]),
        "labels": torch.tensor([[-100, 4, 5, -100], [-100, 4, 5, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]),
    }
    monkeypatch.setattr(SFTTrainer, "training_step", lambda *_: torch.tensor(1.0))
    trainer.training_step(None, {key: value[:1] + 1 for key, value in batch.items()})  # type: ignore[arg-type]
    trainer.tokens_seen = 0
    monkeypatch.setattr(SFTTrainer, "training_step", lambda *_: torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="The loss at step 5 is nan on training examples") as caught:
        trainer.training_step(None, batch)  # type: ignore[arg-type]
    assert ' training examples 3 ("5 4 5"), 6 ("8 4 5"): the last update has ruined' in str(caught.value)
    assert trainer.tokens_seen == 6
