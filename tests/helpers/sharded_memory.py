"""Memory of a rank on the CPU, measured, and what is planned; each function runs on every rank."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fourfold
import tiny
from fourfold.distributed.load import load_sharded
from fourfold.distributed.save import save_packed
from fourfold.distributed.sharding import shard
from fourfold.planning.plan import Planner, Settings
from fourfold.planning.ranks import cut_shares, plan_ranks
from fourfold.planning.standins import Target
from ranks import Job
from sharded_models import (
    CASES,
    MODELS,
    NF4,
    adapted,
    checkpoint,
    compute,
    load,
)

_MMAP_THRESHOLD = -3  # of mallopt
# Packed 110 MiB, nearly all of it experts.
BIG = tiny.qwen3_moe(
    hidden_size=512, moe_intermediate_size=512, num_experts=128, num_experts_per_tok=2, vocab_size=96
)


class Anonymous:
    """The most anonymous memory that this process has while it is open, beyond what it had before.

    (Mapped files are not counted: the system takes their pages back when it needs room.) Looked at all the
    time by a thread; what comes and goes within half a millisecond may be missed.
    """

    def __enter__(self) -> Anonymous:
        self.before = self.peak = self.now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    @staticmethod
    def now() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) * 1024

    def _look(self) -> None:
        while not self._ended.wait(0.0005):
            self.peak = max(self.peak, self.now())


def big(job: Job) -> Path:
    """A folder with the model of `BIG`, made by rank 0."""
    folder = job.shared("big")
    if job.rank == 0 and not folder.exists():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(BIG, dtype=torch.bfloat16)
        made.save_pretrained(folder)
    job.wait()
    return folder


def anonymous_peak(job: Job) -> dict[str, dict[str, int]]:
    """Memory that loading takes on this rank beyond what the process had, from both kinds of checkpoint; and
    what writing the packed one takes beside the shard.
    """
    config = fourfold.MoeBitsAndBytesConfig(**NF4)
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 128 * 1024)  # what is freed goes back to the system, and is not counted
    small, source, packed = checkpoint(job, "qwen3_moe"), big(job), job.shared("big-packed")
    common = {"device": "cpu", "dtype": torch.bfloat16}
    save_packed(load_sharded(small, quantization_config=config, **common), job.shared("small-packed"))
    load_sharded(job.shared("small-packed"), **common)  # (what libraries allocate once is there now)
    found: dict[str, dict[str, int]] = {}
    for folder, settings in ((source, {"quantization_config": config}), (packed, {})):
        gc.collect()
        libc.malloc_trim(0)
        with Anonymous() as memory:
            model = load_sharded(folder, **settings, **common)
        parameters = list(model.parameters())
        found[folder.name] = {
            "peak": memory.peak - memory.before,
            "shard": sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters),
            "whole": sum(p.numel() * p.element_size() for p in parameters),
            "expert": 3 * BIG.hidden_size * BIG.moe_intermediate_size * 2,
        }
        if folder == source:
            with Anonymous() as memory:
                save_packed(model, packed)
            found["saving"] = found[source.name] | {"peak": memory.peak - memory.before}
        del model, parameters
    return found


def planned_shares(job: Job, case: str) -> dict[str, int]:
    """What `cut_shares` counts of a model without weights, and what lies there after `shard`."""
    kind, settings, _ = CASES[case]
    quantization = fourfold.MoeBitsAndBytesConfig(**settings, **compute(settings, torch.float32))
    made = adapted(load(checkpoint(job, kind), settings, job.device))
    wanted = cut_shares(made, job.world)
    skeleton = Planner(MODELS[kind](), Target("cpu", None)).skeleton(
        Settings(quantization=quantization, bf16=False)
    )
    from_nothing = cut_shares(adapted(skeleton), job.world)
    model = shard(made)
    found = held(model)
    return {
        "found": found,
        "wanted": wanted.shard,
        "planned": from_nothing.shard,
        "gathered": sum(p.numel() * p.element_size() for p in model.parameters() if isinstance(p, DTensor)),
        "units": sum(unit.gathered for unit in wanted.units),
    }


def held(model: Any) -> int:
    """Bytes of parameters, buffers and the scales of Linears on this rank."""
    found = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    found += sum(buffer.nbytes for buffer in model.buffers())
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        while state is not None:
            found += state.absmax.nbytes + (4 if state.nested else 0)
            state = state.state2 if state.nested else None
    for parameter in model.parameters():
        found += parameter.SCB.nbytes if getattr(parameter, "SCB", None) is not None else 0
    return found


class Live(TorchDispatchMode):
    """The most bytes of storages that live at a time while it is open, those of a model included.

    Counted after every operation, at the size that a storage has then: FSDP2 lets gathered weights go by
    making their storages empty. (What collectives of the CPU copy for themselves is not counted.)
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, StorageWeakRef] = {}
        self._add(tensor_leaves(model))

    def _add(self, tensors: Any) -> None:
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            reference = StorageWeakRef(local.untyped_storage())
            self._known[reference.cdata] = reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._add(t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta)
        now = 0
        for key, reference in list(self._known.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._known[key]
            else:
                now += storage.nbytes()
        self.peak = max(self.peak, now)
        return out


def tensor_leaves(model: Any) -> list[torch.Tensor]:
    """All that a model holds, the scales of its Linears included."""
    found = [parameter.data for parameter in model.parameters()] + list(model.buffers())
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        while state is not None:
            found.append(state.absmax)
            state = state.state2 if state.nested else None
    return found


def planned_peak(job: Job, way: str) -> dict[str, int]:
    """The most bytes that live in steps of training on this rank, counted, and as planned."""
    quantization = fourfold.MoeBitsAndBytesConfig(**NF4)
    modules = ["q_proj", "v_proj"]
    common = {"device": "cpu", "dtype": torch.bfloat16}
    model = load_sharded(big(job), quantization_config=quantization, **common)
    fourfold.prepare(model)
    targets = fourfold.expert_targets(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, target_parameters=targets)).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    shard(model, reshard_after_forward=way != "stay")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(3, 90, (1, 64))
    counted = 0
    for _ in range(2):
        with Live(model) as live, torch.autocast("cpu", torch.bfloat16):
            live._add(t for state in optimizer.state.values() for t in state.values())
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        counted = live.peak
    planner = Planner(BIG, Target("cpu", None))
    settings = Settings(
        quantization=quantization, length=64, optimizer="adamw_torch", target_modules=tuple(modules), r=4
    )
    ways = plan_ranks(planner, settings, planner.plan(settings), job.world)
    planned = ways[1 if way == "stay" else 0]
    return {"counted": counted, "planned": planned.peak, "resident": planned.resident, "ddp": ways[2].peak}
