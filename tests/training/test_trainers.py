"""Other people's trainers on packed experts: train, evaluate, save, resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import fourfold
from fourfold.training.trainer import keep_adapter_dtype

COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}
TRL_DRIFT = 1e-3
"""Bound of the drift in the loss that resuming costs unmodified TRL trainers; see docs/adapters.md."""


def base(folder: Path) -> Any:
    config = fourfold.MoeBitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return fourfold.prepare(model, gradient_checkpointing=False)


def lora(model: Any) -> LoraConfig:
    targets = fourfold.expert_targets(model)
    return LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM")


def adapted(folder: Path) -> PeftModel:
    model = base(folder)
    torch.manual_seed(1)
    return get_peft_model(model, lora(model))


def tokens() -> Dataset:
    ids = torch.randint(3, 20, (12, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 10} for row in ids])


def preferences() -> Dataset:
    row = {"prompt": "what colour is the sky", "chosen": " blue", "rejected": " red"}
    return Dataset.from_list([row | {"chosen": f" {c}"} for c in ("blue", "green", "white") * 4])


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def run_and_resume(make: Any, out: Path) -> tuple[dict[int, float], dict[int, float], Any]:
    """Losses of steps 3 and 4, of the whole run and of one resumed at step 2."""
    whole = make(str(out))
    whole.train()
    assert "eval_loss" in whole.evaluate()
    checkpoint = out / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    torch.manual_seed(77)
    again = make(str(out / "again"))
    again.train(resume_from_checkpoint=str(checkpoint))
    expected = {step: loss for step, loss in losses(whole).items() if step > 2}
    found = {step: loss for step, loss in losses(again).items() if step > 2}
    assert expected.keys() == found.keys() == {3, 4}
    return expected, found, (whole, again)


def assert_bit_equal(pair: Any) -> None:
    ends = [{n: p for n, p in t.model.named_parameters() if "lora_" in n} for t in pair]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())


def test_trainer_resumes_bit_equal(moe_folder: Path, tmp_path: Path) -> None:
    def make(out: str) -> Trainer:
        arguments = TrainingArguments(output_dir=out, **COMMON)
        return Trainer(adapted(moe_folder), arguments, train_dataset=tokens(), eval_dataset=tokens())

    expected, found, pair = run_and_resume(make, tmp_path)
    assert found == expected
    assert_bit_equal(pair)


@pytest.mark.parametrize("keeps_dtype", [True, False])
def test_sft(moe_folder: Path, tokenizer: Any, tmp_path: Path, keeps_dtype: bool) -> None:
    """Unmodified, TRL trains bf16 adapters that PEFT loads in fp32; with the dtype kept, bit-equal."""

    def make(out: str) -> SFTTrainer:
        def trainer(model: PeftModel) -> SFTTrainer:
            return SFTTrainer(
                model,
                SFTConfig(output_dir=out, gradient_checkpointing=False, **COMMON),
                train_dataset=tokens(),
                eval_dataset=tokens(),
                processing_class=tokenizer,
            )

        model = adapted(moe_folder)
        if not keeps_dtype:
            return trainer(model)
        with keep_adapter_dtype(model):
            return trainer(model)

    expected, found, pair = run_and_resume(make, tmp_path)
    if keeps_dtype:
        assert found == expected
        assert_bit_equal(pair)
    drift = max(abs(found[step] - expected[step]) for step in found)
    print(f"SFT drift {drift:.2e}")
    assert drift < TRL_DRIFT


def test_dpo(moe_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    def make(out: str) -> DPOTrainer:
        return DPOTrainer(
            adapted(moe_folder),
            args=DPOConfig(output_dir=out, gradient_checkpointing=False, max_length=32, **COMMON),
            train_dataset=preferences(),
            eval_dataset=preferences(),
            processing_class=tokenizer,
        )

    expected, found, _ = run_and_resume(make, tmp_path)
    drift = max(abs(found[step] - expected[step]) for step in found)
    print(f"DPO drift {drift:.2e}")
    assert drift < TRL_DRIFT


def test_grpo(moe_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    def make(out: str) -> GRPOTrainer:
        common = COMMON | {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
        config = GRPOConfig(
            output_dir=out, gradient_checkpointing=False, num_generations=4, max_completion_length=6, **common
        )
        return GRPOTrainer(
            adapted(moe_folder),
            reward_funcs=reward,
            args=config,
            train_dataset=preferences().select_columns("prompt"),
            eval_dataset=preferences().select_columns("prompt").select(range(4)),
            processing_class=tokenizer,
        )

    _, found, pair = run_and_resume(make, tmp_path)  # what it generates depends on the random state
    assert all(torch.isfinite(torch.tensor(loss)) for loss in found.values())
    trained = [p for n, p in pair[1].model.named_parameters() if "lora_B.default" in n and "experts" in n]
    assert trained
    assert all(p.any() for p in trained)


@pytest.mark.parametrize("how", ["save_state", "adapter"])
def test_accelerate_in_a_plain_loop(moe_folder: Path, tmp_path: Path, how: str) -> None:
    """`save_state` holds the whole model, which works where Linears are not bitsandbytes' 4-bit ones (they do
    not load a state dict); the adapter with the optimizer's state works for all.
    """
    from accelerate import Accelerator

    batches = torch.randint(3, 20, (4, 2, 10), generator=torch.Generator().manual_seed(0))

    def start(adapter: Path | None = None) -> tuple[Any, Any, Any]:
        accelerator = Accelerator(cpu=True)
        if how == "save_state":
            config = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4")
            model = AutoModelForCausalLM.from_pretrained(moe_folder, quantization_config=config)
            torch.manual_seed(1)
            model = get_peft_model(fourfold.prepare(model, gradient_checkpointing=False), lora(model))
        elif adapter is None:
            model = adapted(moe_folder)
        else:
            model = PeftModel.from_pretrained(base(moe_folder), str(adapter), is_trainable=True)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
        prepared = accelerator.prepare(model, optimizer)
        prepared[0].train()
        return accelerator, *prepared

    def steps(accelerator: Any, model: Any, optimizer: Any, which: Any) -> list[float]:
        found = []
        for ids in which:
            loss = model(ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    accelerator, model, optimizer = start()
    steps(accelerator, model, optimizer, batches[:2])
    if how == "save_state":
        accelerator.save_state(str(tmp_path))
    else:
        accelerator.unwrap_model(model).save_pretrained(tmp_path)
        state = copy.deepcopy(optimizer.state_dict())
    expected = steps(accelerator, model, optimizer, batches[2:])
    again = start(None if how == "save_state" else tmp_path)
    if how == "save_state":
        again[0].load_state(str(tmp_path))
    else:
        again[2].load_state_dict(state)
    assert steps(*again, batches[2:]) == expected
    again[1].eval()
    with torch.no_grad():
        assert torch.isfinite(again[1](batches[0], labels=batches[0]).loss)
