"""The packed tensors of modules in host memory, and as views of a buffer where they are computed with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts, Projection
from fourfold.formats import PackedStack
from fourfold.formats.remote import RemoteStack
from fourfold.offloading.engine import engine_for
from fourfold.offloading.schedule import Counts, Engine, Schedule

# torch's own allocations begin at multiples of it; kernels want 16.
ALIGNMENT = 512

# A pass brings single experts where those that it can hit at most are this share of all.
PART_OF_EXPERTS = 0.25
WHOLE_BYTES = 2**20

_Key = tuple[int, str]  # number of the module in its unit, name of the projection


@dataclass
class _Tensor:
    """A packed tensor of a unit: whose it is, and where it lies in a buffer."""

    key: _Key
    suffix: str
    module: PackedExperts
    leaf: str
    offset: int

    @property
    def host(self) -> torch.Tensor:
        parameter = self.module._parameters[self.leaf]
        assert parameter is not None
        return parameter.data

    @property
    def stamp(self) -> tuple[int, int]:
        """Changes with the tensor's numbers, unless somebody writes to them behind autograd's back."""
        parameter = self.module._parameters[self.leaf]
        assert parameter is not None
        return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


class Unit:
    """Modules that are brought together: one, or those that one forward reads.

    Args:
        modules: packed, their tensors in host memory.
    """

    def __init__(self, modules: Sequence[PackedExperts]) -> None:
        self.modules = list(modules)
        self.tensors: list[_Tensor] = []
        self.nbytes = 0
        for number, module in enumerate(modules):
            for projection in module.fourfold_layout.projections:
                for suffix in projection.shape.tensors(module.fourfold_format):
                    leaf = projection.name + suffix
                    made = _Tensor((number, projection.name), suffix, module, leaf, self.nbytes)
                    self.tensors.append(made)
                    self.nbytes += -(-made.host.nbytes // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: torch.Tensor) -> dict[_Key, PackedStack]:
        """The stacks of the unit as views of a buffer (bytes, at least `nbytes`)."""
        by_key: dict[_Key, dict[str, torch.Tensor]] = {}
        for tensor in self.tensors:
            host = tensor.host
            piece = buffer[tensor.offset : tensor.offset + host.nbytes]
            by_key.setdefault(tensor.key, {})[tensor.suffix] = piece.view(host.dtype).view(host.shape)
        stacks = {}
        for (number, name), tensors in by_key.items():
            module = self.modules[number]
            projection = module.fourfold_layout.projection(name)
            assert projection is not None
            stacks[number, name] = PackedStack.from_tensors(module.fourfold_format, projection.shape, tensors)
        return stacks


class Streamer:
    """Brings the units of one device.

    Args:
        units: in the order in which the model holds them.
        device: where they are computed with.
        buffers: how many units lie there at a time.
        engine: copies and events; None is that of the device.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        device: torch.device,
        buffers: int = 2,
        engine: Engine | None = None,
    ) -> None:
        self.units, self.device = list(units), device
        self.buffers = min(buffers, len(self.units))
        self._given_engine = engine
        self._engine: Engine | None = None
        self._schedule: Schedule | None = None
        self.counts = Counts()
        self._timed, self._waited_ms = False, 0.0
        self._memory: list[torch.Tensor] = []
        self._views: dict[tuple[int, int], dict[_Key, PackedStack]] = {}
        self._stamps: dict[int, list[tuple[int, int]]] = {}  # of units when they were last copied
        self._lock = threading.RLock()  # of buffers that come and go; taken before the schedule's

    @property
    def buffer_bytes(self) -> int:
        """Of all buffers together."""
        return self.buffers * max(unit.nbytes for unit in self.units)

    @property
    def read_ahead_bytes(self) -> int:
        """Of host memory besides the tensors themselves."""
        return 0

    @property
    def allocated_bytes(self) -> int:
        """Of the buffers that there are."""
        return sum(memory.nbytes for memory in self._memory)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._make_engine()
            self._engine.timed = self._timed
        return self._engine

    def _make_engine(self) -> Engine:
        return self._given_engine or engine_for(self.device)

    def time_waits(self, timed: bool) -> None:
        """Measure from now on how long computing waits for copies, or no more."""
        self._timed = timed
        if self._engine is not None:
            self._engine.timed = timed

    def waited_ms(self) -> float | None:
        """Of that since the last call, after waiting for the device; None where nothing can be measured."""
        found = self.engine.waited_ms()
        before, self._waited_ms = self._waited_ms, 0.0
        return None if found is None else before + found

    def schedule(self) -> Schedule:
        """Buffers are allocated when they are first needed: a model may be moved before that."""
        with self._lock:
            if self._schedule is None:
                size = max(unit.nbytes for unit in self.units)
                with torch.inference_mode(False):  # (what is made there cannot be written to elsewhere)
                    self._memory = [
                        torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(self.buffers)
                    ]
                for memory in self._memory:
                    self.engine.lend(memory)
                sizes = [unit.nbytes for unit in self.units]
                self._schedule = Schedule(sizes, self.buffers, self.engine, self._copies, self.counts)
            return self._schedule

    def move(self, device: torch.device) -> None:
        """Compute on another device from now on."""
        with self._lock:
            if device != self.device:
                self.close()
                self.device = device

    def close(self) -> None:
        """Let go of the buffers, in their turn among what was computed and copied.

        Uses that have not ended keep the memory of theirs until they do.
        """
        with self._lock:
            schedule, self._schedule = self._schedule, None
            if schedule is not None:
                schedule.close()
                for slot in schedule.slots:  # (memory goes back to the stream that computes)
                    if slot.filled is not None:
                        self.engine.wait(slot.filled)
            if self._timed and self._engine is not None:
                self._waited_ms += self._engine.waited_ms() or 0.0
            self._engine, self._memory, self._views, self._stamps = None, [], {}, {}

    @contextlib.contextmanager
    def use(self, unit: int) -> Iterator[dict[_Key, PackedStack]]:
        """The stacks of a unit on the device, inside the context alone."""
        with self._lock:
            schedule = self.schedule()
            self._forget_if_changed(schedule, unit)
            slot = schedule.begin(unit)
            try:
                stacks = self._views_of(unit, slot)
            except BaseException:
                schedule.end(slot)
                raise
        try:
            yield stacks
        finally:
            schedule.end(slot)

    @contextlib.contextmanager
    def use_part(self, unit: int, experts: Sequence[int]) -> Iterator[None]:
        """As `use`, where these experts (in ascending order) are all that is computed with."""
        runs = _runs(experts)
        share = len(experts) / self.units[unit].modules[0].fourfold_layout.projections[0].shape.experts
        nbytes = sum(
            t.host.nbytes if t.host.nbytes <= WHOLE_BYTES else int(t.host.nbytes * share)
            for t in self.units[unit].tensors
        )
        with self._lock:
            schedule = self.schedule()
            self._forget_if_changed(schedule, unit)
            slot = schedule.begin_part(unit, lambda slot: self._part_copies(unit, slot, runs), nbytes)
        try:
            yield
        finally:
            schedule.end(slot, fill_ahead=False)

    def _forget_if_changed(self, schedule: Schedule, unit: int) -> None:
        """A buffer may hold what a module was before its state was loaded."""
        known = self._stamps.get(unit)
        if known is not None and known != [t.stamp for t in self.units[unit].tensors]:
            schedule.forget(unit)

    def _part_copies(
        self, unit: int, slot: int, runs: list[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(Small tensors as a whole: a copy of its own takes longer than a megabyte does.)"""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for place, source in self._copies(unit, slot):
            if source.nbytes <= WHOLE_BYTES:
                pairs.append((place, source))
            else:
                pairs += [(place[start:stop], source[start:stop]) for start, stop in runs]
        return pairs

    def _views_of(self, unit: int, slot: int) -> dict[_Key, PackedStack]:
        if (unit, slot) not in self._views:
            with torch.inference_mode(False):
                self._views[unit, slot] = self.units[unit].views(self._memory[slot])
        return self._views[unit, slot]

    def _copies(self, unit: int, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        views = self._views_of(unit, slot)
        self._stamps[unit] = [t.stamp for t in self.units[unit].tensors]
        pairs = []
        for tensor in self.units[unit].tensors:
            stack = views[tensor.key]
            place = getattr(stack, tensor.suffix.removeprefix("_") or "data")
            pairs.append((place, tensor.host))
        return pairs


class _Streamed(RemoteStack):
    """One projection of one module of a streamer."""

    def __init__(self, streamer: Streamer, unit: int, key: _Key, stack: PackedStack) -> None:
        self.fmt, self.shape = stack.fmt, stack.shape
        self._streamer, self._unit, self._key = streamer, unit, key

    @contextlib.contextmanager
    def use(self) -> Iterator[PackedStack]:
        with self._streamer.use(self._unit) as stacks:
            yield stacks[self._key]


class HostExperts:
    """What a module with experts in host memory asks (`PackedExperts.fourfold_host`).

    Args:
        streamer: brings them.
        unit: number of the module's unit there.
        number: of the module in the unit.
    """

    def __init__(self, streamer: Streamer, unit: int, number: int) -> None:
        self.streamer, self._unit = streamer, unit
        module = streamer.units[unit].modules[number]
        self._name, self._module, self._first = module.fourfold_name, module, module.packed_names()[0]
        self._experts = module.fourfold_layout.projections[0].shape.experts
        self._stacks = {
            p.name: _Streamed(streamer, unit, (number, p.name), module.stack(p))
            for p in module.fourfold_layout.projections
        }

    def __reduce__(self) -> Any:
        return _nothing, ()  # (a copy of a module has no share in the buffers of the first)

    @property
    def device(self) -> torch.device:
        """Where the experts are computed with."""
        return self.streamer.device

    def move(self, device: torch.device) -> None:
        self.streamer.move(device)

    def stack(self, projection: Projection) -> RemoteStack:
        return self._stacks[projection.name]

    def hold(self, device: torch.device, index_Tk: torch.Tensor | None = None) -> AbstractContextManager[Any]:
        """Keep the module's experts where they are computed with while a forward runs.

        Args:
            device: where it runs.
            index_Tk: the experts that it computes with, where it says so. Few tokens without a backward to
                follow (decoding) bring those alone; which they are is then read on the host.

        Raises:
            ConfigurationError: the forward runs elsewhere.
        """
        if device != self.device:
            raise ConfigurationError(
                f"{self._name}: its experts are brought from host memory to {self.device}, and the hidden "
                f"states are on {device}. Move the whole model (`model.to`), or call fourfold.onload and "
                "fourfold.offload again where it computes"
            )
        self._refuse_moved()
        most = 0 if index_Tk is None or torch.is_grad_enabled() else PART_OF_EXPERTS * self._experts
        if index_Tk is not None and index_Tk.numel() <= most:
            hit = sorted(set(index_Tk.flatten().tolist()))
            return self.streamer.use_part(self._unit, [e for e in hit if 0 <= e < self._experts])
        return self.streamer.use(self._unit)

    def _refuse_moved(self) -> None:
        """Sharding by another hand moves parameters to the device, and copies from there save nothing."""
        first = self._module._parameters[self._first]
        assert first is not None
        spread = hasattr(first.data, "placements")
        if spread or (self.device.type != "cpu" and first.device.type != "cpu"):
            how = "spread over processes" if spread else f"moved to {first.device}"
            raise ConfigurationError(
                f"{self._name}: its experts were sent to host memory (fourfold.offload, or experts_device), "
                f"and their tensors have been {how} since (fully_shard does that). Use one of the two: call "
                "fourfold.onload before the model is sharded, and fourfold.distributed.shard with "
                "offload=CPUOffloadPolicy() if shards are to lie in host memory"
            )


def _runs(experts: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours together: ``[1, 2, 5]`` is 1 to 3 and 5 to 6."""
    runs: list[tuple[int, int]] = []
    for expert in experts:
        if runs and runs[-1][1] == expert:
            runs[-1] = (runs[-1][0], expert + 1)
        else:
            runs.append((expert, expert + 1))
    return runs


def _nothing() -> None:
    return None
