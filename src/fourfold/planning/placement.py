"""Where a run's packed experts will lie, and what each step copies: on the card, in host memory, on disk.

Which modules stay on the card and how many buffers the others get, `offloading.budget` decides, as it does
when a model is loaded; what a step copies is counted by the schedule that copies (`offloading.traffic`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fourfold.errors import ConfigurationError
from fourfold.offloading.api import BUFFERS, units_of
from fourfold.offloading.budget import Share, share_out
from fourfold.offloading.disk import IN_MEMORY
from fourfold.offloading.read_ahead import STAGES
from fourfold.offloading.traffic import traffic_of

KINDS = ("cpu", "auto", "disk")
# What a process holds besides experts (Python, torch, CUDA, kernels): in benchmarks/results/offload.json the
# peaks are 2.02 GB above the 4.4 and the 7.5 GB of experts in host memory.
PROCESS_BYTES = 2_020_000_000


@dataclass(frozen=True)
class ExpertUnits:
    """The packed experts of a model.

    Attributes:
        sizes: bytes of each module in a buffer, in order (its tensors begin at multiples of 512).
        stored: of its tensors.
        small: of those among them that host memory holds also where the others lie on disk.
    """

    sizes: tuple[int, ...]
    stored: tuple[int, ...]
    small: tuple[int, ...]

    @classmethod
    def of(cls, model: Any) -> ExpertUnits:
        """Those of a model, which needs no weights."""
        units = units_of(model)
        stored = [sum(t.host.nbytes for t in unit.tensors) for unit in units]
        small = [sum(t.host.nbytes for t in u.tensors if t.suffix in IN_MEMORY) for u in units]
        return cls(tuple(unit.nbytes for unit in units), tuple(stored), tuple(small))


@dataclass(frozen=True)
class Placement:
    """Where packed experts lie.

    Attributes:
        kind: "cpu" (host memory), "auto" (as many on the card as fit) or "disk".
        resident_modules: on the card.
        streamed_modules: brought there for their use.
        resident_bytes: of the former.
        buffers: that the latter are brought to.
        buffer_bytes: of these together.
        host_bytes: of experts in host memory, what is read ahead from disk included.
        host_peak: the most that host memory holds, the rest of the process included. All experts pass through
            it when they are loaded, those that stay on the card too.
        disk_bytes: of experts that stay in their files.
        copied: bytes that a micro batch copies to the card.
        read: and reads from disk, where the system keeps none of it in memory.
        on_device: bytes of experts on the device where they are computed, buffers included.
    """

    kind: str
    resident_modules: int
    streamed_modules: int
    resident_bytes: int
    buffers: int
    buffer_bytes: int
    host_bytes: int
    host_peak: int
    disk_bytes: int
    copied: int
    read: int
    on_device: int

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def place(
    kind: str, units: ExpertUnits, budget: int | None, *, checkpointing: bool, is_cuda: bool = True
) -> Placement:
    """Lay out the experts of a run.

    Args:
        kind: of `KINDS`.
        units: the model's.
        budget: bytes that they may take on the card, buffers included; None is the least.
        checkpointing: whether a step computes each module once more.
        is_cuda: whether a GPU computes. A CPU computes next to host memory: buffers come on top of it there,
            and what is on disk is computed with where it is mapped.

    Raises:
        ConfigurationError: the budget has no room for one module.
    """
    share: Share = share_out(units.sizes, budget, BUFFERS)
    stay, go = _parted(units.stored, share.streamed)
    on_disk = kind == "disk"
    small = sum(_parted(units.small, share.streamed)[1]) if on_disk else 0
    disk = sum(go) - small if on_disk else 0
    in_place = on_disk and not is_cuda
    buffers = 0 if in_place else share.buffers
    buffer_bytes = 0 if in_place else share.buffer_bytes
    staged = STAGES * max(share.away, default=0) if on_disk and is_cuda else 0
    traffic = traffic_of(share.away, share.buffers, checkpointing=checkpointing)
    host = sum(go) - disk + staged
    loaded = host if on_disk else sum(units.stored)
    return Placement(
        kind=kind,
        resident_modules=len(stay),
        streamed_modules=len(go),
        resident_bytes=sum(stay),
        buffers=buffers,
        buffer_bytes=buffer_bytes,
        host_bytes=host,
        host_peak=loaded + PROCESS_BYTES,
        disk_bytes=disk,
        copied=0 if in_place else traffic.bytes,
        read=traffic.bytes if on_disk else 0,
        on_device=sum(stay) + buffer_bytes + (0 if is_cuda else host),
    )


def _parted(values: Sequence[int], streamed: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Of the modules that stay, and of those that go."""
    pairs = list(zip(values, streamed, strict=True))
    return [v for v, away in pairs if not away], [v for v, away in pairs if away]


def check_asked(settings: Mapping[str, Any]) -> None:
    """What of ``experts_offload``, ``gpu_budget`` and ``card`` has no meaning.

    Raises:
        ConfigurationError: naming it.
    """
    kind, budget = settings["experts_offload"], settings["gpu_budget"]
    if kind is not None and kind not in KINDS:
        raise ConfigurationError(f"experts_offload: {kind!r} is not one of {', '.join(KINDS)}")
    if budget is not None and kind != "auto":
        raise ConfigurationError("gpu_budget: has no effect without experts_offload: auto")
