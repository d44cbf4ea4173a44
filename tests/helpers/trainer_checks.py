"""`Trainer` and `SFTTrainer`, unmodified, on several ranks, against a plain loop in one process.

The functions run in every rank (`ranks.run`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import accelerate_on_cpu  # noqa: F401
import fourfold
import sharded_models as checks
from fourfold.adapters import gather
from fourfold.distributed.load import load_sharded
from fourfold.distributed.sharding import is_sharded, shard
from fourfold.errors import FourfoldError
from fourfold.training.trainer import keep_adapter_dtype, make_collator
from ranks import Job
from tiny_chat import make_tokenizer

ROWS, LENGTH, GLOBAL_BATCH, CLIPPED = 80, 9, 4, 0.5
# name -> how the model is packed, the trainer's settings, fsdp_config
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nf4": (checks.NF4, {"gradient_accumulation_steps": 2}, {}),
    "kept": (
        checks.NF4,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"reshard_after_forward": False, "state_dict_type": "SHARDED_STATE_DICT"},
    ),
    "int8": (
        checks.INT8,
        {},
        {"cpu_offload": True, "activation_checkpointing": True, "cpu_ram_efficient_loading": True},
    ),
}
CHECKS = (
    *(f"trainer:{case}" for case in CASES),
    *("sft", "loaded_in_shards", "mixed_precision", "resumed:FULL_STATE_DICT", "resumed:SHARDED_STATE_DICT"),
    "evaluated_first",
    "refusals",
)


def rows() -> list[dict[str, torch.Tensor]]:
    ids = checks.batches(ROWS // GLOBAL_BATCH, GLOBAL_BATCH)
    return [{"input_ids": row, "labels": row} for batch in ids for row in batch]


class InOrder:
    """A trainer that takes its rows as they lie, so that a plain loop can do the same."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(range(ROWS))


class PlainTrainer(InOrder, Trainer):
    pass


class PlainSFTTrainer(InOrder, SFTTrainer):
    pass


def arguments(job: Job, fsdp: dict[str, Any], kind: type = TrainingArguments, **changes: Any) -> Any:
    os.environ.update(
        RANK=str(job.rank), LOCAL_RANK=str(job.rank), WORLD_SIZE=str(job.world), MASTER_ADDR="127.0.0.1"
    )
    os.environ["MASTER_PORT"] = "29500"  # (asked for; the group is there already)
    accumulation = changes.get("gradient_accumulation_steps", 1)
    settings: dict[str, Any] = {
        "output_dir": str(job.shared("out")),
        "per_device_train_batch_size": GLOBAL_BATCH // job.world // accumulation,
        "max_steps": checks.STEPS,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "weight_decay": 0.01,
        "max_grad_norm": CLIPPED,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "fsdp": True,
        "fsdp_config": dict(fsdp),
    }
    return kind(**(settings | changes))


def loop(folder: Path, settings: dict[str, Any], job: Job) -> tuple[list[float], Any, dict[str, Any]]:
    """Losses, model and the adapters it began with, of one process without any trainer."""
    model = checks.adapted(checks.load(folder, settings, job.device))
    begun = checks.trained(model)
    optimizer = checks.adam(model)
    losses = []
    for ids in checks.batches(checks.STEPS, GLOBAL_BATCH):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIPPED)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model, begun


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved(job: Job, trainer: Trainer, name: str, wanted: dict[str, torch.Tensor]) -> float:
    """How far the adapter that the trainer saves is from the one wanted; each row of each factor is there."""
    folder = job.shared(name)
    if "SHARDED" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        trainer.model.save_pretrained(folder)  # (a trainer saves no adapter then)
    else:
        trainer.save_model(str(folder))
    job.wait()
    stored = load_file(folder / "adapter_model.safetensors")
    expected = {key.replace(".default.", "."): tensor for key, tensor in wanted.items()}
    assert stored.keys() == expected.keys()
    for key, tensor in stored.items():
        assert (tensor.abs().sum(dim=1) > 0).all(), key
    assert json.loads((folder / "fourfold.json").read_text())
    return checks.far(stored, expected)


def compared(job: Job, trainer: Trainer, name: str, wanted: list[float], alone: Any, begun: Any) -> Any:
    losses, expected = losses_of(trainer), checks.trained(alone)
    assert is_sharded(trainer.model)
    stacks = [p for n, p in trainer.model.named_parameters() if ".experts." in n]
    assert all(isinstance(p.data, DTensor) for p in stacks)
    assert len(losses) == len(wanted) == checks.STEPS
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        "adapter": max(
            checks.far(checks.trained(trainer.model), expected), saved(job, trainer, name, expected)
        ),
        "moved": checks.far(begun, expected),
    }


def trainer(job: Job, case: str) -> dict[str, float]:
    settings, changes, fsdp = CASES[case]
    folder = checks.checkpoint(job, "qwen3_moe")
    wanted, alone, begun = loop(folder, settings, job)
    args = arguments(job, fsdp, **changes)
    model = checks.adapted(
        checks.load(folder, settings, job.device), "plain" if "gradient_checkpointing" in changes else ""
    )
    made = PlainTrainer(model=model, args=args, train_dataset=rows())
    made.train()
    return compared(job, made, f"saved-{case}", wanted, alone, begun)


def sft(job: Job) -> dict[str, float]:
    """`SFTTrainer`, whose loss takes the output layer's weight by itself, in tiles."""
    folder = checks.checkpoint(job, "tied")
    wanted, alone, begun = loop(folder, checks.NF4, job)
    args = arguments(job, {}, SFTConfig, max_length=None, router_aux_loss_coef=0.0)
    model = checks.adapted(checks.load(folder, checks.NF4, job.device))
    tokenizer = make_tokenizer()
    data = Dataset.from_list([{key: row.tolist() for key, row in each.items()} for each in rows()])
    with keep_adapter_dtype(model):  # (TRL casts adapters to bf16)
        made = PlainSFTTrainer(
            model=model,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=make_collator(tokenizer),
        )
    made.train()
    return compared(job, made, "saved-sft", wanted, alone, begun)


def loaded_in_shards(job: Job) -> dict[str, float]:
    """A model of which no rank ever held more than its share, given to a trainer."""
    folder = checks.checkpoint(job, "qwen3_moe")
    wanted, alone, begun = loop(folder, checks.NF4, job)
    config = fourfold.MoeBitsAndBytesConfig(**checks.NF4, **checks.compute(checks.NF4, torch.float32))
    model = load_sharded(folder, quantization_config=config, device=job.device, dtype=torch.float32)
    made = PlainTrainer(model=checks.adapted(model), args=arguments(job, {}), train_dataset=rows())
    made.train()
    return compared(job, made, "saved-loaded", wanted, alone, begun)


def mixed_precision(job: Job) -> dict[str, Any]:
    """In bf16 trained parameters are kept in fp32, and packed experts as they are."""
    folder = checks.checkpoint(job, "qwen3_moe")
    model = checks.load(folder, checks.NF4, job.device, torch.bfloat16)
    stored = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    adapted = checks.adapted(model)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    made = PlainTrainer(model=adapted, args=arguments(job, {}, bf16=True, max_steps=3), train_dataset=rows())
    made.train()
    now = dict(made.model.named_parameters())
    assert {p.dtype for p in now.values() if p.requires_grad} == {torch.float32}
    for name, tensor in stored.items():
        (ours,) = [p for n, p in now.items() if n.replace("base_layer.", "").endswith(name)]
        assert torch.equal(gather.whole(ours.data).view(-1), torch.Tensor(tensor.data).view(-1)), name
    return {"losses": losses_of(made)}


def resumed(job: Job, state: str) -> dict[str, float]:
    """Ten steps, and ten more in another trainer, are twenty."""
    folder = checks.checkpoint(job, "qwen3_moe")
    fsdp = {"state_dict_type": state}
    out = {"output_dir": str(job.shared(f"run-{state}"))}

    def made(seed: int, **changes: Any) -> Trainer:
        model = checks.adapted(checks.load(folder, checks.NF4, job.device), seed=seed)
        return PlainTrainer(model=model, args=arguments(job, fsdp, **out, **changes), train_dataset=rows())

    whole = made(0, save_strategy="steps", save_steps=10)
    whole.train()
    again = made(1)
    again.train(resume_from_checkpoint=str(job.shared(f"run-{state}") / "checkpoint-10"))
    return {
        "loss": max(abs(a - b) for a, b in zip(losses_of(whole), losses_of(again), strict=True)),
        "adapter": checks.far(checks.trained(whole.model), checks.trained(again.model)),
        "moved": 1.0,
    }


def evaluated_first(job: Job) -> dict[str, float]:
    """What a forward without gradients has gathered is not what training goes on with."""
    folder = checks.checkpoint(job, "qwen3_moe")
    alone, model = (checks.adapted(checks.load(folder, checks.NF4, job.device)) for _ in range(2))
    begun = checks.trained(alone)
    wanted = checks.train(alone, job, alone=True, steps=4)
    shard(model, reshard_after_forward=False)
    with torch.no_grad():
        model(input_ids=checks.batches(1)[0])
    losses = checks.train(model, job, alone=False, steps=4)
    return checks.compared(alone, model, wanted, losses, begun)


def refusals(job: Job) -> dict[str, str]:
    folder = checks.checkpoint(job, "qwen3_moe")
    said: dict[str, str] = {}
    for name, fsdp in {
        "class": {"transformer_layer_cls_to_wrap": ["Qwen3MoeAttention"]},
        "size": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100},
    }.items():
        model = checks.adapted(checks.load(folder, checks.NF4, job.device))
        with pytest.raises(FourfoldError) as caught:
            PlainTrainer(model=model, args=arguments(job, fsdp), train_dataset=rows()).train()
        said[name] = str(caught.value)
    model = checks.adapted(checks.load(folder, checks.NF4, job.device))
    made = PlainTrainer(model=shard(model), args=arguments(job, {}, max_steps=1), train_dataset=rows())
    made.train()  # (sharded already: taken as it is)
    return said
