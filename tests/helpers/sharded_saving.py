"""What sharded models save and resume from; each function runs on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import fourfold
from fourfold.distributed.checkpoint import load_checkpoint, save_checkpoint
from fourfold.distributed.load import load_sharded
from fourfold.distributed.save import save_packed
from fourfold.distributed.sharding import shard
from fourfold.errors import FourfoldError
from ranks import Job
from sharded_models import (
    CASES,
    NF4,
    adam,
    adapted,
    assert_same_files,
    checkpoint,
    compute,
    far,
    load,
    train,
    trained,
    whole,
)


def saved_adapter(job: Job) -> dict[str, Any]:
    """`save_pretrained` of a sharded model, called on every rank: what one process saves."""
    source = checkpoint(job, "qwen3_moe_5")
    alone, model = (adapted(load(source, NF4, job.device)) for _ in range(2))
    shard(model)
    with torch.no_grad():  # (the same numbers in both, wherever rows lie)
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            if ours.requires_grad:
                ours.mul_(0.5)
                theirs.mul_(0.5)
    model.save_pretrained(job.shared("sharded-adapter"))
    if job.rank == 0:
        alone.save_pretrained(job.shared("adapter"))
    job.wait()
    found, wanted = job.shared("sharded-adapter"), job.shared("adapter")
    assert_same_files(found, wanted)
    tensors = load_file(found / "adapter_model.safetensors")
    return {n: int(t.abs().sum(1).count_nonzero()) - len(t) for n, t in tensors.items() if "lora_B" in n}


def saved_packed(job: Job, case: str) -> int:
    """`save_packed` from shards, in several files: the tensors and configuration that one process saves."""
    kind, settings, _ = CASES[case]
    source = checkpoint(job, kind)
    config = fourfold.MoeBitsAndBytesConfig(**settings, **compute(settings, torch.float32))
    model = load_sharded(source, quantization_config=config, device=job.device, dtype=torch.float32)
    gathers = []
    with pytest.MonkeyPatch.context() as monkey:
        for name in ("full_tensor", "redistribute"):
            monkey.setattr(DTensor, name, lambda *_, **__: gathers.append(1))
        files = save_packed(model, job.shared(f"{case}-shards"), max_shard_size="40KB")
    assert not gathers
    if job.rank == 0:
        load(source, settings, job.device).save_pretrained(job.shared(f"{case}-one"))
    job.wait()
    found, wanted = ({}, {})
    for folder, tensors in ((f"{case}-shards", found), (f"{case}-one", wanted)):
        for file in job.shared(folder).glob("*.safetensors"):
            tensors |= load_file(file)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert tensor.dtype == found[key].dtype, key
        assert torch.equal(tensor, found[key]), key
    names = ("config.json", "generation_config.json")
    for name in names:
        assert (job.shared(f"{case}-shards") / name).read_text() == (
            job.shared(f"{case}-one") / name
        ).read_text(), name
    again = load_sharded(job.shared(f"{case}-shards"), device=job.device, dtype=torch.float32)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(ours), whole(theirs)), name
    with pytest.raises(FourfoldError, match="exists"):  # (every rank is told, and none waits)
        save_packed(model, job.shared(f"{case}-shards"))
    return len(files)


def merged(job: Job) -> list[str]:
    """`fourfold.merge` of an adapter trained in shards, and of the same numbers saved by one process."""
    source = checkpoint(job, "qwen3_moe_5")
    model = shard(adapted(load(source, NF4, job.device)))
    train(model, job, alone=False, steps=3)
    model.save_pretrained(job.shared("trained-in-shards"))
    numbers = trained(model)
    if job.rank == 0:
        alone = adapted(load(source, NF4, job.device))
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(numbers[name])
        alone.save_pretrained(job.shared("trained-alone"))
        for who in ("in-shards", "alone"):
            fourfold.merge(source, job.shared(f"trained-{who}"), job.shared(f"merged-{who}"))
    job.wait()
    ours, theirs = (
        load_file(job.shared(f"merged-{w}") / "model.safetensors") for w in ("in-shards", "alone")
    )
    base = load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return [name for name, tensor in ours.items() if name not in base or not torch.equal(tensor, base[name])]


def resumed(job: Job) -> dict[str, float]:
    """Train 4 steps; save after 2, and go on: sharded, in one process, and from one process sharded."""
    source, batched = checkpoint(job, "qwen3_moe_5"), job.shared("run")
    model = shard(adapted(load(source, NF4, job.device)))
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 9])
    train(model, job, alone=False, steps=2, optimizer=optimizer)
    schedule.step()
    save_checkpoint(batched, model, optimizer, step=2, schedule=schedule)
    losses = train(model, job, alone=False, steps=3, optimizer=optimizer)
    after = trained(model)

    def go_on(folder: Path, model: Any, *, alone: bool) -> float:
        optimizer = adam(model)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7])
        back = load_checkpoint(folder, model, optimizer, step=0, schedule=schedule)
        assert back["step"] == 2
        assert schedule.milestones == {2: 1, 9: 1}
        same = train(model, job, alone=alone, steps=3, optimizer=optimizer)
        return max(abs(a - b) for a, b in zip(losses, same, strict=True)) + far(after, trained(model))

    sharded = go_on(batched, shard(adapted(load(source, NF4, job.device), seed=7)), alone=False)
    single = adapted(load(source, NF4, job.device), seed=8)
    alone = go_on(batched, single, alone=True)
    optimizer = adam(single)  # back to the second step, which one process saves
    load_checkpoint(batched, single, optimizer)
    save_checkpoint(job.shared("run-of-one"), single, optimizer, step=2, schedule=schedule)
    wider = go_on(
        job.shared("run-of-one"), shard(adapted(load(source, NF4, job.device), seed=9)), alone=False
    )
    files = {file.suffix for file in batched.iterdir()}
    assert files == {".json", ".safetensors"}
    return {"sharded": sharded, "alone": alone, "wider": wider}
