"""Tiny models, how they are packed, loaded and trained, for the checks on several ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

import fourfold
import tiny
from fourfold.adapters import gather
from fourfold.training.packing import packing_collator
from ranks import Job

STEPS = 20
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}
MODELS: dict[str, Any] = {
    "qwen3_moe": tiny.qwen3_moe,
    "many": lambda: tiny.qwen3_moe(num_experts=16),
    "qwen3_moe_5": lambda: tiny.qwen3_moe(num_experts=5),
    "tied": lambda: tiny.qwen3_moe(tie_word_embeddings=True),
    "mixtral": tiny.mixtral,
    "gpt_oss": tiny.gpt_oss,
    "nemotron_h": tiny.nemotron_h,
    "deepseek_v3": tiny.deepseek_v3,
    "llama4": tiny.llama4,
    "jetmoe": tiny.jetmoe,
    "dbrx": tiny.dbrx,
}
# name -> model, how it is packed, how it is trained
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nf4": ("qwen3_moe", NF4, {}),
    "nf4_uneven": ("qwen3_moe_5", NF4, {"checkpointing": "plain", "reshard_after_forward": False}),
    "fp4": ("mixtral", FP4, {"checkpointing": "reentrant"}),
    "tied": ("tied", NF4, {"accumulation": 2}),
    "interleaved": ("gpt_oss", NF4, {"checkpointing": "plain", "accumulation": 2}),
    "int8": ("qwen3_moe", INT8, {"checkpointing": "plain"}),
    "no_gate": ("nemotron_h", {"experts_quant_type": "int8"}, {"reshard_after_forward": False}),
    "latent": ("deepseek_v3", {"experts_quant_type": "nf4"}, {"offload": True}),
    "own_forward": ("llama4", NF4, {"checkpointing": "plain"}),
    "modules": ("jetmoe", FP4, {"accumulation": 2, "reshard_after_forward": False}),
    "flattened": ("dbrx", NF4, {"checkpointing": "reentrant"}),
    "packed_rows": ("qwen3_moe", NF4, {"packing": True, "accumulation": 2, "checkpointing": "plain"}),
}
# Lengths of the examples of a packed row; together those of a row of `batches`.
EXAMPLES = (4, 3, 2)


def checkpoint(job: Job, kind: str) -> Path:
    """A folder with a tiny model of that kind, in high precision."""
    folder = job.shared(kind)
    if job.rank == 0 and not folder.exists():
        tiny.save(MODELS[kind](), folder)
    job.wait()
    return folder


def checkpoint_of(kind: str, job: Job) -> Path:
    return job.shared(kind)


def load(folder: Path, settings: dict[str, Any], device: str, dtype: torch.dtype = torch.float32) -> Any:
    config = fourfold.MoeBitsAndBytesConfig(**settings, **compute(settings, dtype))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": device}
    )


def compute(settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {"bnb_4bit_compute_dtype": dtype} if settings.get("load_in_4bit") else {}


def adapted(model: Any, checkpointing: str = "", seed: int = 0) -> Any:
    """With LoRA on experts and on a Linear of the attention, both factors random."""
    fourfold.prepare(
        model, gradient_checkpointing=bool(checkpointing), use_reentrant=checkpointing == "reentrant"
    )
    torch.manual_seed(seed)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    modules = sorted(names & {"q_proj", "o_proj", "Wqkv", "q_a_proj"})
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=modules,
        target_parameters=fourfold.expert_targets(model),
        init_lora_weights=False,
    )
    return get_peft_model(model, lora).train()


def batches(steps: int, rows: int = 4, vocabulary: int = 96) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocabulary, (rows, 9), generator=generator) for _ in range(steps)]


def inputs(ids: torch.Tensor, packing: bool) -> dict[str, Any]:
    """A batch as a trainer gives it: rows side by side, or examples of all rows end to end."""
    if not packing:
        return {"input_ids": ids, "labels": ids}
    rows = [{"input_ids": row, "labels": row, "seq_lengths": list(EXAMPLES)} for row in ids.tolist()]
    batch = packing_collator(SimpleNamespace(pad_token_id=0))(rows)
    batch = {n: v.to(ids.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    return batch | {"use_cache": False}  # as trainers do: with a cache boundaries are not looked for


def train(
    model: Any,
    job: Job,
    *,
    alone: bool,
    accumulation: int = 1,
    packing: bool = False,
    steps: int = STEPS,
    optimizer: Any = None,
) -> list[float]:
    """Losses of some steps on the same global batch: all of it alone, or each rank its rows."""
    optimizer = optimizer or adam(model)
    losses = []
    for ids in batches(steps):
        mine = ids if alone else ids.chunk(job.world)[job.rank]
        parts = mine.chunk(accumulation)
        total = torch.zeros((), device=job.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            if not alone and not isinstance(model, DistributedDataParallel):
                model.set_requires_gradient_sync(last)
            apart = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if apart else contextlib.nullcontext():
                loss = model(**inputs(part.to(job.device), packing)).loss / len(parts)
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if not alone:
            dist.all_reduce(total)
            total /= job.world
        losses.append(total.item())
    return losses


def adam(model: Any) -> torch.optim.Optimizer:
    # (an epsilon that is not tiny: where a gradient is noise, Adam would make steps of full size of it)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return gather.whole(tensor).detach().cpu().clone()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def assert_same_files(found: Path, wanted: Path) -> None:
    """Two folders hold the same files, byte for byte."""
    names = sorted(file.name for file in wanted.iterdir())
    assert sorted(file.name for file in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def compared(
    alone: Any, model: Any, wanted: list[float], losses: list[float], begun: dict[str, torch.Tensor]
) -> dict[str, float]:
    """How far losses and adapters of ``model`` are from those of ``alone``, and how far that one came."""
    return apart(trained(alone), model, wanted, losses, begun)


def apart(
    after: dict[str, torch.Tensor],
    model: Any,
    wanted: list[float],
    losses: list[float],
    begun: dict[str, torch.Tensor],
) -> dict[str, float]:
    """The same, of the adapters that one process ended with."""
    return {
        "loss": max(abs(a - b) for a, b in zip(wanted, losses, strict=True)),
        "adapter": far(after, trained(model)),
        "moved": far(begun, after),
    }


def equal(results: list[dict[str, float]], bound: float = 1e-5) -> None:
    """What `fsdp`, `ddp` and `loaded` found on each rank: equal, and not for want of movement."""
    for found in results:
        assert found["moved"] > 1e-3, found
        assert found["loss"] < bound, found
        assert found["adapter"] < bound, found
