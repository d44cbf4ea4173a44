"""Sharded and replicated training against one process; each function runs on every rank."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor

import fourfold
import tiny
from fourfold.distributed.load import load_sharded
from fourfold.distributed.replicas import replicate
from fourfold.distributed.save import save_packed
from fourfold.distributed.sharding import shard
from fourfold.experts.layout import clean_name
from ranks import Job
from sharded_models import (
    CASES,
    INT8,
    NF4,
    adapted,
    apart,
    checkpoint,
    compared,
    compute,
    far,
    load,
    train,
    trained,
    whole,
)


def fsdp(job: Job, case: str) -> dict[str, float]:
    """FSDP2 against one process: losses and adapters after `STEPS` steps."""
    return trained_apart(job, *CASES[case])


def trained_apart(
    job: Job, kind: str, settings: dict[str, Any], how: dict[str, Any], alone: Any = None
) -> dict[str, float]:
    """Train one process and a sharded model on the same batches; how far they end apart.

    Args:
        kind, settings, how: as in `CASES`.
        alone: what `one_process` gave for the same; None runs it.
    """
    begun, wanted, after = alone or one_process(job, kind, settings, how)
    model = adapted(
        load(checkpoint(job, kind), settings, job.device), how.get("checkpointing", ""), seed=job.rank
    )  # (unlike on each rank)
    offload = CPUOffloadPolicy(pin_memory=job.device != "cpu") if how.get("offload") else None
    shard(model, reshard_after_forward=how.get("reshard_after_forward", True), offload=offload)
    assert far(begun, trained(model)) == 0
    losses = train(model, job, alone=False, **_ways(how))
    return apart(after, model, wanted, losses, begun)


def _ways(how: dict[str, Any]) -> dict[str, Any]:
    return {name: how[name] for name in ("accumulation", "packing") if name in how}


def one_process(
    job: Job, kind: str, settings: dict[str, Any], how: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]:
    """Adapters before, losses, and adapters after training of all rows in one process."""
    alone = adapted(load(checkpoint(job, kind), settings, job.device), how.get("checkpointing", ""))
    begun = trained(alone)
    return begun, train(alone, job, alone=True, **_ways(how)), trained(alone)


def every_way(job: Job) -> dict[str, Any]:
    """Checkpointing, accumulation, packing, resharding and offloaded shards in all combinations."""
    found: dict[str, Any] = {}
    for checkpointing, accumulation, packing in itertools.product(
        ("", "plain", "reentrant"), (1, 2), (False, True)
    ):
        how: dict[str, Any] = {
            "checkpointing": checkpointing,
            "accumulation": accumulation if job.world < 4 else 1,  # (four ranks have a row each)
            "packing": packing,
        }
        alone = one_process(job, "qwen3_moe_5", NF4, how)
        for reshard, offload in itertools.product((True, False), (False, True)):
            way = how | {"reshard_after_forward": reshard, "offload": offload}
            name = f"{checkpointing} {accumulation} {packing} {reshard} {offload}"
            found[name] = trained_apart(job, "qwen3_moe_5", NF4, way, alone)
    return found


def packing_matters(job: Job) -> list[float]:
    """The first loss of one process with examples apart, and with rows as one example each."""
    model = adapted(load(checkpoint(job, "qwen3_moe"), NF4, job.device))
    return [train(model, job, alone=True, packing=packing, steps=1)[0] for packing in (True, False)]


def ddp(job: Job, case: str) -> dict[str, float]:
    """DDP with the packed model on every rank against one process."""
    kind, settings, how = CASES[case]
    begun, wanted, after = one_process(job, kind, settings, how)
    inner = load(checkpoint(job, kind), settings, job.device)
    inner = adapted(inner, how.get("checkpointing", ""), seed=job.rank)
    losses = train(replicate(inner), job, alone=False, **_ways(how))
    return apart(after, inner, wanted, losses, begun)


def int8_linears(job: Job) -> dict[str, int]:
    """Bytes of 8-bit Linears and of INT8 experts, on this rank and of the whole model."""
    model = shard(adapted(load(checkpoint(job, "qwen3_moe"), INT8, job.device)))
    found = {"linears": 0, "linears_whole": 0, "experts": 0, "experts_whole": 0}
    for name, parameter in model.named_parameters():
        kind = "experts" if isinstance(parameter.data, DTensor) and ".mlp.experts." in name else ""
        if type(parameter).__name__ == "Int8Params":
            kind = "linears"
        if kind and not parameter.requires_grad:
            here = parameter.to_local() if isinstance(parameter.data, DTensor) else parameter
            found[kind] += here.nbytes
            found[f"{kind}_whole"] += parameter.numel() * parameter.element_size()
    return found


def bf16(job: Job, kind: str) -> dict[str, float]:
    """bf16 by autocast: FSDP2 against one process on the same rows, and that with all rows at once."""
    ends, losses = [], []
    for way in ("apart", "at once", "sharded"):
        model = load(job.shared(kind), NF4, job.device, torch.bfloat16)
        model = adapted(model, "plain")
        begun = trained(model)
        if way == "sharded":
            shard(model)
        alone = way != "sharded"
        with torch.autocast("cuda", torch.bfloat16):
            found = train(model, job, alone=alone, steps=10, accumulation=job.world if way == "apart" else 1)
        losses.append(found)
        ends.append({name: tensor - begun[name] for name, tensor in trained(model).items()})
        del model
        torch.cuda.empty_cache()

    def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        difference = sum((one[n] - other[n]).double().square().sum() for n in one)
        return float((difference / sum(t.double().square().sum() for t in one.values())).sqrt())

    return {
        "loss": max(abs(a - b) for a, b in zip(losses[0], losses[2], strict=True)),
        "loss_noise": max(abs(a - b) for a, b in zip(losses[0], losses[1], strict=True)),
        "adapter": apart(ends[0], ends[2]),
        "adapter_noise": apart(ends[0], ends[1]),
    }


def generated(job: Job) -> list[int]:
    """Evaluation and generation on a sharded model with adapters, twice: those of one process."""
    folder = checkpoint(job, "qwen3_moe_5")
    settings = {"experts_quant_type": "nf4"}
    models = [adapted(load(folder, settings, job.device)).eval() for _ in range(2)]
    shard(models[1])
    ids = tiny.IDS.to(job.device)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in models]
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    tokens = [
        model.generate(input_ids=ids[:1, :5], max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist()
        for model in (*models, models[1])
    ]
    assert tokens[0] == tokens[1] == tokens[2]
    return list(tokens[0][0])


def replicas_of_shards(job: Job) -> dict[str, float]:
    """Two replicas of two shards each (HSDP): loaded in shards, trained, and written by one replica."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    folder = checkpoint(job, "qwen3_moe_5")
    alone = adapted(load(folder, NF4, job.device))
    begun = trained(alone)
    wanted = train(alone, job, alone=True)
    config = fourfold.MoeBitsAndBytesConfig(**NF4, **compute(NF4, torch.float32))
    model = load_sharded(folder, mesh, quantization_config=config, dtype=torch.float32)
    save_packed(model, job.shared("of-replicas"))
    experts = next(p for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    assert experts.to_local().shape[0] == (3, 2)[job.rank % 2]
    stored = load_file(job.shared("of-replicas") / "model.safetensors")
    assert torch.equal(stored["model.layers.0.mlp.experts.gate_up_proj"], whole(experts))
    model = shard(adapted(model, seed=job.rank), mesh)
    return compared(alone, model, wanted, train(model, job, alone=False), begun)


def sent_by_ddp(job: Job) -> dict[str, int]:
    """Bytes that DDP broadcasts when it is made: those of the trained parameters."""
    model = adapted(load(checkpoint(job, "qwen3_moe"), NF4, job.device))
    sent: list[torch.Tensor] = []
    stock = dist._broadcast_coalesced

    def counted(group: Any, tensors: list[torch.Tensor], *rest: Any) -> Any:
        sent.extend(tensors)
        return stock(group, tensors, *rest)

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(dist, "_broadcast_coalesced", counted)
        replicate(model)
    trained_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"sent": sum(t.nbytes for t in sent), "trained": trained_bytes}


def mixed_precision(job: Job) -> dict[str, float]:
    """bf16 policy: what is gathered of packed experts are the stored integers, all of them.

    `fully_shard` is as in torch 2.11, which casts whatever has another dtype.
    """

    def init_dtype_attrs(self: Any, policy: MixedPrecisionPolicy) -> None:
        self.orig_dtype = self.sharded_param.dtype
        self.param_dtype = None if policy.param_dtype == self.orig_dtype else policy.param_dtype
        self.reduce_dtype = None if policy.reduce_dtype == policy.param_dtype else policy.reduce_dtype

    folder = checkpoint(job, "qwen3_moe_5")
    alone = load(folder, NF4, job.device)
    stored = {n: p.detach().clone() for n, p in alone.named_parameters() if not p.is_floating_point()}
    seen: dict[str, bool] = {}

    def look(name: str) -> Any:
        def hook(module: Any, *_: Any) -> None:
            for leaf, parameter in module.named_parameters(recurse=False):
                wanted = stored[f"{name}.{leaf}"]
                same = parameter.dtype == wanted.dtype and torch.equal(parameter.view(-1), wanted.view(-1))
                seen[f"{name}.{leaf}"] = same

        return hook

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(FSDPParam, "init_dtype_attrs", init_dtype_attrs)
        model = adapted(load(folder, NF4, job.device))
        for name, module in model.named_modules():
            if isinstance(module, (fourfold.experts.PackedExperts, Linear4bit)):
                module.register_forward_pre_hook(look(clean_name(name)))
        shard(model, mixed_precision=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        loss = train(model, job, alone=False, steps=2)[-1]
    assert len(stored) >= 20
    assert seen.keys() == stored.keys()
    assert all(seen.values()), [name for name, same in seen.items() if not same]
    return {"loss": loss}
