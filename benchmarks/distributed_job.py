"""What `benchmarks/distributed.py` runs on every rank of a variant."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

CHECKED_STEPS = 20
LINK_BYTES = 256 * 2**20


def run(arguments: argparse.Namespace) -> None:
    """Start the ranks of ``arguments.one`` and wait; one that fails ends all."""
    world = 1 if arguments.one == "one" else arguments.ranks
    rendezvous = arguments.out.with_suffix(".rendezvous").absolute()
    rendezvous.unlink(missing_ok=True)
    try:
        mp.spawn(_rank, (world, str(rendezvous), arguments), nprocs=world)
    finally:
        rendezvous.unlink(missing_ok=True)


def _rank(rank: int, world: int, rendezvous: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1 if arguments.smoke else 8)
    device = torch.device("cpu") if arguments.smoke else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if arguments.smoke else "nccl",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
        **({} if arguments.smoke else {"device_id": device}),
    )
    result = Variant(arguments, rank, world, device).measure()
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, result)
    if rank == 0:
        arguments.out.write_text(json.dumps(result | {"ranks": gathered}))
    dist.barrier()
    dist.destroy_process_group()


class Variant:
    """One rank's part of one variant."""

    def __init__(self, arguments: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.arguments, self.rank, self.world, self.device = arguments, rank, world, device
        self.name: str = arguments.one
        self.folder = Path(arguments.checkpoint)

    # --- memory and time

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def allocated(self, *, peak: bool = False) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # --- the model

    def load(self) -> Any:
        import transformers

        import fourfold
        from fourfold.distributed.load import load_sharded

        transformers.utils.logging.disable_progress_bar()
        config = fourfold.MoeBitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        common = {"quantization_config": config, "dtype": torch.bfloat16}
        if self.name == "fsdp2":
            return load_sharded(self.folder, device=self.device, **common)
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, device_map={"": self.device}, **common
        )

    def adapted(self, model: Any) -> Any:
        """With adapters in fp32."""
        from peft import LoraConfig, get_peft_model

        import fourfold

        torch.manual_seed(1)
        lora = LoraConfig(
            r=self.arguments.rank,
            lora_alpha=self.arguments.rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=fourfold.expert_targets(model),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora).train()

    def engine(self, inner: Any) -> Any:
        """The variant's engine around the model."""
        from fourfold.distributed.replicas import replicate
        from fourfold.distributed.sharding import shard

        if self.name == "fsdp2":
            return shard(inner)
        return replicate(inner) if self.name == "ddp" else inner

    def measure(self) -> dict[str, Any]:
        result: dict[str, Any] = {"variant": self.name, "world": self.world}
        import fourfold  # (imported before loading is timed)

        torch.zeros(1, device=self.device)
        dist.barrier()
        self.reset_peak()
        before = self.allocated() or 0
        started = time.perf_counter()
        model = self.load()
        self.synchronize()
        result["load_seconds"] = time.perf_counter() - started
        result["loaded_bytes"] = held(model)
        if self.device.type == "cuda":
            result["loaded_allocated"] = torch.cuda.memory_allocated() - before
            result["peak_loading"] = torch.cuda.max_memory_allocated() - before
        from fourfold.planning.ranks import cut_shares, sent_replicated, sent_sharded

        fourfold.prepare(model)
        inner = self.adapted(model)
        shares = cut_shares(inner, self.world)
        called = self.engine(inner)
        if self.world > 1:
            result["planned_sent"] = (sent_sharded if self.name == "fsdp2" else sent_replicated)(shares)
        begun = {n: whole(p).cpu() for n, p in inner.named_parameters() if p.requires_grad}
        result |= self.check(called, inner, begun)
        result |= self.time(called, inner)
        result["link_bytes_per_second"] = self.link()
        return result

    # --- the same global batch

    def check(self, called: Any, inner: Any, begun: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Losses of the checked steps; adapters are compared with those that ``one`` left behind."""
        saved = self.folder / "adapters-of-one.pt"
        losses, optimizer = self.checked_steps(called, inner, at_once=False)
        after = {n: whole(p).cpu() for n, p in inner.named_parameters() if p.requires_grad}
        result: dict[str, Any] = {"losses": losses, "resident_bytes": self.resident(inner, optimizer)}
        if self.device.type == "cuda":
            result["resident_allocated"] = torch.cuda.memory_allocated()
        del optimizer
        if self.name == "one":
            torch.save({"after": after, "losses": losses}, saved)
            put(inner, begun)
            noisy, _ = self.checked_steps(called, inner, at_once=True)
            noise = {n: whole(p).cpu() for n, p in inner.named_parameters() if p.requires_grad}
            result["adapter_noise"] = distance(after, noise, begun)
            result["loss_noise"] = apart(losses, noisy)
        elif saved.is_file() and self.rank == 0:
            wanted = torch.load(saved, weights_only=True)
            result["adapter_difference"] = distance(wanted["after"], after, begun)
            result["loss_difference"] = apart(wanted["losses"], losses)
        put(inner, begun)
        return result

    def checked_steps(self, called: Any, inner: Any, *, at_once: bool) -> tuple[list[float], Any]:
        """Each rank its rows of a global batch; one process all, one after the other or at once."""
        optimizer = self.optimizer(inner)
        generator = torch.Generator().manual_seed(3)
        vocabulary, ranks = inner.config.vocab_size, self.arguments.ranks
        length = min(self.arguments.length, 512)
        losses = []
        for _ in range(CHECKED_STEPS):
            ids = torch.randint(0, vocabulary, (ranks, length), generator=generator).to(self.device)
            parts = [ids] if at_once else list(ids.chunk(ranks))
            if self.world > 1:
                parts = [parts[self.rank]]
            total = torch.zeros((), device=self.device)
            for part in parts:
                loss = self.loss(called, part) / len(parts)
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            dist.all_reduce(total)
            losses.append((total / self.world).item())
        return losses, optimizer

    @staticmethod
    def optimizer(inner: Any) -> torch.optim.Optimizer:
        # (an epsilon that is not tiny: Adam would make full steps of gradients that are noise)
        return torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=1e-4, eps=1e-6)

    def loss(self, called: Any, ids: torch.Tensor) -> torch.Tensor:
        kept = min(257, ids.shape[1])
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = called(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1 - kept :].flatten()
        )

    def resident(self, inner: Any, optimizer: Any) -> int:
        """Bytes of weights, adapters and optimizer on this rank."""
        states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return held(inner, states)

    # --- time and bytes

    def time(self, called: Any, inner: Any) -> dict[str, Any]:
        optimizer = self.optimizer(inner)
        shape = (self.arguments.batch, self.arguments.length)
        generator = torch.Generator().manual_seed(10 + self.rank)
        ids = torch.randint(0, inner.config.vocab_size, shape, generator=generator).to(self.device)
        self.reset_peak()
        milliseconds: list[float] = []
        for _ in range(self.arguments.steps + 2):
            dist.barrier()
            self.synchronize()
            started = time.perf_counter()
            self.step(called, ids, optimizer)
            self.synchronize()
            milliseconds.append((time.perf_counter() - started) * 1e3)
        timed = milliseconds[2:]
        peak = self.allocated(peak=True)
        with counting() as sent:
            self.step(called, ids, optimizer)
        if self.name == "ddp":  # its all-reduce is not called from Python: of every gradient, there and back
            gradients = sum(p.nbytes for p in inner.parameters() if p.requires_grad)
            sent["all_reduce"] = 2 * gradients * (self.world - 1) // self.world
        return {
            "step_ms": statistics.median(timed),
            "step_ms_all": timed,
            "tokens_per_second": self.world * ids.numel() / statistics.median(timed) * 1e3,
            "tokens_per_gpu": ids.numel(),
            "peak_training": peak,
            "sent": dict(sent),
        }

    def step(self, called: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.loss(called, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def link(self) -> float | None:
        """What one rank receives per second in a large all-gather."""
        if self.world == 1:
            return None
        size = LINK_BYTES if self.device.type == "cuda" else 2**22
        mine = torch.zeros(size, dtype=torch.uint8, device=self.device)
        everyones = torch.empty(self.world * size, dtype=torch.uint8, device=self.device)
        seconds = []
        for _ in range(8):
            self.synchronize()
            started = time.perf_counter()
            dist.all_gather_into_tensor(everyones, mine)
            self.synchronize()
            seconds.append(time.perf_counter() - started)
        return (self.world - 1) * size / statistics.median(seconds[3:])


# What FSDP2 calls, by release of torch (2.13 has the second of each).
GATHERS = ("all_gather_into_tensor", "all_gather_single")
SCATTERS = ("reduce_scatter_tensor", "reduce_scatter_single")


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends in a ring, by kind of collective, as long as it is open."""
    sent = {"all_gather": 0, "reduce_scatter": 0}
    stock = {name: getattr(dist, name) for name in (*GATHERS, *SCATTERS) if hasattr(dist, name)}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("input_tensor", kwargs.get("input"))
            nbytes, others = (args[1] if given is None else given).nbytes, dist.get_world_size() - 1
            if name in GATHERS:
                sent["all_gather"] += nbytes * others
            else:
                sent["reduce_scatter"] += nbytes * others // (others + 1)
            return stock[name](*args, **kwargs)

        return call

    for name in stock:
        setattr(dist, name, counted(name))
    try:
        yield sent
    finally:
        for name, function in stock.items():
            setattr(dist, name, function)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@torch.no_grad()
def put(model: Any, values: dict[str, torch.Tensor]) -> None:
    """Give trained parameters these values, sharded ones their rows of them."""
    for name, parameter in model.named_parameters():
        if name not in values:
            continue
        value = values[name].to(parameter.device)
        if isinstance(parameter.data, DTensor):
            rows = -(-value.shape[0] // parameter.device_mesh.size())
            start = min(rows * parameter.device_mesh.get_local_rank(), value.shape[0])
            local = parameter.to_local()
            local.copy_(value[start : start + local.shape[0]])
        else:
            parameter.copy_(value)


def held(model: Any, others: Any = ()) -> int:
    """Bytes of a model and other tensors on this rank, each storage once; scales of 4-bit Linears too."""
    seen: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()

    for tensor in (*(p.data for p in model.parameters()), *model.buffers(), *others):
        add(tensor)
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        while state is not None:
            add(state.absmax)
            state = state.state2 if state.nested else None
    return sum(seen.values())


def distance(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], begun: dict[str, torch.Tensor]
) -> float:
    """How far two ends are apart, relative to the way from the beginning to one of them."""
    apart_ = sum((one[n] - other[n]).double().square().sum() for n in one)
    way = sum((one[n] - begun[n]).double().square().sum() for n in one)
    return float((apart_ / way).sqrt())


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
