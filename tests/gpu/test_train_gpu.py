"""`fourfold train` on a GPU: bf16, gradient checkpointing, 8-bit optimizers, resuming, reloading, memory."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fourfold.adapters.peft_lora import load_adapter
from fourfold.training.evaluate import evaluate_answers
from fourfold.training.preflight import check
from fourfold.training.run import EVALUATION_BATCHES, load, run
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult
from fourfold.training.trainer import make_collator
from tiny_chat import Settings

pytestmark = pytest.mark.gpu
ON_GPU = {"bf16": True, "gradient_checkpointing": True, "eval_steps": 0}


def train(settings: Settings, **changes: Any) -> RunResult:
    return run(TrainConfig(**settings(**{**ON_GPU, **changes})), Console(file=io.StringIO(), width=100))


def adapter_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_the_loss_falls(settings: Settings, optimizer: str) -> None:
    result = train(settings, optimizer=optimizer)
    assert result.improvement is not None
    assert result.improvement.mean > 0.3
    assert result.bf16
    assert result.adapters["dtypes"] == ["float32"]
    experts = [row["dtype"] for row in result.packed["rows"] if row["role"] == "experts"]
    assert experts == ["NF4 /64 double-quantized"]


def test_the_peak_is_that_of_the_gpu(settings: Settings) -> None:
    torch.cuda.reset_peak_memory_stats()
    result = train(settings, max_steps=2)
    assert result.device == torch.cuda.get_device_name()
    assert 0 < result.peak_memory_bytes <= torch.cuda.max_memory_allocated()
    report = json.loads((Path(result.adapter) / "report.json").read_text())
    assert report["peak_memory_bytes"] == result.peak_memory_bytes


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    settings: Settings, tmp_path: Path, optimizer: str
) -> None:
    whole = train(settings, optimizer=optimizer, save_steps=4, output_dir=str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    output = str(tmp_path / "resumed")
    torch.manual_seed(123)  # no help from a random state that happens to be the same
    resumed = train(settings, optimizer=optimizer, resume_from_checkpoint=checkpoint, output_dir=output)
    assert [step for step, _ in resumed.curve.train] == list(range(5, 13))
    expected = dict(whole.curve.train)
    for step, loss in resumed.curve.train:
        assert loss == pytest.approx(expected[step], abs=1e-3), step
    ours, theirs = adapter_of(resumed.adapter), adapter_of(whole.adapter)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-4)


def test_the_reloaded_adapter_gives_the_same_losses(settings: Settings) -> None:
    result = train(settings)
    assert result.before is not None
    assert result.after is not None
    config = TrainConfig(**settings(**ON_GPU))
    checked = check(config)
    assert checked.held_out is not None
    collate = make_collator(checked.tokenizer)
    batch_size = config.micro_batch_size * EVALUATION_BATCHES  # the run's own batches
    model, _ = load(config, checked)
    again = evaluate_answers(model, checked.held_out.dataset, collate, batch_size)
    assert again.per_answer == pytest.approx(result.before.per_answer, abs=1e-4)
    model = load_adapter(model, result.adapter)
    again = evaluate_answers(model, checked.held_out.dataset, collate, batch_size)
    assert again.per_answer == pytest.approx(result.after.per_answer, abs=1e-4)
