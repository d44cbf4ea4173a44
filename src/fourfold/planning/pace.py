"""How long a step computes, and how long its experts are copied meanwhile: which of the two it waits for.

What is copied is known to the byte (`placement`). How fast is measured where there is a GPU, or named, or
assumed; the same goes for computing, which is an estimate unless a measured step is named: the products of
the step (counted by running it on fake tensors, `flops`) at the rate that steps reach, and no less than what
the host takes to launch a layer. Every rate says where it comes from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fourfold.offloading.link import measure_link
from fourfold.planning.plan import Plan

# Of the rate of dense bf16 products, what the products of a whole step reach: 190 of 742 TFLOP/s
# (benchmarks/results/step.json: 12 layers, 2 x 4,096 tokens, one H100).
REACHED = 0.256
# What a layer takes at least, forward and backward, for the host to launch it: a third more with
# recomputation. (24 layers at 4,096 tokens and 12 at 8,192 take 22 ms each: step.json, offload.json.)
LAUNCH_SECONDS = 0.0147
# bytes and operations a second, where nothing is measured. The link of an H100 was (offload.json).
LINKS = {True: (53e9, "PCIe 5.0 x16, as measured on an H100"), False: (25e9, "PCIe 4.0 x16")}
PRODUCTS = {True: (742e12, "as measured on an H100"), False: (150e12, "of a card of capability 8")}
DISK = (3e9, "NVMe")
HIDDEN = 0.01  # of computing, that a step may wait without a word


@dataclass(frozen=True)
class Rate:
    """Bytes or operations a second.

    Attributes:
        value: so many.
        source: where the number is from, to be read after it.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Rates:
    """What a step's times are worked out with.

    Attributes:
        link: bytes a second from host memory to the card.
        disk: bytes a second from disk.
        products: operations a second of dense bf16 products.
        step_seconds: of a step with all experts on the card, where somebody measured it.
    """

    link: Rate
    disk: Rate
    products: Rate
    step_seconds: float | None = None


def rates_for(
    plan: Plan,
    *,
    link: float | None = None,
    disk: float | None = None,
    step_seconds: float | None = None,
) -> Rates:
    """Rates for a plan: what is named, else measured if the card that was planned for is here, else assumed.

    See `pace_of` for the arguments.
    """
    hopper = (plan.target.capability or (0, 0)) >= (9, 0)
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == plan.target.capability
    device = torch.device("cuda", torch.cuda.current_device()) if here else torch.device("cpu")

    def assumed(value: float, what: str) -> Rate:
        return Rate(value, f"assumed: {what}")

    products = assumed(*PRODUCTS[hopper])
    if here and step_seconds is None:
        products = measured(partial(measure_products, device), products)
    linked = assumed(*LINKS[hopper])
    if link is not None:
        linked = Rate(link, "given")
    elif here:
        linked = measured(partial(measure_link, device), linked)
    return Rates(linked, assumed(*DISK) if disk is None else Rate(disk, "given"), products, step_seconds)


def measured(measure: Callable[[], float], otherwise: Rate) -> Rate:
    """A rate as measured; where the card has no room for that (another job runs on it), the assumed one."""
    try:
        return Rate(measure(), "measured here")
    except RuntimeError as error:  # (out of memory is one)
        reason = str(error).strip().partition("\n")[0][:80]
        return Rate(otherwise.value, f"{otherwise.source}; it could not be measured here ({reason})")


def measure_products(device: torch.device, size: int = 8192, repeats: int = 5) -> float:
    """Operations a second of a dense bf16 product on ``device``; waits for it."""
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = x @ y
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(x, y, out=out)
    _wait(device)
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Pace:
    """Times of an optimizer step, in seconds.

    Attributes:
        rates: what they are worked out with.
        copied: bytes of experts copied to the card in a step.
        read: and read from disk.
        copying: how long the copies take.
        reading: how long the reads take, if the system keeps none of it in memory.
        computing: how long a step with all experts on the card takes; None where that is not known.
        estimated: whether ``computing`` is an estimate.
        forward: share of computing that is forward. Forward and backward copy as much each, and forward
            computes less: it waits for the link first.
        tokens: in a micro batch.
    """

    rates: Rates
    copied: int
    read: int
    copying: float
    reading: float
    computing: float | None
    estimated: bool
    forward: float
    tokens: int

    @property
    def bringing(self) -> float:
        """What experts take to come; reading and copying go on side by side."""
        return max(self.copying, self.reading)

    @property
    def bound_by(self) -> str | None:
        """``"compute"``: the copies are hidden; else what a step waits for, ``"link"`` or ``"disk"``."""
        if self.step is None or self.computing is None:
            return None
        if self.step <= self.computing * (1 + HIDDEN):
            return "compute"
        return "disk" if self.reading > self.copying else "link"

    @property
    def step(self) -> float | None:
        """A step's time: forward, and then backward, each compute and copy side by side."""
        if self.computing is None:
            return None
        shares = (self.forward, 1 - self.forward)
        return sum(max(share * self.computing, self.bringing / 2) for share in shares)

    @property
    def tokens_to_hide(self) -> int | None:
        """Tokens in a micro batch from which on copies would be hidden, if computing grows with them."""
        if self.computing is None:
            return None
        return math.ceil(self.tokens * self.bringing / 2 / (self.forward * self.computing))

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""

        def rate(each: Rate) -> dict[str, Any]:
            return {"per_second": each.value, "source": each.source}

        return {
            "copied_bytes_per_step": self.copied,
            "read_bytes_per_step": self.read,
            "copy_seconds_per_step": self.copying,
            "read_seconds_per_step": self.reading,
            "compute_seconds_per_step": self.computing,
            "compute_is_estimated": self.estimated,
            "step_seconds": self.step,
            "bound_by": self.bound_by,
            "tokens_to_hide_copies": self.tokens_to_hide,
            "link": rate(self.rates.link),
            "disk": rate(self.rates.disk),
            "products": rate(self.rates.products),
        }

    def lines(self) -> Iterable[str]:
        """What there is to say, for people."""
        link = self.rates.link
        yield (
            f"A step copies {self.copied / 2**30:.2f} GiB of experts to the card: "
            f"{_seconds(self.copying)} at {link.value / 1e9:.1f} GB/s ({link.source})."
        )
        if self.read:
            disk = self.rates.disk
            yield (
                f"It reads {self.read / 2**30:.2f} GiB from disk, less what the system keeps in memory: "
                f"up to {_seconds(self.reading)} at {disk.value / 1e9:.1f} GB/s ({disk.source})."
            )
        if self.computing is None:
            yield "How long it computes is not known; measure a step and name it with --step-seconds."
            return
        products = self.rates.products
        source = (
            "as given"
            if not self.estimated
            else (
                f"an estimate: {REACHED:.0%} of {products.value / 1e12:.0f} TFLOP/s of dense products "
                f"({products.source}), and no less than it takes to launch"
            )
        )
        yield f"It computes for {_seconds(self.computing)} ({source})."
        if self.bound_by == "compute":
            yield "The copies are hidden behind computing."
        else:
            what = "link" if self.bound_by == "link" else "disk"
            assert self.step is not None
            yield (
                f"The step is bound by the {what}: it takes about {_seconds(self.step)}, and waits for "
                f"experts in {1 - self.computing / self.step:.0%} of that. Copies would be hidden from about "
                f"{self.tokens_to_hide:,} tokens in a micro batch (here {self.tokens:,})."
            )


def pace_of(
    plan: Plan,
    *,
    link: float | None = None,
    disk: float | None = None,
    step_seconds: float | None = None,
) -> Pace | None:
    """Times of a plan's step; None where no experts are brought to a card.

    Args:
        plan: of the run.
        link: bytes a second from host memory to the card, if known.
        disk: bytes a second from disk, if known.
        step_seconds: of a step with all experts on the card, if known.
    """
    placement, settings = plan.placement, plan.settings
    if placement is None or not plan.target.is_cuda or not placement.streamed_modules:
        return None
    rates = rates_for(plan, link=link, disk=disk, step_seconds=step_seconds)
    batches = settings["accumulation"]
    computing = rates.step_seconds
    if computing is None and plan.activations is not None:
        layers = placement.streamed_modules + placement.resident_modules
        launching = layers * LAUNCH_SECONDS * (1.5 if settings["checkpointing"] else 1)
        products = plan.activations.flops / (REACHED * rates.products.value)
        computing = batches * max(products, launching)
    copied, read = batches * placement.copied, batches * placement.read
    return Pace(
        rates=rates,
        copied=copied,
        read=read,
        copying=copied / rates.link.value,
        reading=read / rates.disk.value,
        computing=computing,
        estimated=rates.step_seconds is None,
        forward=1 / 3 if settings["checkpointing"] else 1 / 2,
        tokens=settings["batch"] * settings["length"],
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1e3:,.0f} ms"
