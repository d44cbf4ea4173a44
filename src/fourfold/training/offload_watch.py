"""What a run with experts in host memory has to say of its training: bytes copied, and how long it waited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

import fourfold
from fourfold.training.callbacks import Curve


class OffloadWatch(TrainerCallback):
    """Counts copies in training steps, and measures how long computing waited for them.

    Evaluation and samples between steps are not in it. The wait is the device's own time between two events
    around each wait, added up without holding up the host; on a CPU copies are computing, and none is
    measured.

    Args:
        report: where experts lie.
        facts: what the run's report says of that; "training" is kept up to date in it.
        curve: knows the seconds of training.
    """

    def __init__(self, report: fourfold.OffloadReport, facts: dict[str, Any], curve: Curve) -> None:
        self.report, self.facts, self.curve = report, facts, curve
        self.counted: dict[str, int] = {}
        self.steps = 0
        self._before: dict[str, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here."""
        self._before = self.report.counts()
        self.report.time_waits(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count until here."""
        self.report.time_waits(False)
        self.steps += 1
        for name, count in self.report.counts().items():
            self.counted[name] = self.counted.get(name, 0) + count - self._before.get(name, 0)
        self.facts["training"] = {
            "steps": self.steps,
            "copied_bytes": self.counted["bytes"],
            "copied_bytes_per_step": self.counted["bytes"] / self.steps,
            "copied_modules": self.counted["fills"],
            "found_too_late": self.counted["misses"],
            "waited_seconds": None,
            "waited_share": None,
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the waits, which waits for the device once."""
        waited = self.report.waited_ms()
        if waited is None or not self.steps:
            return
        seconds = self.curve.training_seconds
        self.facts["training"] |= {
            "waited_seconds": waited / 1e3,
            "waited_share": waited / 1e3 / seconds if seconds else None,
        }


def rows(offload: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Name and text of what a report says of experts that are not all where the model computes."""
    if not offload:
        return []
    devices = ", ".join(offload["devices"])
    found = [
        (f"experts on {devices}", f"{offload['resident_modules']} modules, {_gib(offload['resident_bytes'])}")
    ]
    disk = offload.get("disk_bytes", 0)
    pinned = "pinned" if offload["pinned"] else f"pageable: {offload['unpinned']}"
    if disk:
        found.append(("experts on disk", f"{offload['streamed_modules']} modules, {_gib(disk)}"))
        found.append(("read ahead into host memory", f"{_gib(offload['host_bytes'])}, {pinned}"))
    elif offload["streamed_modules"]:
        modules = f"{offload['streamed_modules']} modules, {_gib(offload['host_bytes'])}"
        found.append(("experts in host memory", f"{modules}, {pinned}"))
    if offload["buffers"]:
        found.append(("buffers", f"{offload['buffers']}, {_gib(offload['buffer_bytes'])} together"))
    training = offload.get("training")
    if training and training["steps"]:
        found.append(("copied", f"{_gib(training['copied_bytes_per_step'])} a step"))
        found.append(("computing waited for copies", _waited(training)))
    return found


def warning(offload: Mapping[str, Any] | None) -> str:
    """What slows a run on a GPU down without changing it; empty where nothing does."""
    if not offload or offload["pinned"] or not any("cuda" in str(d) for d in offload["devices"]):
        return ""
    return (
        f"Host memory of experts could not be pinned ({offload['unpinned']}): each copy holds up the host. "
        "The numbers are the same. Raise the limit of locked memory (`ulimit -l unlimited`); "
        "`experts_pin_memory: true` refuses to run like that."
    )


def _waited(training: Mapping[str, Any]) -> str:
    waited = training["waited_seconds"]
    if waited is None:
        return "not measured (a CPU copies and computes in turn)"
    each = f"{1e3 * waited / training['steps']:,.1f} ms a step"
    share = training.get("waited_share")
    return each if share is None else f"{each}, {share:.1%} of training"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
