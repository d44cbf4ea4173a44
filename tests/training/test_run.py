"""Whole runs on a tiny random Mixtral: 4 bit, adapters, report; and what stops one on the way."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fourfold.errors import (
    TrainingError,
    UnquantizedExpertsError,
)
from fourfold.experts import plain
from fourfold.training import run as run_module
from fourfold.training.evaluate import evaluate_answers
from fourfold.training.generation import load_for_generation
from fourfold.training.preflight import check
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult, show
from fourfold.training.trainer import make_collator
from tiny_chat import Settings, conversation, quiet, write_jsonl


def test_the_loss_falls(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    assert result.improvement is not None
    assert result.improvement.mean > 0.5
    assert result.improvement.mean > 3 * result.improvement.standard_error
    losses = dict(result.curve.train)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 0.5
    assert [step for step, _ in result.curve.held_out] == [0, 6, 12]


def test_experts_are_packed_and_adapters_are_fp32(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    experts = [row for row in result.packed["rows"] if row["role"] == "experts"]
    assert [row["dtype"] for row in experts] == ["NF4 /64 double-quantized"]
    assert experts[0]["bytes"] < experts[0]["bytes_before"] / 7
    assert result.adapters["dtypes"] == ["float32"]
    assert result.adapters["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert result.adapters["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_files_left_behind(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    out = Path(result.adapter)
    weights = load_file(out / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    # 2 layers: q, k, v, o and two expert projections, an A and a B each.
    assert len(weights) == 2 * (4 + 2) * 2
    assert all(tensor.abs().max() > 0 for tensor in weights.values())  # every B has moved off zero
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert (out / "tokenizer.json").is_file()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoints = sorted(path.name for path in out.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_report(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    report = json.loads((Path(result.adapter) / "report.json").read_text())
    assert report["steps"] == 12
    assert report["config"]["lora_r"] == 8
    assert report["data"]["train"]["examples"] == 48
    held_out = report["held_out_loss"]
    assert report["data"]["held_out"]["examples"] == len(held_out["before"]["per_answer"]) == 10
    fell = held_out["before"]["mean"] - held_out["after"]["mean"]
    assert held_out["improvement"]["mean"] == pytest.approx(fell)
    assert report["model"]["bytes"] < report["model"]["bytes_before"] / 5
    assert report["tokens_per_second"] > 0
    assert report["peak_memory_bytes"] > 50e6
    # 12 batches of 8 conversations of 15 tokens.
    assert report["tokens_per_second"] * report["training_seconds"] == pytest.approx(12 * 8 * 15)
    assert report["sample"]["reference"] == conversation(100)["messages"][1]["content"]
    assert len(report["loss_curve"]["train"]) == 12


def test_the_table_shows_what_matters(trained: tuple[RunResult, str]) -> None:
    result, printed = trained
    assert result.before is not None
    assert result.after is not None
    for text in (
        "NF4 /64 double-quantized",
        "tokens/s",
        "resident set" if result.device == "cpu" else "GPU memory",
        f"{result.before.mean:.3f} ± {result.before.standard_error:.3f}",
        f"{result.after.mean:.3f} ± {result.after.standard_error:.3f}",
        "answer before",
        result.sample["after"],
        "report.json",
        "step 12/12",
    ):
        assert text in printed, text


def test_the_saved_adapter_is_the_trained_one(
    trained: tuple[RunResult, str], moe_folder: Path, settings: Settings
) -> None:
    result, _ = trained
    assert result.before is not None
    assert result.after is not None
    checked = check(TrainConfig(**settings()))
    assert checked.held_out is not None
    collate = make_collator(checked.tokenizer)
    model, _ = load_for_generation(str(moe_folder), None, result.adapter)
    again = evaluate_answers(model, checked.held_out.dataset, collate, 4)
    assert again.per_answer == pytest.approx(result.after.per_answer, abs=1e-5)
    base, _ = load_for_generation(str(moe_folder), 4)
    again = evaluate_answers(base, checked.held_out.dataset, collate, 4)
    assert again.per_answer == pytest.approx(result.before.per_answer, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "INT8"),
        ({"adapter": "lora", "load_in_4bit": False}, "float32"),
        ({"quantize_moe_experts": False}, "float32"),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, "FP4 /64 double-quantized"),
    ],
)
def test_other_ways_to_hold_the_experts(settings: Settings, changes: dict[str, Any], experts: str) -> None:
    short = {"max_steps": 2, "eval_steps": 0, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
    result = run(TrainConfig(**settings(gradient_checkpointing=True, **short, **changes)), quiet())
    assert [row["dtype"] for row in result.packed["rows"] if row["role"] == "experts"] == [experts]
    assert result.improvement is not None
    assert result.improvement.mean > 0


@pytest.mark.parametrize(
    "changes", [{"adapter": "lora", "load_in_4bit": False}, {"quantize_moe_experts": False}]
)
def test_unquantized_experts_are_trained_in_low_rank_form(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    took: list[set[str]] = []
    routed_forward = plain.routed_forward

    def record(module: Any, x: Any, index: Any, weights: Any, low_rank: Any) -> torch.Tensor:
        took.append(set(low_rank))
        return routed_forward(module, x, index, weights, low_rank)

    monkeypatch.setattr(plain, "routed_forward", record)
    run(TrainConfig(**settings(max_steps=2, eval_steps=0, **changes)), quiet())
    assert took
    assert all(names == {"gate_up_proj", "down_proj"} for names in took)


def test_without_held_out_data_and_by_epochs(settings: Settings) -> None:
    changes = {"test_datasets": None, "eval_steps": None, "max_steps": None, "save_steps": None}
    result = run(TrainConfig(**settings(num_epochs=2, micro_batch_size=24, **changes)), quiet())
    assert result.steps == 4
    assert result.improvement is None
    assert json.loads((Path(result.adapter) / "report.json").read_text())["held_out_loss"] is None
    checkpoints = sorted(path.name for path in Path(result.adapter).glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]


def test_long_examples_are_dropped_and_reported(settings: Settings, tmp_path: Path) -> None:
    long = conversation(0)
    long["messages"][1]["content"] += " red" * 80
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [long, *(conversation(index) for index in range(1, 9))])
        for name in ("train", "held-out")
    ]
    entries = [[{"path": str(path)}] for path in files]
    config = TrainConfig(**settings(datasets=entries[0], test_datasets=entries[1], max_steps=2, eval_steps=0))
    console = quiet()
    result = run(config, console)
    show(result, console)
    assert (result.data["train"]["examples"], result.data["train"]["dropped"]) == (8, 1)
    assert "1 longer ones dropped" in console.file.getvalue()  # type: ignore[attr-defined]
    assert result.sample["reference"] == conversation(1)["messages"][1]["content"]  # one that is evaluated
    cut = run(config.model_copy(update={"excess_length_strategy": "truncate"}), console)
    assert (cut.data["train"]["examples"], cut.data["train"]["truncated"]) == (9, 1)


def test_targets_may_be_chosen(settings: Settings) -> None:
    only = {"lora_target_modules": ["q_proj"], "lora_target_parameters": []}
    result = run(TrainConfig(**settings(max_steps=1, warmup_steps=0, eval_steps=0, **only)), quiet())
    names = load_file(Path(result.adapter) / "adapter_model.safetensors")
    assert len(names) == 4
    assert all("q_proj" in name for name in names)


def test_a_dense_model_is_trained_without_experts(settings: Settings, dense_folder: Path) -> None:
    changes = {"base_model": str(dense_folder), "lora_target_parameters": None}
    result = run(TrainConfig(**settings(**changes, max_steps=2, eval_steps=0)), quiet())
    assert result.adapters["target_parameters"] == []
    assert result.packed["experts"] == []


@pytest.mark.parametrize(("save_steps", "left"), [(0, "Nothing was saved."), (1, "Nothing was saved.")])
def test_a_diverging_run_is_stopped(settings: Settings, save_steps: int, left: str) -> None:
    # The first step's update is what ruins: the checkpoint of that step is not recommended.
    changes = {"learning_rate": 1e30, "lr_scheduler": "constant", "warmup_steps": 0}
    with pytest.raises(TrainingError, match=r"at step 2 is (nan|inf|not finite)") as caught:
        run(TrainConfig(**settings(save_steps=save_steps, **changes)), quiet())
    assert str(caught.value).endswith(left)
    assert "unharmed" not in str(caught.value)


def test_a_gradient_that_is_not_finite_never_reaches_the_adapters(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_module.MoeTrainer.training_step
    seen: dict[str, Any] = {}

    def spoil(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(self, model, inputs, *args, **kwargs)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if self.state.global_step == 3:
            trainable[-1].grad.view(-1)[0] = float("nan")
            seen.update(parameters=trainable, before=[p.detach().clone() for p in trainable])
        return loss

    monkeypatch.setattr(run_module.MoeTrainer, "training_step", spoil)
    config = TrainConfig(**settings(save_steps=2))
    with pytest.raises(TrainingError, match="A gradient at step 4 is not finite; the step was not") as caught:
        run(config, quiet())
    for parameter, before in zip(seen["parameters"], seen["before"], strict=True):
        assert torch.equal(parameter, before)
    last = Path(config.output_dir) / "checkpoint-2"
    assert str(caught.value).endswith(f"The last checkpoint before that is {last}.")


def test_the_report_is_written_before_the_curve(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise OSError("no room for a picture")

    monkeypatch.setattr(run_module, "write_loss_curve", fails)
    config = TrainConfig(**settings(max_steps=2, eval_steps=0))
    with pytest.raises(TrainingError, match=r"out cannot be written to \(no room.*Make room there") as caught:
        run(config, quiet())
    assert caught.value.exit_status == 3
    assert json.loads((Path(config.output_dir) / "report.json").read_text())["steps"] == 2


def test_a_missing_matplotlib_is_noticed_at_once() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fourfold.errors import ConfigurationError\n"
        "try:\n    import fourfold.training.run\n"
        "except ConfigurationError as error:\n    assert 'matplotlib' in str(error), error\n"
        "else:\n    raise SystemExit('not noticed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_gpus_are_reported(trained: tuple[RunResult, str], monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = trained
    assert result.to_dict()["unused_gpus"] == max(0, torch.cuda.device_count() - 1)
    console = quiet()
    show(dataclasses.replace(result, device="NVIDIA H100", unused_gpus=3), console)
    assert "NVIDIA H100; 3 more visible, a run uses one" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_adapter_beside_the_path_of_the_data_stops_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_module.put_on

    def with_one_too_many(*args: Any) -> Any:
        model = plain(*args)
        model.register_parameter("beside", torch.nn.Parameter(torch.zeros(1)))
        return model

    monkeypatch.setattr(run_module, "put_on", with_one_too_many)
    with pytest.raises(TrainingError, match=r"1 of 25 trainable parameters .* never be trained: beside\."):
        run(TrainConfig(**settings()), quiet())


def test_experts_that_stayed_unquantized_stop_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the loader had left them alone and nobody said so.
    plain = transformers.AutoModelForCausalLM.from_pretrained

    def forgetful(name: str, quantization_config: Any = None, **kwargs: Any) -> Any:
        return plain(name, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", forgetful)
    with pytest.raises(UnquantizedExpertsError, match=r"mlp\.experts\.gate_up_proj"):
        run(TrainConfig(**settings()), quiet())
