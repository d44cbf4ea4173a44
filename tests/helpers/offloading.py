"""Engines that stand in for a GPU's streams, and models with packed experts to offload."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tiny
from fourfold.experts import PackedExperts, find_experts, pack_module_
from fourfold.experts.packed import set_stack_
from fourfold.formats import PackedStack, PackFormat

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
