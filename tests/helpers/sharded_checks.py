"""What is checked on several ranks; the functions run in each of them (`ranks.run`)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

import foreign_checkpoints
import fourfold
import fourfold.distributed.load as load_module
import tiny
from fourfold.adapters import gather
from fourfold.distributed.checkpoint import load_checkpoint, save_checkpoint
from fourfold.distributed.cut import CutSlice
from fourfold.distributed.load import load_sharded
from fourfold.distributed.replicas import replicate
from fourfold.distributed.save import save_packed
from fourfold.distributed.sharding import shard
from fourfold.errors import ConfigurationError, FourfoldError
from fourfold.experts.layout import clean_name
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
}


# What the default run does, on two ranks: of loading one of each kind (the run with four does all).
REPLICATED = ("nf4", "fp4", "interleaved", "int8", "flattened")
LOADED = (
    *(
        "nf4:plain",
        "nf4:packed",
        "nf4_uneven:plain",
        "nf4_uneven:packed",
        "tied:packed",
        "interleaved:packed",
    ),
    *("int8:plain", "latent:plain", "own_forward:plain", "modules:packed", "flattened:plain"),
)
OTHERS = (
    *("mixed_precision", "sent_by_ddp", "other_weights", "read_share:plain", "read_share:packed"),
    *(
        "foreign",
        "generated",
        "saved_adapter",
        "resumed",
        "saved_packed:nf4",
        "saved_packed:int8",
        "saved_packed:tied",
        "refusals",
    ),
)
CHECKS = (
    *(f"fsdp:{case}" for case in CASES),
    *(f"ddp:{case}" for case in REPLICATED),
    *(f"loaded:{case}" for case in LOADED),
    *OTHERS,
)


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


def train(
    model: Any, job: Job, *, alone: bool, accumulation: int = 1, steps: int = STEPS, optimizer: Any = None
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
                part = part.to(job.device)
                loss = model(input_ids=part, labels=part).loss / len(parts)
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


def fsdp(job: Job, case: str) -> dict[str, float]:
    """FSDP2 against one process: losses and adapters after `STEPS` steps."""
    kind, settings, how = CASES[case]
    folder = checkpoint(job, kind)
    checkpointing, accumulation = how.get("checkpointing", ""), how.get("accumulation", 1)
    alone = adapted(load(folder, settings, job.device), checkpointing)
    begun = trained(alone)
    wanted = train(alone, job, alone=True, accumulation=accumulation)
    model = adapted(load(folder, settings, job.device), checkpointing, seed=job.rank)  # (unlike on each rank)
    offload = CPUOffloadPolicy(pin_memory=job.device != "cpu") if how.get("offload") else None
    shard(model, reshard_after_forward=how.get("reshard_after_forward", True), offload=offload)
    assert far(begun, trained(model)) == 0
    losses = train(model, job, alone=False, accumulation=accumulation)
    return compared(alone, model, wanted, losses, begun)


def ddp(job: Job, case: str) -> dict[str, float]:
    """DDP with the packed model on every rank against one process."""
    kind, settings, how = CASES[case]
    folder = checkpoint(job, kind)
    checkpointing, accumulation = how.get("checkpointing", ""), how.get("accumulation", 1)
    alone = adapted(load(folder, settings, job.device), checkpointing)
    begun = trained(alone)
    wanted = train(alone, job, alone=True, accumulation=accumulation)
    inner = adapted(load(folder, settings, job.device), checkpointing, seed=job.rank)
    model = replicate(inner)
    losses = train(model, job, alone=False, accumulation=accumulation)
    return compared(alone, inner, wanted, losses, begun)


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
    names = sorted(file.name for file in wanted.iterdir())
    assert sorted(file.name for file in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
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


def resumed(job: Job) -> dict[str, float]:
    """Train 4 steps; save after 2, and go on: sharded, in one process, and from one process sharded."""
    source, batched = checkpoint(job, "qwen3_moe_5"), job.shared("run")
    model = shard(adapted(load(source, NF4, job.device)))
    optimizer = adam(model)
    train(model, job, alone=False, steps=2, optimizer=optimizer)
    save_checkpoint(batched, model, optimizer, step=2)
    losses = train(model, job, alone=False, steps=3, optimizer=optimizer)
    after = trained(model)
    again = shard(adapted(load(source, NF4, job.device), seed=7))
    optimizer = adam(again)
    assert load_checkpoint(batched, again, optimizer, step=0) == {"step": 2}
    same = train(again, job, alone=False, steps=3, optimizer=optimizer)
    single = adapted(load(source, NF4, job.device), seed=8)
    optimizer = adam(single)
    load_checkpoint(batched, single, optimizer)
    alone = train(single, job, alone=True, steps=3, optimizer=optimizer)
    return {
        "sharded": max(abs(a - b) for a, b in zip(losses, same, strict=True)) + far(after, trained(again)),
        "alone": max(abs(a - b) for a, b in zip(losses, alone, strict=True)) + far(after, trained(single)),
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


def other_weights(job: Job) -> str:
    """Ranks that loaded different checkpoints are told so, by both ways of going parallel."""
    said = []
    for act in (replicate, shard):
        model = adapted(load(checkpoint(job, "qwen3_moe"), NF4, job.device))
        if job.rank == 1:
            experts = next(m for m in model.modules() if isinstance(m, fourfold.experts.PackedExperts))
            experts._parameters["down_proj"].data[0, 0, 0] += 1
        try:
            act(model)
        except ConfigurationError as error:
            said.append(str(error))
    assert len(said) == 2
    return said[0]


def compared(
    alone: Any, model: Any, wanted: list[float], losses: list[float], begun: dict[str, torch.Tensor]
) -> dict[str, float]:
    after = trained(alone)
    return {
        "loss": max(abs(a - b) for a, b in zip(wanted, losses, strict=True)),
        "adapter": far(after, trained(model)),
        "moved": far(begun, after),
    }


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


def equal(results: list[dict[str, float]], bound: float = 1e-5) -> None:
    """What `fsdp`, `ddp` and `loaded` found on each rank: equal, and not for want of movement."""
    for found in results:
        assert found["moved"] > 1e-3, found
        assert found["loss"] < bound, found
        assert found["adapter"] < bound, found


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
