"""`fourfold.offload` and `fourfold.onload`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourfold.errors import ConfigurationError, NoExpertsError
from fourfold.experts import PackedExperts, find_experts
from fourfold.offloading.budget import (
    AUTO_RESERVE,
    GIB,
    automatic,
    check_device_room,
    share_out,
)
from fourfold.offloading.disk import (
    DiskStreamer,
    OnDisk,
    brought_to,
    check_files,
    check_mapped,
    clean_parameters,
    files_of_checkpoint,
    keep_from_saving_over,
    map_tensors,
    read_ahead_bytes,
    reads_in,
)
from fourfold.offloading.host import HostMemory, check_room
from fourfold.offloading.mapped import MappedFile, region_of
from fourfold.offloading.read_ahead import STAGES
from fourfold.offloading.schedule import Counts
from fourfold.offloading.sizes import parse_bytes
from fourfold.offloading.streamer import HostExperts, Streamer, Unit

BUFFERS = 2


@dataclass(frozen=True)
class OffloadReport:
    """Where the packed experts of a model lie.

    Attributes:
        resident: names of modules that stay on their device.
        streamed: names of modules in host memory.
        resident_bytes: of the former's packed tensors.
        host_bytes: of the latter's, as far as it takes memory: with experts on disk that of buffers that they
            are read into, and of small tensors.
        disk_bytes: of the latter's, where they stay in the files of their checkpoint.
        buffer_bytes: on the devices, for those that are computed and come next.
        buffers: on each device.
        devices: where is computed.
        unpinned: why host memory is pageable; None where it is pinned.
        streamers: of each device with streamed modules.
    """

    resident: list[str]
    streamed: list[str]
    resident_bytes: int
    host_bytes: int
    buffer_bytes: int
    buffers: int
    devices: list[str]
    unpinned: str | None
    disk_bytes: int = 0
    streamers: list[Streamer] = field(default_factory=list, repr=False, compare=False)

    @property
    def pinned(self) -> bool:
        return self.unpinned is None

    def counts(self) -> dict[str, int]:
        """Since `offload`, of all devices; see `schedule.Counts`."""
        total = asdict(Counts())
        for streamer in self.streamers:
            for name, value in asdict(streamer.counts).items():
                total[name] += value
        return total

    def time_waits(self, timed: bool = True) -> None:
        """Measure from now on how long computing waits for copies (two events a use), or no more."""
        for streamer in self.streamers:
            streamer.time_waits(timed)

    def waited_ms(self) -> float | None:
        """How long computing waited for copies since the last call, on all devices; waits for them.

        None where that is not measured: on a CPU copies are computing.
        """
        found = [streamer.waited_ms() for streamer in self.streamers]
        measured = [each for each in found if each is not None]
        return sum(measured) if measured else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"streamers": []}  # (a copy of a model has no share in the buffers)

    def to_dict(self) -> dict[str, Any]:
        names = ("resident_bytes", "host_bytes", "disk_bytes", "buffer_bytes", "buffers", "devices")
        counted = {"resident_modules": len(self.resident), "streamed_modules": len(self.streamed)}
        return counted | {name: getattr(self, name) for name in (*names, "pinned", "unpinned")}

    def __str__(self) -> str:
        kind = "pinned" if self.pinned else f"pageable ({self.unpinned}): copies hold up the host"
        there = (
            f"experts of {len(self.resident)} modules on {', '.join(self.devices)}: "
            f"{self.resident_bytes / GIB:.2f} GiB\n"
        )
        if self.disk_bytes and not self.buffers:
            return (
                f"{there}experts of {len(self.streamed)} modules on disk: {self.disk_bytes / GIB:.2f} GiB, "
                "read where they are computed with"
            )
        if self.disk_bytes:
            return (
                f"{there}experts of {len(self.streamed)} modules on disk: {self.disk_bytes / GIB:.2f} GiB, "
                f"read ahead into {self.host_bytes / GIB:.2f} GiB of host memory, {kind}; {self.buffers} "
                f"buffers of {self.buffer_bytes / GIB:.2f} GiB together"
            )
        return (
            f"{there}experts of {len(self.streamed)} modules in host memory: "
            f"{self.host_bytes / GIB:.2f} GiB, {kind}; {self.buffers} buffers of "
            f"{self.buffer_bytes / GIB:.2f} GiB together"
        )


def offload(
    model: nn.Module,
    budget: int | str | None = None,
    *,
    buffers: int = BUFFERS,
    pin: bool | None = None,
    reserve: int | None = None,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
) -> OffloadReport:
    """Send packed experts to host memory; each module's are copied to the device while it is computed.

    They stay parameters of their modules: what saves, reports or dequantizes the model finds them. The next
    module's are copied while one computes, in the order in which passes use them. Results are those of the
    model before, to the bit. Called again, it begins anew with other arguments.

    Args:
        model: with packed experts, with adapters or without; on the device(s) where it computes.
        budget: device memory that packed experts may take, buffers included, on each device: bytes, or
            ``"8GiB"``; as many modules as fit stay there, spread evenly. ``"auto"`` is what is free, less
            ``reserve``. None keeps the buffers alone.
        buffers: modules' experts on the device at a time, besides those that stay; 2 copies one ahead.
        pin: True refuses host memory that cannot be pinned, False asks for none; None takes what there is,
            and the report says which.
        reserve: what ``"auto"`` leaves for everything else, in bytes; None is 4 GiB.
        device: ``"cpu"`` is host memory. ``"disk"`` maps them from the files of their packed checkpoint, and
            reads each module's ahead of its use: for experts that host memory does not hold.
        checkpoint: with ``device="disk"``, the folder of the packed checkpoint; None is the folder the model
            was loaded from (of a model of the hub: name the folder of its snapshot). Its numbers are compared
            with the model's.

    Returns:
        What lies where.

    Raises:
        NoExpertsError: no module has packed experts.
        ConfigurationError: a budget that is no number or below what one module needs, too little host memory,
            experts that are spread over processes, or a checkpoint that is none of this model's.
        CheckpointError: a file of the checkpoint is damaged.
    """
    if device not in ("cpu", "disk"):
        raise ConfigurationError(f"device={device!r}; valid are 'cpu' (host memory) and 'disk'")
    if checkpoint is not None and device != "disk":
        raise ConfigurationError(f"checkpoint={str(checkpoint)!r} has no meaning without device='disk'")
    if not isinstance(buffers, int) or buffers < 1:
        raise ConfigurationError(f"buffers={buffers!r}; one holds what computes, two copy the next meanwhile")
    if reserve is not None and budget != "auto":
        raise ConfigurationError(f"reserve={reserve} belongs to budget='auto', and budget is {budget!r}")
    if budget is not None and budget != "auto":
        budget = parse_bytes(budget)
    groups = _groups(model)
    plan = _plan(groups, budget, buffers, AUTO_RESERVE if reserve is None else reserve)
    files = partial(files_of_checkpoint, model, checkpoint) if device == "disk" else None
    report = _carry_out(plan, pin, files=files)
    if report.disk_bytes:
        keep_from_saving_over(model)
    return report


def receive_in_host_memory(modules: Sequence[Any], memory: HostMemory) -> None:
    """While a model is loaded: packed tensors go to host memory as they arrive.

    Args:
        modules: packed ones, their tensors on the meta device.
        memory: where they go.

    Raises:
        ConfigurationError: the host has no room for them.
    """
    shapes = [(m, p.shape) for m in modules for p in m.fourfold_layout.projections]
    check_room(sum(shape.nbytes(m.fourfold_format) for m, shape in shapes), "the packed experts of the model")
    for module in modules:
        module.fourfold_arrives = memory.take


def stay_on_disk(
    model: nn.Module, memory: HostMemory, device_of: Callable[[str], torch.device]
) -> OffloadReport:
    """After loading: what was mapped from the checkpoint's files stays there, as after `offload`.

    Args:
        model: loaded, its packed tensors mapped.
        memory: where their small tensors went.
        device_of: where the module of a name computes.
    """
    return _carry_out(_plan(_groups(model, device_of), None, BUFFERS, 0), None, memory, files=list)


def stay_in_host_memory(
    model: nn.Module, memory: HostMemory, device_of: Callable[[str], torch.device]
) -> OffloadReport:
    """After loading: what arrived in host memory stays there, as after `offload`.

    Args:
        model: loaded.
        memory: where packed tensors went.
        device_of: where the module of a name computes.
    """
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.__dict__.pop("fourfold_arrives", None)
    groups = _groups(model, device_of)
    return _carry_out(_plan(groups, None, BUFFERS, 0), None, memory)


def units_of(model: nn.Module) -> list[Unit]:
    """Packed modules as they are brought: one by one, or those together that one forward reads.

    Args:
        model: with packed experts or none; without weights will do.
    """
    by_reader: dict[str, list[PackedExperts]] = {}
    for found in find_experts(model):
        if isinstance(found.module, PackedExperts):
            by_reader.setdefault(found.reader, []).append(found.module)
    return [Unit(modules) for modules in by_reader.values()]


_Groups = dict[torch.device, list[list[PackedExperts]]]
_Plan = list[tuple[torch.device, list[list[PackedExperts]], list[bool], int]]


def _plan(groups: _Groups, budget: int | str | None, buffers: int, reserve: int) -> _Plan:
    """For each device its units, which of them are brought, and the number of buffers."""
    plans: _Plan = []
    for device, group in groups.items():
        sizes = [Unit(modules).nbytes for modules in group]
        limit: Any = budget
        if budget == "auto":
            held = sum(t.nbytes for unit in group for m in unit for t in _packed(m) if t.device == device)
            limit = automatic(device, held + _buffer_bytes(group), reserve)
        share = share_out(sizes, limit, buffers)
        plans.append((device, group, list(share.streamed), share.buffers))
    return plans


def _buffer_bytes(group: Sequence[Sequence[PackedExperts]]) -> int:
    """Of buffers that are allocated for these modules."""
    hosts = [m.fourfold_host for unit in group for m in unit]
    streamers = {id(h.streamer): h.streamer for h in hosts if isinstance(h, HostExperts)}
    return sum(s.allocated_bytes for s in streamers.values())


def _carry_out(
    plans: _Plan,
    pin: bool | None,
    memory: HostMemory | None = None,
    *,
    files: Callable[[], list[MappedFile]] | None = None,
) -> OffloadReport:
    """Move what is planned. ``files`` finds those that experts are mapped from; None is host memory."""
    resident: list[tuple[PackedExperts, torch.device]] = []
    streamed: list[PackedExperts] = []
    units: list[tuple[torch.device, list[list[PackedExperts]], int]] = []
    for device, group, chosen, buffers in plans:
        resident += [(m, device) for unit, away in zip(group, chosen, strict=True) if not away for m in unit]
        away_units = [unit for unit, away in zip(group, chosen, strict=True) if away]
        streamed += [m for unit in away_units for m in unit]
        if away_units:
            units.append((device, away_units, buffers))
    check_mapped(m for _, group, *_ in plans for unit in group for m in unit)
    memory = memory or HostMemory(pin)
    mapped = [] if files is None else map_tensors(streamed, files)
    stays = {id(t) for m in streamed for t in _packed(m) if files is not None and region_of(t.data)}
    stays |= {id(parameter) for parameter, _ in mapped}
    moved = [t for m in streamed for t in _packed(m) if id(t) not in stays]
    pageable = [t.nbytes for t in moved if t.device.type == "cpu" and not memory.has(t.data)]
    if pageable and pin is None:  # (they stay where they are if nothing can be pinned, which shows by trying)
        memory.empty((max(pageable),), torch.uint8)
    copied = {t.data_ptr(): t.nbytes for t in moved if not memory.has(t.data)}
    back = {t.data_ptr(): t.nbytes for m, d in resident for t in _packed(m) if reads_in(t, d)}
    ahead = 0 if files is None else sum(read_ahead_bytes(device, unit) for device, unit, _ in units)
    check_room(sum((copied | back).values()) + ahead, "the packed experts that are to be copied there")
    for device, group, chosen, buffers in plans:
        _check_device(device, group, chosen, buffers)
    if ahead:  # (pinned now and given back: whether that can be had is known before anything moves)
        stages = [memory.empty((ahead // STAGES,), torch.uint8) for _ in range(STAGES)]
        del stages
    # Copies first, all of them: what fails here leaves the model as it was.
    copies = {id(t): (t, memory.take(t.data)) for t in moved} | {id(t): (t, data) for t, data in mapped}
    verified = clean_parameters(streamed) | {id(parameter) for parameter, _ in mapped}
    for tensor, copy in copies.values():
        tensor.data = copy
    del copies, mapped
    for module in streamed:
        _release(module)
    disk = None if files is None else OnDisk(memory, verified)
    streamers = [attach(unit, device, buffers, disk=disk) for device, unit, buffers in units]
    for module, device in resident:
        # (before the module lets go of them)
        brought = [brought_to(tensor, device) for tensor in _packed(module)]
        _release(module)
        for tensor, data in zip(_packed(module), brought, strict=True):
            tensor.data = data
    on_disk = _bytes(streamed, lambda t: region_of(t) is not None)
    return OffloadReport(
        resident=[m.fourfold_name for m, _ in resident],
        streamed=[m.fourfold_name for m in streamed],
        resident_bytes=_bytes([m for m, _ in resident]),
        host_bytes=_bytes(streamed) - on_disk + sum(s.read_ahead_bytes for s in streamers),
        disk_bytes=on_disk,
        buffer_bytes=sum(s.buffer_bytes for s in streamers),
        buffers=max((s.buffers for s in streamers if s.buffer_bytes), default=0),
        devices=list(dict.fromkeys(str(device) for device, *_ in plans)),
        unpinned=memory.unpinned if streamed else None,
        streamers=streamers,
    )


def _check_device(
    device: torch.device, group: list[list[PackedExperts]], chosen: list[bool], buffers: int
) -> None:
    """What is to lie there has room, before anything moves."""
    stay = [m for unit, away in zip(group, chosen, strict=True) if not away for m in unit]
    go = [unit for unit, away in zip(group, chosen, strict=True) if away]
    come = {t.data_ptr(): t.nbytes for m in stay for t in _packed(m) if t.device != device}
    left = {t.data_ptr(): t.nbytes for unit in go for m in unit for t in _packed(m) if t.device == device}
    wanted = sum(come.values()) + buffers * max((Unit(unit).nbytes for unit in go), default=0)
    given_back = sum(left.values()) + _buffer_bytes(group)
    check_device_room(device, wanted, given_back, "packed experts on the device, with buffers,")


def attach(
    units: Sequence[Sequence[PackedExperts]],
    device: torch.device,
    buffers: int,
    engine: Any = None,
    disk: OnDisk | None = None,
) -> Streamer:
    """Have modules whose packed tensors lie in host memory, or are mapped, computed on ``device``."""
    made = [Unit(modules) for modules in units]
    streamer = (
        Streamer(made, device, buffers, engine)
        if disk is None
        else DiskStreamer(made, device, buffers, engine, disk.memory, disk.verified)
    )
    for unit, modules in enumerate(units):
        for number, module in enumerate(modules):
            module.fourfold_host = HostExperts(streamer, unit, number)
    return streamer


def onload(model: nn.Module) -> None:
    """Bring packed experts back from host memory, or disk, to the devices where they are computed.

    Undoes `offload`.

    A model whose experts were not offloaded stays as it is.

    Raises:
        NoExpertsError: no module has packed experts.
        ConfigurationError: a device has no room for them, with the figures.
        CheckpointError: a file that they are mapped from was changed.
    """
    groups = _groups(model)
    check_files(model)
    for device, group in groups.items():
        modules = [m for unit in group for m in unit if m.fourfold_host is not None]
        check_device_room(device, _bytes(modules), _buffer_bytes(group), "the packed experts in host memory")
        read = {t.data_ptr(): t.nbytes for m in modules for t in _packed(m) if reads_in(t, device)}
        check_room(sum(read.values()), "the packed experts that are read from disk")
        for module in modules:
            _release(module)
        for module in modules:
            for tensor in _packed(module):
                tensor.data = brought_to(tensor, device)


def _release(module: PackedExperts) -> None:
    """The module computes with its tensors where they lie."""
    host = module.__dict__.pop("fourfold_host", None)
    if isinstance(host, HostExperts):
        host.streamer.close()


def _groups(model: nn.Module, device_of: Callable[[str], torch.device] | None = None) -> _Groups:
    """Packed modules by the device that computes with them; those that one forward reads stand together."""
    groups: dict[torch.device, dict[str, list[PackedExperts]]] = {}
    for found in find_experts(model):
        module = found.module
        if isinstance(module, PackedExperts):
            _refuse_spread(module)
            device = (
                _computing_device(model, module) if device_of is None else _numbered(device_of(found.name))
            )
            by_reader = groups.setdefault(device, {})
            by_reader.setdefault(found.reader, []).append(module)
    if not groups:
        raise NoExpertsError(
            f"{type(model).__name__} has no packed experts to move: load it with MoeBitsAndBytesConfig (or "
            "pack its modules) first"
        )
    return {device: list(units.values()) for device, units in groups.items()}


def _computing_device(model: nn.Module, module: PackedExperts) -> torch.device:
    """Where a module computes; of a copy, whose experts are in host memory alone, where its rest does."""
    device = module.computing_device
    if device.type != "cpu" or module.fourfold_host is not None:
        return device
    packed = {id(tensor) for m in model.modules() if isinstance(m, PackedExperts) for tensor in _packed(m)}
    others = {p.device for p in model.parameters() if id(p) not in packed} - {device}
    return others.pop() if len(others) == 1 else device


def _numbered(device: torch.device) -> torch.device:
    """As tensors say it: ``cuda:0`` for ``cuda``."""
    return torch.empty(0, device=device).device


def _refuse_spread(module: PackedExperts) -> None:
    for tensor in _packed(module):
        if type(tensor.data) is not torch.Tensor and hasattr(tensor.data, "placements"):
            raise ConfigurationError(
                f"{module.fourfold_name}: its packed experts are spread over processes (FSDP or tensor "
                "parallelism), each of which holds a part; sending whole modules to host memory does not go "
                "together with that. Use one of the two"
            )
        if tensor.is_meta:
            raise ConfigurationError(
                f"{module.fourfold_name}: its packed experts have no memory (meta device)"
            )


def _packed(module: PackedExperts) -> list[nn.Parameter]:
    parameters = [module._parameters[name] for name in module.packed_names()]
    return [p for p in parameters if p is not None]


def _bytes(modules: Sequence[PackedExperts], where: Callable[[torch.Tensor], bool] = lambda _: True) -> int:
    """Of different tensors (an encoder may share its experts with a decoder)."""
    return sum({t.data_ptr(): t.nbytes for m in modules for t in _packed(m) if where(t.data)}.values())
