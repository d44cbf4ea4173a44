"""Packed experts that stay in the files of their checkpoint.

Their parameters are tensors of mapped files (`mapped`). Where a GPU computes, a thread reads ahead of the
buffers (`read_ahead`); where the CPU does, it computes with the mapped pages themselves, and the system is
told which come next.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.formats import PackedStack
from fourfold.offloading.engine import engine_for
from fourfold.offloading.host import HostMemory
from fourfold.offloading.mapped import MappedFile, Region, files_of, region_of
from fourfold.offloading.order import Order
from fourfold.offloading.read_ahead import STAGES, ReadingEngine, Source
from fourfold.offloading.schedule import Engine
from fourfold.offloading.streamer import Streamer, Unit, _Key

# Double quantization's scales and offsets of scales: a five-hundredth of the bytes, in many small reads.
IN_MEMORY = ("_absmax_scale", "_absmax_offset")
# Devices whose products read mapped pages where they are.
COMPUTES_IN_PLACE = ("cpu",)


class DiskStreamer(Streamer):
    """As `Streamer`, of units whose tensors are mapped from files (some may be in host memory).

    Args:
        units: in the order in which the model holds them.
        device: where they are computed with.
        buffers: how many units lie there at a time; none where it computes in place.
        engine: of the device.
        memory: where reads go.
        verified: identities of parameters that have the numbers of their file, although they were written to.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        device: torch.device,
        buffers: int = 2,
        engine: Engine | None = None,
        memory: HostMemory | None = None,
        verified: Collection[int] = (),
    ) -> None:
        super().__init__(units, device, buffers, engine)
        self._pages = memory or HostMemory()
        self._regions = [[region_of(t.host) for t in unit.tensors] for unit in self.units]
        self._as_mapped = [
            [t.stamp for t in unit.tensors] if all(_is_clean(t, verified) for t in unit.tensors) else None
            for unit in self.units
        ]
        self.files = [files_of(t.host for t in unit.tensors) for unit in self.units]
        self._order = Order(len(self.units))
        self._computing = [0] * len(self.units)

    @property
    def in_place(self) -> bool:
        """Whether there are no buffers."""
        return self.device.type in COMPUTES_IN_PLACE

    @property
    def buffer_bytes(self) -> int:
        return 0 if self.in_place else super().buffer_bytes

    @property
    def read_ahead_bytes(self) -> int:
        """Of host memory that the thread reads into, once it does."""
        return read_ahead_bytes(self.device, [unit.modules for unit in self.units])

    @property
    def engine(self) -> ReadingEngine:
        made = super().engine
        assert isinstance(made, ReadingEngine)
        return made

    def _make_engine(self) -> ReadingEngine:
        return ReadingEngine(self._given_engine or engine_for(self.device), self._pages)

    @property
    def read_bytes(self) -> int:
        """From files, by the thread, since the buffers were made."""
        return self._engine.read_bytes if isinstance(self._engine, ReadingEngine) else 0

    @contextlib.contextmanager
    def use(self, unit: int) -> Iterator[dict[_Key, PackedStack]]:
        self._check(unit)
        if self.in_place:
            with self._in_place(unit, ahead=True) as stacks:
                yield stacks
            return
        with super().use(unit) as stacks:
            self._read_ahead(unit)
            yield stacks

    @contextlib.contextmanager
    def use_part(self, unit: int, experts: Sequence[int]) -> Iterator[None]:
        self._check(unit)
        with self._in_place(unit, ahead=False) if self.in_place else super().use_part(unit, experts):
            yield

    @contextlib.contextmanager
    def _in_place(self, unit: int, *, ahead: bool) -> Iterator[dict[_Key, PackedStack]]:
        if ahead and not self._computing[unit]:
            self._order.note(unit)
            for following in self._order.upcoming(2):
                for region in self._regions[following]:
                    if region is not None and following != unit:
                        region.file.will_need(region)
        self._computing[unit] += 1
        try:
            modules = self.units[unit].modules
            yield {
                (number, projection.name): module.stack(projection)
                for number, module in enumerate(modules)
                for projection in module.fourfold_layout.projections
            }
        finally:
            self._computing[unit] -= 1

    def _check(self, unit: int) -> None:
        """The unit's files are those that were mapped, and all of them is there."""
        for file in self.files[unit]:
            file.check()

    def is_as_mapped(self, unit: int) -> bool:
        """Whether nobody wrote to a unit's tensors: its numbers are those of the files."""
        return [t.stamp for t in self.units[unit].tensors] == self._as_mapped[unit]

    def _sources(self, unit: int) -> list[Source]:
        """For each tensor of a unit its place in a file; itself where it has other numbers by now."""
        tensors = self.units[unit].tensors
        if not self.is_as_mapped(unit):
            return [t.host for t in tensors]
        return [
            t.host if region is None else region
            for t, region in zip(tensors, self._regions[unit], strict=True)
        ]

    def _copies(self, unit: int, slot: int) -> list[tuple[torch.Tensor, Any]]:
        pairs = super()._copies(unit, slot)
        return [(place, source) for (place, _), source in zip(pairs, self._sources(unit), strict=True)]

    def _read_ahead(self, unit: int) -> None:
        """What comes after that which the buffers hold, or are being filled with."""
        with self._lock:
            schedule = self._schedule
            if schedule is None:
                return  # (closed by another thread meanwhile)
            if not any(s.content == unit and s.part_of is None and s.users == 1 for s in schedule.slots):
                return  # (within another use, or in decoding, where nobody knows what the next module needs)
            held = {slot.content for slot in schedule.slots}
            following = [u for u in schedule.order.upcoming(len(schedule.slots) + STAGES) if u not in held]
            self.engine.ahead([[s for s in self._sources(u) if isinstance(s, Region)] for u in following])

    def close(self) -> None:
        with self._lock:  # (who waits for what is being read has it: no use is left without its weights)
            if self._schedule is not None:
                self._schedule.close()  # (nothing is asked of the engine any more)
            if isinstance(self._engine, ReadingEngine):
                self._engine.close()
            super().close()


def _is_clean(tensor: Any, verified: Collection[int]) -> bool:
    """Whether a unit's tensor has the numbers of its file, as far as is known; one in host memory is fine."""
    parameter = tensor.module._parameters[tensor.leaf]
    return region_of(tensor.host) is None or tensor.stamp[1] == 0 or id(parameter) in verified


def clean_parameters(modules: Sequence[PackedExperts]) -> set[int]:
    """Identities of mapped parameters that nobody wrote to, as their streamers know."""
    streamers = {
        id(s): s for m in modules if isinstance(s := getattr(m.fourfold_host, "streamer", None), DiskStreamer)
    }
    return {
        id(tensor.module._parameters[tensor.leaf])
        for streamer in streamers.values()
        for number, unit in enumerate(streamer.units)
        if streamer.is_as_mapped(number)
        for tensor in unit.tensors
    }


def read_ahead_bytes(device: torch.device, units: Sequence[Sequence[PackedExperts]]) -> int:
    """Of host memory that units are read into, once they are mapped and computed with on ``device``.

    Args:
        device: where they are computed with.
        units: modules that are brought together.
    """
    if device.type in COMPUTES_IN_PLACE:
        return 0

    def mapped(modules: Sequence[PackedExperts]) -> int:
        tensors = [
            m._parameters[leaf] for m in modules for leaf in m.packed_names() if not leaf.endswith(IN_MEMORY)
        ]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    return STAGES * max(map(mapped, units), default=0)


@dataclass(frozen=True)
class OnDisk:
    """What streamers from disk need: see `DiskStreamer`."""

    memory: HostMemory
    verified: set[int]


def reads_in(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a mapped tensor that is to lie on ``device`` takes host memory for it."""
    return device.type == "cpu" and region_of(tensor) is not None


def brought_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A packed tensor on its device, and mapped no more."""
    return read_in(tensor.data) if reads_in(tensor, device) else tensor.data.to(device)


def read_in(tensor: torch.Tensor) -> torch.Tensor:
    """A mapped tensor in memory of its own."""
    with torch.no_grad(), torch.inference_mode(False):
        return tensor.detach().clone()


def files_of_checkpoint(model: torch.nn.Module, checkpoint: str | Path | None) -> list[MappedFile]:
    """The mapped files of the checkpoint of a model.

    Raises:
        ConfigurationError: there is no such folder here, or no files in it.
    """
    named = checkpoint or getattr(model, "name_or_path", None)
    folder = None if named is None else Path(named).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []
    if not files:
        which = f"{folder} is no folder with safetensors files" if named else "the model names no folder"
        raise ConfigurationError(
            f"device='disk' maps experts from a packed checkpoint, and {which}. Name one (`checkpoint=`), "
            "write one with `fourfold quantize`, or load it with MoeBitsAndBytesConfig(..., "
            "experts_device='disk')"
        )
    return [MappedFile(file) for file in files]


def map_tensors(
    modules: Sequence[PackedExperts], files: Callable[[], list[MappedFile]]
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """The packed parameters of loaded modules that a checkpoint holds, and what they are mapped to.

    Args:
        modules: their packed tensors anywhere.
        files: finds those of the packed checkpoint; it is asked if a tensor is not mapped yet.

    Raises:
        ConfigurationError: the files hold other numbers, or none for one of them; naming file and tensor.
    """
    found, opened = [], None
    for module in modules:
        for leaf in module.packed_names():
            if leaf.endswith(IN_MEMORY):
                continue
            parameter = module._parameters[leaf]
            assert parameter is not None
            if region_of(parameter.data) is not None:
                continue
            key = f"{module.fourfold_name}.{leaf}"
            opened = files() if opened is None else opened
            file = next((f for f in opened if key in f.regions), None)
            if file is None:
                raise ConfigurationError(
                    f"no file of the checkpoint holds {key}; experts are mapped from the packed checkpoint "
                    "of the very model. Write one with `fourfold quantize` or model.save_pretrained"
                )
            if not _holds(file, key, parameter.data):
                raise ConfigurationError(
                    f"{file.path} holds other numbers for {key} than the model does; name the checkpoint "
                    "that the model was loaded from, or load that one with experts_device='disk'"
                )
            found.append((parameter, file.tensor(key)))
    return found


def _holds(file: MappedFile, key: str, tensor: torch.Tensor) -> bool:
    """Whether a file has the very numbers of a tensor.

    (Expert by expert, and past the map: nothing as large as the tensor is made, and its pages are not kept.)
    """
    region = file.regions[key]
    if (region.shape, region.dtype) != (tuple(tensor.shape), tensor.dtype):
        return False
    for number, here in enumerate(tensor):
        there = torch.empty(here.shape, dtype=here.dtype)
        bytes_there = memoryview(there.view(-1).view(torch.uint8).numpy())
        file.read_into(bytes_there, region[number : number + 1].offset)
        if not torch.equal(there, here.cpu()):
            return False
    return True


def check_files(model: torch.nn.Module) -> int:
    """Look at every file that a model's experts are mapped from, thoroughly; returns how many there are.

    Each use looks at what the system says of its file. This compares lengths, headers and samples as well,
    and is for the beginning of a run and of its epochs.

    Raises:
        CheckpointError: one was changed.
    """
    return check_mapped(m for m in model.modules() if isinstance(m, PackedExperts))


def check_mapped(modules: Iterable[PackedExperts]) -> int:
    """`check_files` of some modules, before what is mapped is copied from."""
    files = files_of(
        p.data for m in modules for name in m.packed_names() if (p := m._parameters[name]) is not None
    )
    for file in files:
        file.check(thorough=True)
    return len(files)


def mapped_files(model: torch.nn.Module) -> list[MappedFile]:
    """The files that a model's packed experts are mapped from."""
    modules = [m for m in model.modules() if isinstance(m, PackedExperts)]
    return files_of(
        p.data for m in modules for name in m.packed_names() if (p := m._parameters[name]) is not None
    )


def keep_from_saving_over(model: torch.nn.Module) -> None:
    """`save_pretrained` refuses the folder that experts are mapped from.

    Some versions of safetensors write into a file that is there, which would cut off the pages that are
    being saved. (An adapter may be saved anywhere.)

    Args:
        model: its experts mapped; one of PEFT's too.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = getattr(type(base), "save_pretrained", None)
    if original is None:
        return

    def save_pretrained(self: Any, save_directory: Any, *arguments: Any, **named: Any) -> Any:
        check_files(self)
        for file in mapped_files(self):
            if os.path.realpath(file.path.parent) == os.path.realpath(save_directory):
                raise ConfigurationError(
                    f"{save_directory} holds the files that the model's experts are mapped from; save into "
                    "another folder, or call fourfold.onload(model) first"
                )
        return type(self).save_pretrained(self, save_directory, *arguments, **named)

    # (a bound method: a deep copy of the model gets its own, and a pickled one that of its class)
    base.save_pretrained = types.MethodType(functools.wraps(original)(save_pretrained), base)
