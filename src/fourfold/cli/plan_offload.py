"""Of `fourfold plan`: where experts lie, and what a step waits for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fourfold.cli.show import say
from fourfold.errors import ConfigurationError
from fourfold.sizes import bytes_of

if TYPE_CHECKING:
    from fourfold.planning.pace import Pace
    from fourfold.planning.placement import Placement
    from fourfold.planning.plan import Plan
    from fourfold.training.schema import TrainConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--gpu-budget",
        metavar="SIZE",
        help="what experts may take on the card; the others are in host memory (experts_offload: auto)",
    )
    parser.add_argument(
        "--link-bandwidth",
        metavar="SIZE",
        help="bytes a second from host memory to the card, e.g. 25GB; absent: measured if the card is here, "
        "else assumed, and said",
    )
    parser.add_argument(
        "--disk-bandwidth", metavar="SIZE", help="bytes a second from disk, e.g. 5GB; absent: 3GB is assumed"
    )
    parser.add_argument(
        "--step-seconds",
        metavar="SECONDS",
        type=float,
        help="of a step that was measured with all experts on the card; absent: estimated from its products",
    )


def overrides(args: argparse.Namespace) -> list[str]:
    """What ``--gpu-budget`` means in keys of a configuration."""
    if args.gpu_budget is None:
        return []
    _bytes("--gpu-budget", args.gpu_budget)
    return ["experts_offload=auto", f"gpu_budget={args.gpu_budget}"]


def check(args: argparse.Namespace) -> dict[str, float]:
    """The rates that were named.

    Raises:
        ConfigurationError: one is no number above zero.
    """
    found: dict[str, float] = {}
    for name in ("link", "disk"):
        text = getattr(args, f"{name}_bandwidth")
        if text is not None:
            found[name] = _bytes(f"--{name}-bandwidth", text.strip().removesuffix("/s"))
    if args.step_seconds is not None:
        if not 0 < args.step_seconds < float("inf"):
            raise ConfigurationError(f"--step-seconds: {args.step_seconds} is no time. Write 0.54, say.")
        found["step_seconds"] = args.step_seconds
    return found


FLAGS = {"link": "--link-bandwidth", "disk": "--disk-bandwidth", "step_seconds": "--step-seconds"}


def check_effect(named: dict[str, float], config: TrainConfig) -> None:
    """Rates are for experts that are brought to the card.

    Raises:
        ConfigurationError: one was named, and the run has none.
    """
    for name in named:
        wanted = "disk" if name == "disk" else "cpu"
        if config.experts_offload is None or (name == "disk" and config.experts_offload == "cpu"):
            raise ConfigurationError(
                f"{FLAGS[name]}: has no effect on a run with experts_offload: "
                f"{config.experts_offload or 'null'}. Set experts_offload={wanted}, or drop it."
            )


def _bytes(flag: str, text: str) -> int:
    found = bytes_of(text)
    if not found:
        raise ConfigurationError(f"{flag}: {text!r} is no number of bytes. Write 25GB, say.")
    return found


def to_dict(plan: Plan, found: Pace | None) -> dict[str, Any] | None:
    """For ``--json``; None where all experts are on the device."""
    if plan.placement is None:
        return None
    return plan.placement.to_dict() | {"pace": None if found is None else found.to_dict()}


def show(plan: Plan, found: Pace | None, console: Console) -> None:
    """A table of where experts lie, and sentences on what a step waits for."""
    if plan.placement is None:
        return
    device = "card" if plan.target.is_cuda else "CPU"
    console.print(table(plan.placement, device))
    if not plan.placement.streamed_modules:
        say(console, f"All experts stay on the {device}: nothing is copied.")
    if found is not None:
        say(console, *found.lines())


def table(placement: Placement, device: str) -> Table:
    """Where experts lie."""
    result = Table(title="where experts lie", title_justify="left")
    result.add_column("where")
    result.add_column("what")
    result.add_column("bytes", justify="right")
    rows = [(device, f"{placement.resident_modules} modules that stay", placement.resident_bytes)]
    if placement.buffers:
        rows.append((device, f"{placement.buffers} buffers", placement.buffer_bytes))
    streamed = f"{placement.streamed_modules} modules"
    if placement.kind == "disk":
        rows.append(("host memory", "read ahead, and small scales", placement.host_bytes))
        rows.append(("disk", f"{streamed}, mapped", placement.disk_bytes))
    else:
        rows.append(("host memory", streamed, placement.host_bytes))
    rows.append(("host memory", "peak of the process, while it loads", placement.host_peak))
    for where, what, count in rows:
        result.add_row(where, what, _size(count))
    return result


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
