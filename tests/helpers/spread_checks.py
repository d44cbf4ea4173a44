"""Experts spread over ranks (expert parallelism): what is checked on several ranks (`ranks.run`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils import hotswap
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from transformers.distributed.sharding_utils import DtensorShardOperation

import foreign_checkpoints
import fourfold
import tiny
from fourfold.adapters.spread import spread_factors
from fourfold.distributed.checkpoint import save_checkpoint
from fourfold.distributed.clip import clip_grad_norm_
from fourfold.distributed.replicas import replicate
from fourfold.distributed.save import save_packed
from fourfold.distributed.sharding import shard
from ranks import Job
from sharded_models import (
    FP4,
    INT8,
    NF4,
    STEPS,
    adam,
    adapted,
    assert_same_files,
    batches,
    checkpoint,
    compute,
    far,
    load,
    whole,
)

# name -> model, how it is packed, implementation, checkpointing
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "nf4": ("qwen3_moe", NF4, "auto", ""),
    "reduced": ("qwen3_moe", NF4, "all_reduce", "plain"),
    "fp4": ("mixtral", FP4, "auto", "reentrant"),
    "interleaved": ("gpt_oss", NF4, "auto", "plain"),
    "int8": ("qwen3_moe", INT8, "all_to_all", ""),
    "no_gate": ("nemotron_h", {"experts_quant_type": "int8"}, "auto", ""),
}
STORED = ("plain", "packed")
CHECKS = (
    *(f"trained:{case}" for case in CASES),
    *(f"loaded:{case}:{stored}" for case in ("nf4", "interleaved", "int8") for stored in STORED),
    *("adapters", "generated", "saved", "unlike", "refusals", "before_loading"),
)


def spread(
    job: Job, folder: Path, settings: dict[str, Any] | None, implementation: str = "auto", **how: Any
) -> Any:
    config = None
    if settings is not None:
        config = fourfold.MoeBitsAndBytesConfig(**settings, **compute(settings, torch.float32))
    sizes = {"tp_size": job.world, "ep_size": job.world, "ep_implementation": implementation} | how
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        distributed_config=DistributedConfig(**sizes),
        **({"quantization_config": config} if config is not None else {}),
    )


def trained_of(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, with all experts."""
    factors = spread_factors(model)
    return {
        name: factors[name].whole(p).clone() if name in factors else p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def train(model: Any, job: Job, clip: float | None = None, steps: int = STEPS) -> list[float]:
    """Losses of some steps; every rank computes the whole batch."""
    optimizer, losses = adam(model), []
    for ids in batches(steps):
        parts = ids.chunk(2)
        for part in parts:
            loss = model(input_ids=part.to(job.device), labels=part.to(job.device)).loss / len(parts)
            loss.backward()
        if clip is not None:
            clip_grad_norm_(model, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(job: Job, case: str) -> dict[str, float]:
    """Losses and adapters after some steps against one process, gradients clipped."""
    kind, settings, implementation, checkpointing = CASES[case]
    folder = checkpoint(job, kind)
    alone = adapted(load(folder, settings, job.device), checkpointing)
    begun = trained_of(alone)
    wanted = train(alone, job, clip=0.5)
    model = adapted(spread(job, folder, settings, implementation), checkpointing)
    assert far(begun, trained_of(model)) == 0
    own = [p for n, p in model.named_parameters() if n in spread_factors(model)]
    assert own
    losses = train(model, job, clip=0.5)
    moved = far(begun, trained_of(alone))
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        "adapters": far(trained_of(alone), trained_of(model)),
        "moved": moved,
    }


def loaded(job: Job, case: str, stored: str) -> dict[str, int]:
    """Every tensor against `from_pretrained`, and how many bytes of experts a rank reads and keeps."""
    kind, settings, _, _ = CASES[case]
    source = checkpoint(job, kind)
    reference = load(source, settings, job.device)
    if stored == "packed":
        source = job.shared(f"{case}-packed")
        if job.rank == 0 and not source.exists():
            reference.save_pretrained(source)
        job.wait()
    read: list[int] = []
    stock = DtensorShardOperation.shard_tensor

    def watched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found = stock(self, *arguments, **keywords)
        read.append(0 if found is None else found.numel())
        return found

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(DtensorShardOperation, "shard_tensor", watched)
        model = spread(job, source, None if stored == "packed" else settings)
    held = total = numbers = packed = 0
    ours = dict(model.named_parameters())
    assert ours.keys() == dict(reference.named_parameters()).keys()
    for name, wanted in reference.named_parameters():
        found = ours[name]
        assert torch.equal(whole(found).view(-1), whole(wanted).view(-1)), name
        if ".experts." in name:
            local = found.to_local()
            # (read as it is, on a CPU, it is a view of the mapped file, of which no more is touched)
            as_it_is = stored == "packed" or wanted.is_floating_point()
            assert as_it_is or local.untyped_storage().nbytes() == local.nbytes, name
            held, total = held + local.nbytes, total + wanted.nbytes
            packed += 0 if wanted.is_floating_point() else local.nbytes
            numbers += local.numel() if stored == "packed" else 0
    if stored == "plain":
        stored_whole = load_again(source).named_parameters()
        numbers = sum(p.numel() for name, p in stored_whole if ".experts." in name) // job.world
    rows = {row["role"]: row for row in fourfold.verify(model).to_dict()["rows"]}
    return {  # (in bytes, and in numbers)
        "held": held,
        "total": total,
        "read": sum(read),
        "numbers": numbers,
        "packed": packed,
        "reported": rows["experts"]["bytes"],
    }


def adapters(job: Job) -> dict[str, bool]:
    """Saved whole, byte for byte as one process does; read again, spread and alone."""
    source = checkpoint(job, "qwen3_moe")
    alone, model = adapted(load(source, NF4, job.device)), adapted(spread(job, source, NF4))
    train(alone, job, steps=1)
    with torch.no_grad():  # (the same numbers in both)
        factors = spread_factors(model)
        wanted = dict(alone.named_parameters())
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(factors[name].cut(wanted[name]) if name in factors else wanted[name])
    model.save_pretrained(job.shared("spread-adapter"))
    if job.rank == 0:
        alone.save_pretrained(job.shared("one-adapter"))
    job.wait()
    found, other = job.shared("spread-adapter"), job.shared("one-adapter")
    assert_same_files(found, other)
    again = PeftModel.from_pretrained(spread(job, source, NF4), found, is_trainable=True)
    assert far(trained_of(again), trained_of(alone)) == 0
    ids = tiny.IDS.to(job.device)
    with torch.no_grad():
        off = (again.eval()(input_ids=ids).logits - alone.eval()(input_ids=ids).logits).abs().max().item()
    return {"logits": off < 1e-5}


def generated(job: Job) -> list[int]:
    source = checkpoint(job, "qwen3_moe")
    prompt = tiny.IDS[:1, :4].to(job.device)
    texts = [
        model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()
        for model in (load(source, NF4, job.device).eval(), spread(job, source, NF4).eval())
    ]
    assert texts[0] == texts[1]
    return texts[1]


def saved(job: Job) -> bool:
    """The packed base, by `save_packed` and by `save_pretrained`: what one process writes."""
    source = checkpoint(job, "qwen3_moe")
    model = spread(job, source, NF4)
    save_packed(model, job.shared("spread-packed"))
    model.save_pretrained(job.shared("spread-saved"))
    job.wait()
    wanted = load(source, NF4, job.device)
    for folder in ("spread-packed", "spread-saved"):
        again = load_again(job.shared(folder))
        for name, parameter in wanted.named_parameters():
            assert torch.equal(again.get_parameter(name).view(-1), parameter.view(-1)), (folder, name)
        assert again.config.to_dict().get("distributed_config") is None
    return True


def load_again(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def told(act: Any) -> str:
    with pytest.raises(Exception) as caught:
        act()
    return f"{type(caught.value).__name__}: {caught.value}"


def unlike(job: Job) -> dict[str, str]:
    """Ranks that do not compute the same."""
    source = checkpoint(job, "qwen3_moe")
    ids = tiny.IDS.to(job.device)
    model = adapted(spread(job, source, NF4), seed=job.rank)
    said = {"seeds": told(lambda: model(input_ids=ids))}
    model = adapted(spread(job, source, NF4))
    said["batches"] = told(lambda: model(input_ids=ids + job.rank))
    said["lengths"] = told(lambda: model(input_ids=ids[:, : 5 + job.rank]))
    optimizer = adam(model)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
    optimizer.step()
    said["clipped"] = told(lambda: model(input_ids=ids))
    return said


def refusals(job: Job) -> dict[str, str]:
    """What takes all experts to be on one rank."""
    source = checkpoint(job, "qwen3_moe")
    model = adapted(spread(job, source, NF4))
    return {
        "shard": told(lambda: shard(model)),
        "replicate": told(lambda: replicate(model)),
        "ddp": told(lambda: DistributedDataParallel(model)),
        "offload": told(lambda: fourfold.offload(model)),
        "checkpoint": told(lambda: save_checkpoint(job.shared("nowhere"), model)),
        "hotswap": told(lambda: hotswap.hotswap_adapter_from_state_dict(model, {}, "default", LoraConfig())),
        "loftq": told(lambda: fourfold.loftq_init(model)),
        "dequantize": told(lambda: fourfold.dequantize(spread(job, source, NF4))),
    }


def mxfp4(job: Job) -> Path:
    folder = job.shared("mxfp4")
    if job.rank == 0:
        folder.mkdir()
        (job.folder / "mxfp4").write_text(str(foreign_checkpoints.mxfp4(folder)[0]))
    job.wait()
    return Path((job.folder / "mxfp4").read_text())


def before_loading(job: Job) -> dict[str, str]:
    """Settings that cannot be: said before a weight is read."""
    source = checkpoint(job, "qwen3_moe")

    def said(folder: Path = source, settings: dict[str, Any] = NF4, **how: Any) -> str:
        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(
                transformers.PreTrainedModel, "_load_pretrained_model", lambda *_, **__: pytest.fail("read")
            )
            return told(lambda: spread(job, folder, settings, **how))

    return {
        "uneven": said(checkpoint(job, "qwen3_moe_5")),
        "other_format": said(mxfp4(job), {"experts_quant_type": "nf4"}),
        "own_forward": said(checkpoint(job, "llama4")),
        "tensor": said(ep_size=1),
        "tp_plan": said(tp_plan={}),
        "shards": said(tp_size=1, fsdp_size=job.world),
        "pipeline": said(tp_size=1, ep_size=1, pp_size=job.world),
        "host": said(settings={"experts_quant_type": "nf4", "experts_device": "cpu"}),
        "plan": said(ep_plan={"model.layers.*.mlp.experts.down_proj": "moe_tp_experts"}),
    }
