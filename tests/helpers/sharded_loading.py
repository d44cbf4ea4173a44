"""What loading in shards reads, holds and gives; each function runs on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import foreign_checkpoints
import fourfold
import fourfold.distributed.load as load_module
import tiny
from fourfold.distributed.cut import CutSlice
from fourfold.distributed.load import load_sharded
from fourfold.distributed.sharding import shard
from ranks import Job
from sharded_models import (
    CASES,
    NF4,
    adapted,
    checkpoint,
    checkpoint_of,
    compared,
    compute,
    load,
    train,
    trained,
    whole,
)


def loaded(job: Job, case: str, stored: str) -> dict[str, float]:
    """`load_sharded` against `from_pretrained`: every tensor, bytes read, and training from there."""
    kind, settings, _ = CASES[case]
    source = checkpoint(job, kind)
    config = fourfold.MoeBitsAndBytesConfig(**settings, **compute(settings, torch.float32))
    reference = load(source, settings, job.device)
    if stored == "packed":
        source = job.shared(f"{case}-packed")
        if job.rank == 0 and not source.exists():
            reference.save_pretrained(source)
        job.wait()
    model = load_sharded(
        source,
        quantization_config=None if stored == "packed" else config,
        device=job.device,
        dtype=torch.float32,
    )
    stacks = 0
    parameters = dict(model.named_parameters())
    assert parameters.keys() == dict(reference.named_parameters()).keys()
    for name, wanted in reference.named_parameters():
        found = parameters[name]
        if isinstance(found.data, DTensor):
            rows = -(-found.shape[0] // job.world)
            assert found.to_local().shape[0] <= rows
            assert found.to_local().untyped_storage().nbytes() == found.to_local().nbytes, name
            stacks += ".experts." in name
        else:
            assert "experts" not in name, name
        assert whole(found).dtype == wanted.dtype or not wanted.is_floating_point()
        assert torch.equal(whole(found).view(-1), whole(wanted).view(-1)), name
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert stacks > 0
    alone = adapted(reference)
    begun = trained(alone)
    wanted_losses = train(alone, job, alone=True, steps=3)
    sharded = adapted(model, seed=job.rank)
    shard(sharded)
    losses = train(sharded, job, alone=False, steps=3)
    return compared(alone, sharded, wanted_losses, losses, begun)


def foreign(job: Job) -> int:
    """Experts in MXFP4, in FP8 and in per-expert 4 bit of transformers v4: packed whole, and then cut."""
    made: dict[str, Any] = {
        "mxfp4": lambda folder: foreign_checkpoints.mxfp4(folder)[0],
        "fp8": lambda folder: foreign_checkpoints.fp8(foreign_checkpoints.deepseek_v3(), folder)[0],
        "v4": lambda folder: foreign_checkpoints.bitsandbytes(
            tiny.mixtral(intermediate_size=128), folder, double=True
        )[0],
    }
    for kind, make in made.items():
        if job.rank == 0:
            job.shared(kind).mkdir()
            (job.folder / kind).write_text(str(make(job.shared(kind))))
        job.wait()
        source = (job.folder / kind).read_text()
        config = fourfold.MoeBitsAndBytesConfig(**(NF4 if kind == "v4" else {"experts_quant_type": "nf4"}))
        wanted = transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, dtype=torch.bfloat16, device_map={"": job.device}
        )
        model = load_sharded(source, quantization_config=config, device=job.device, dtype=torch.bfloat16)
        cut = 0
        for (name, ours), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(whole(ours).view(-1), whole(theirs).view(-1)), name
            cut += ".experts." in name and isinstance(ours.data, DTensor)
        assert cut, kind
    return len(made)


def read_share(job: Job, stored: str) -> dict[str, int]:
    """Which bytes of the files a rank reads, counted where they are read; and what it holds at any time."""
    monkey = pytest.MonkeyPatch()
    source = checkpoint(job, "many")
    if stored == "packed":
        source = job.shared("many-packed")
        if job.rank == 0 and not source.exists():
            load(checkpoint_of("many", job), NF4, job.device).save_pretrained(source)
        job.wait()
    read: dict[str, int] = {}

    class Counted(CutSlice):
        def __init__(self, key: str, slice_: Any) -> None:
            super().__init__(slice_, 0, slice_.get_shape()[0] if slice_.get_shape() else 0)
            self.key = key

        def get_shape(self) -> list[int]:
            return list(self.source.get_shape())

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.source[index]
            read[self.key] = read.get(self.key, 0) + tensor.nbytes
            return tensor

    stock = load_module.open_slices
    monkey.setattr(
        load_module, "open_slices", lambda *a: {key: Counted(key, s) for key, s in stock(*a).items()}
    )
    monkey.setattr(load_module, "_BIG", 0)
    config = None
    if stored == "plain":
        config = fourfold.MoeBitsAndBytesConfig(**NF4, **compute(NF4, torch.float32))
    try:
        model = load_sharded(source, quantization_config=config, device=job.device, dtype=torch.float32)
    finally:
        monkey.undo()
    wanted = load(checkpoint_of("many", job), NF4, job.device)
    for (name, ours), theirs in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(whole(ours).view(-1), whole(theirs).view(-1)), name
    sizes: dict[str, int] = {}
    for file in source.glob("*.safetensors"):
        sizes |= {key: tensor.nbytes for key, tensor in load_file(file).items()}
    experts = {key for key in sizes if ".experts." in key}
    numbers = {
        int(key.split(".experts.")[1].split(".")[0]) for key in read if ".weight" in key and key in experts
    }
    return {
        "experts_read": sum(read.get(key, 0) for key in experts),
        "experts_stored": sum(sizes[key] for key in experts),
        "ends_read": read["model.embed_tokens.weight"] + read["lm_head.weight"],
        "ends_stored": sizes["model.embed_tokens.weight"] + sizes["lm_head.weight"],
        "first_expert": min(numbers, default=-1),
        "experts": len(numbers),
        "experts_held": sum(p.to_local().nbytes for n, p in model.named_parameters() if ".experts." in n),
        "experts_whole": sum(p.nbytes for n, p in wanted.named_parameters() if ".experts." in n),
    }


def peak(job: Job, kind: str) -> dict[str, int]:
    """What loading allocates on a GPU, and what stays; the checkpoint lies there already."""
    config = fourfold.MoeBitsAndBytesConfig(**NF4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_sharded(
        job.shared(kind), quantization_config=config, device=job.device, dtype=torch.bfloat16
    )
    found = {
        "peak": torch.cuda.max_memory_allocated() - before,
        "shard": torch.cuda.memory_allocated() - before,
        "whole": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    experts = next(m for m in model.modules() if isinstance(m, fourfold.experts.PackedExperts))
    shapes = [projection.shape for projection in experts.fourfold_layout.projections]
    return found | {"expert": sum(2 * shape.rows * shape.columns for shape in shapes)}
