"""What is refused on several ranks, and how it is said; each function runs on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.distributed import DistributedConfig

import fourfold
import fourfold.distributed.load as load_module
import fourfold.distributed.save as save_module
import fourfold.distributed.sharding as sharding_module
import fourfold.distributed.storage as storage_module
import tiny
from fourfold.distributed.checkpoint import load_checkpoint, save_checkpoint
from fourfold.distributed.load import load_sharded
from fourfold.distributed.replicas import replicate
from fourfold.distributed.save import save_packed
from fourfold.distributed.sharding import shard
from fourfold.errors import CheckpointError, ConfigurationError, FourfoldError
from ranks import Job
from sharded_models import (
    NF4,
    adapted,
    checkpoint,
    load,
)


def refusals(job: Job) -> dict[str, str]:
    """Settings that cannot be, each with its message."""
    said: dict[str, str] = {}

    def refused(name: str, act: Any) -> None:
        try:
            act()
        except FourfoldError as error:
            said[name] = str(error)

    folder = checkpoint(job, "qwen3_moe")
    model = adapted(load(folder, NF4, job.device))
    next(p for n, p in model.named_parameters() if "q_proj.lora_A" in n).data = torch.zeros(
        4, 64, dtype=torch.bfloat16, device=job.device
    )
    refused("dtypes", lambda: shard(model))
    model = shard(adapted(load(folder, NF4, job.device)))
    refused("twice", lambda: shard(model))
    refused("offload", lambda: fourfold.offload(model))
    offloaded = load(folder, NF4, job.device)
    fourfold.offload(offloaded)
    refused("offloaded", lambda: shard(adapted(offloaded)))
    on_cpu = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4", experts_device="cpu")
    refused("experts_device", lambda: load_sharded(folder, quantization_config=on_cpu, device=job.device))
    frozen = load(folder, NF4, job.device).requires_grad_(False)
    refused("nothing", lambda: replicate(frozen))
    narrow = adapted(load(folder, NF4, job.device))
    next(m for n, m in narrow.named_modules() if n.endswith("q_proj")).in_features = 32
    refused("widths", lambda: shard(narrow))
    shares = DistributedConfig(fsdp_size=job.world)
    config = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4")
    made = transformers.AutoModelForCausalLM.from_pretrained
    refused("loader", lambda: made(folder, quantization_config=config, distributed_config=shares))
    cast = load(folder, {"experts_quant_type": "nf4"}, job.device)
    experts = tiny.experts_of(cast)
    experts._parameters["down_proj"].data = experts._parameters["down_proj"].data.to(torch.bfloat16)
    refused("cast", lambda: cast(input_ids=tiny.IDS.to(job.device)))
    refused("no layers", lambda: shard(torch.nn.Linear(2, 2).to(job.device)))
    refused("no checkpoint", lambda: load_checkpoint(job.shared("nowhere"), model))
    refused("adapters", lambda: save_packed(model, job.shared("nowhere")))
    refused("not packed", lambda: load_sharded(folder, device=job.device))
    return said


def other_weights(job: Job) -> list[str]:
    """Ranks that loaded different weights are told so, by both ways of going parallel."""
    said = []

    def swap(model: Any) -> None:  # (two rows of an expert: the same bytes in another order)
        experts = next(m for m in model.modules() if isinstance(m, fourfold.experts.PackedExperts))
        rows = experts._parameters["down_proj"].data[0]
        rows[[0, 1]] = rows[[1, 0]]

    def scale(model: Any) -> None:
        linear = next(m for n, m in model.named_modules() if n.endswith("o_proj.base_layer"))
        linear.weight.quant_state.state2.absmax[0] *= 1.5

    for act, change in ((replicate, swap), (shard, swap), (shard, scale)):
        model = adapted(load(checkpoint(job, "qwen3_moe"), NF4, job.device))
        if job.rank == 1:
            change(model)
        try:
            act(model)
        except ConfigurationError as error:
            said.append(str(error))
    model = adapted(load(checkpoint(job, "qwen3_moe"), NF4, job.device))
    if job.rank == 1:
        model.get_base_model().lm_head.register_parameter("more", torch.nn.Parameter(torch.ones(2), False))
    try:
        replicate(model)
    except ConfigurationError as error:
        said.append(str(error))
    return said


def one_rank_fails(job: Job) -> dict[str, str]:
    """What only the second rank meets: all of them raise, none waits, and each message names that rank."""
    said: dict[str, str] = {}
    source = checkpoint(job, "qwen3_moe")
    config = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4")

    def fail(error: Exception) -> Any:
        def act(*_: Any, **__: Any) -> Any:
            raise error

        return act

    def attempt(what: str, where: Any, name: str, error: Exception, act: Any) -> None:
        with pytest.MonkeyPatch.context() as monkey:
            if job.rank == 1:
                monkey.setattr(where, name, fail(error))
            try:
                act()
            except FourfoldError as raised:
                said[what] = f"{type(raised).__name__}: {raised}"

    def loading() -> Any:
        return load_sharded(source, quantization_config=config, device=job.device, dtype=torch.float32)

    short = torch.OutOfMemoryError("tried to allocate 3 GiB")
    attempt("load", load_module._ShardedStream, "_keep", short, loading)
    attempt("read", load_module, "read_config", CheckpointError("no config.json"), loading)
    packed = loading()
    target = job.shared("one-rank-fails")
    attempt("list", save_module, "_entries", CheckpointError("odd"), lambda: save_packed(packed, target))
    attempt("write", save_module, "_write", OSError("disk full"), lambda: save_packed(packed, target))
    model = adapted(load(source, NF4, job.device))
    attempt("shard", sharding_module, "_take_out", short, lambda: shard(model))
    model = shard(adapted(load(source, NF4, job.device)))
    writer, reader = storage_module.PlainWriter, storage_module.PlainReader
    attempt("save", writer, "write_data", OSError("disk full"), lambda: save_checkpoint(target, model))
    attempt("save short", writer, "write_data", short, lambda: save_checkpoint(target, model))
    assert not (target / storage_module.INDEX).exists()
    save_checkpoint(target, model)
    gone = CheckpointError("not on this machine")
    attempt("index", reader, "read_metadata", gone, lambda: load_checkpoint(target, model))
    attempt("parts", reader, "read_data", gone, lambda: load_checkpoint(target, model))
    load_checkpoint(target, model)
    return said
