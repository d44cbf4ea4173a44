"""Engines that stand in for a GPU's streams, and models with packed experts to offload."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fourfold
import own_forward
import tiny
from fourfold.experts import PackedExperts, find_experts, pack_module_
from fourfold.experts.packed import set_stack_
from fourfold.formats import PackedStack, PackFormat
from fourfold.offloading import disk, read_ahead
from fourfold.offloading.mapped import region_of

NF4 = PackFormat("nf4", 64, True)
POISON = 0xA5


class LateEngine:
    """Copies as late as events allow, and spoils a buffer from the moment when it is given to a copy.

    The engine for CPUs copies as early as possible. What is right with both waits for its copies, and reads
    nothing from a buffer that may have been given away.
    """

    def __init__(self) -> None:
        self.pending: list[list[Any]] = []
        self.fails = 0
        self.timed, self.waits = False, 0

    def fill(self, copies: Any, after: list[Any]) -> int:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("the copy failed")
        copies = list(copies)
        with torch.no_grad():
            for place, _ in copies:
                place.view(torch.uint8).fill_(POISON)
        self.pending.append(copies)
        return len(self.pending) - 1

    def wait(self, event: int) -> None:
        self.waits += self.timed
        with torch.no_grad():
            for place, source in self.pending[event]:
                place.copy_(source)
        self.pending[event] = []

    def lend(self, memory: torch.Tensor) -> None: ...

    def mark(self) -> None: ...

    def line(self) -> None: ...

    def waited_ms(self) -> float:
        """A millisecond each."""
        waited, self.waits = float(self.waits), 0
        return waited


class StreamEngine(LateEngine):
    """As `LateEngine`, its copies in the order in which they were begun, from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()

    def fill(self, copies: Any, after: list[Any]) -> int:
        with self._lock:
            return super().fill(copies, after)

    def wait(self, event: int) -> None:
        with self._lock:
            for earlier in range(event + 1):
                super().wait(earlier)

    def finish(self, event: int) -> None:
        self.wait(event)


def write_experts(model: nn.Module, folder: Path, shards: int = 2) -> list[Path]:
    """The packed tensors of a model as files of a checkpoint, layer after layer in turn."""
    tensors = {
        f"{m.fourfold_name}.{leaf}": m._parameters[leaf].data
        for m in packed_modules(model)
        for leaf in m.packed_names()
    }
    folder.mkdir(exist_ok=True)
    files = [folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for number, file in enumerate(files):
        save_file(dict(list(tensors.items())[number::shards]), file, metadata={"format": "pt"})
    return files


def packed_modules(model: nn.Module) -> list[PackedExperts]:
    return [m for m in model.modules() if isinstance(m, PackedExperts)]


def is_mapped(model: nn.Module) -> bool:
    """Whether all packed tensors but the scales of scales are."""
    found = [
        region_of(m._parameters[leaf].data) is not None
        for m in packed_modules(model)
        for leaf in m.packed_names()
        if not leaf.endswith(disk.IN_MEMORY)
    ]
    return bool(found) and all(found)


def on_disk(model: nn.Module, folder: Path, **arguments: Any) -> fourfold.OffloadReport:
    write_experts(model, folder)
    report = fourfold.offload(model, device="disk", checkpoint=folder, **arguments)
    assert report.streamed
    gc.collect()  # (what is not held is let go of now)
    return report


def buffered(monkeypatch: pytest.MonkeyPatch, late: bool = True) -> None:
    """Experts on disk as on a GPU: by the reading thread and buffers, also on a CPU."""
    monkeypatch.setattr(disk, "COMPUTES_IN_PLACE", ())
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1000)  # (so that there are several pieces)
    if late:
        monkeypatch.setattr(disk, "engine_for", lambda device: StreamEngine())


def pack_(model: nn.Module, fmt: PackFormat = NF4) -> nn.Module:
    """Pack all experts of a model in memory; frozen, like a loaded one."""
    for found in list(find_experts(model)):
        pack_module_(found.module, fmt, found.name, found.layout)
    return model.requires_grad_(False)


def packed_model(kind: str, fmt: PackFormat = NF4, layers: int = 5) -> nn.Module:
    """A tiny model of one of `tiny.KINDS` with that many layers of packed experts."""
    changes: dict[str, object] = {"num_hidden_layers": layers}
    if kind == "nemotron_h":
        changes = {"layers_block_type": ["moe", "attention"] * (layers - 1) + ["moe"]}
    return pack_(tiny.build(tiny.KINDS[kind](**changes)), fmt)


def module_of(up: PackedStack, down: PackedStack) -> PackedExperts:
    """A packed Mixtral experts module with these stacks."""
    E, N, K = up.shape.experts, up.shape.rows, up.shape.columns
    config = tiny.mixtral(hidden_size=K, intermediate_size=N // 2, num_local_experts=E, num_hidden_layers=1)
    module = tiny.experts_of(tiny.build(config))
    packed = pack_module_(module, up.fmt)
    for projection, stack in zip(packed.fourfold_layout.projections, (up, down), strict=True):
        set_stack_(packed, projection, stack)
    return packed


def steps(model: nn.Module, number: int = 2) -> list[torch.Tensor]:
    """Outputs, gradients of the factors and the factors after each of some steps of training, flat."""
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    found = []
    for _ in range(number):
        y = own_forward.output(model, tiny.IDS)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append(y.detach().clone())
        found += [p.grad.clone() for p in factors if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        found += [p.detach().clone() for p in factors]
    return found


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 3
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), number


class Driver:
    """Registers pages, or refuses; knows which are registered."""

    def __init__(self, limit: int = 2**40) -> None:
        self.limit, self.pages = limit, dict[int, int]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if sum(self.pages.values()) + nbytes > self.limit:
            return 2
        assert address not in self.pages
        self.pages[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pages[address]
        return 0
