"""What a run writes down while it goes: a row of figures at each logging step, gradients by projection, the
load of each expert; and the report that a run leaves, also one that broke on the way.

Nothing here waits for the device at a step that is not logged: experts are counted where they are, and read
once at each checkpoint, where all of it is kept (`KEPT`), and at the end: the report of a run that was
resumed is of the whole run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from fourfold.errors import FourfoldError
from fourfold.experts import find_experts
from fourfold.training import collective
from fourfold.training.callbacks import Curve, peak_memory
from fourfold.training.report_page import write_page
from fourfold.training.schema import TrainConfig
from fourfold.training.strict_json import dumps

REPORT, PAGE = "report.json", "report.html"
# In a checkpoint. Of a long run it holds fewer rows, evenly: a few hundred bytes each.
KEPT, MOST_ROWS = "journal.json", 2000
PACKAGES = (
    "fourfold",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "triton",
    "safetensors",
    "tokenizers",
)


def memory_now() -> int:
    """Bytes held at this moment: on the GPU by torch, without one by the whole process."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()


def versions() -> dict[str, str]:
    """Of what the run was made with."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


class ExpertLoad:
    """How many tokens each expert of each layer got in training, counted on the device.

    A forward that backward repeats (checkpointing) counts once; padding counts as the tokens that it is.
    """

    def __init__(self, model: nn.Module, earlier: Mapping[str, list[int]] | None = None) -> None:
        self.counts: dict[str, torch.Tensor] = {}
        self.earlier = dict(earlier or {})
        self._hooks = []
        for found in find_experts(model):
            if found.layout is not None and found.layout.num_experts:
                hook = self._hook(found.name, found.layout.num_experts)
                self._hooks.append(found.module.register_forward_pre_hook(hook, with_kwargs=True))

    def _hook(self, name: str, experts: int) -> Any:
        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not module.training or torch._C._current_graph_task_id() != -1:
                return
            index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            if not isinstance(index, torch.Tensor) or index.dtype not in (torch.int64, torch.int32):
                return
            if name not in self.counts:
                # (one more place, for what a model may send to no expert)
                begun = [*self.earlier.get(name, [0] * experts), 0]
                self.counts[name] = torch.tensor(begun, dtype=torch.int64, device=index.device)
            flat = index.detach().reshape(-1).long().clamp(0, experts)
            self.counts[name].scatter_add_(0, flat, torch.ones_like(flat))

        return count

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def to_dict(self) -> list[dict[str, Any]]:
        """Name and counts of each layer."""
        counted = {name: counts[:-1].tolist() for name, counts in self.counts.items()}
        return [{"name": name, "tokens": tokens} for name, tokens in {**self.earlier, **counted}.items()]


def projection_kinds(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by what they adapt: q_proj, ..., gate_up_proj, down_proj; other ones by module."""
    kinds: dict[str, list[nn.Parameter]] = {}
    taken: set[int] = set()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        kind = getattr(module, "parameter_name", None) or name.rpartition(".")[2]
        for factors in (module.lora_A, getattr(module, "lora_B", {})):
            for factor in factors.values() if hasattr(factors, "values") else ():
                for parameter in factor.parameters():
                    if parameter.requires_grad and id(parameter) not in taken:
                        taken.add(id(parameter))
                        kinds.setdefault(str(kind), []).append(parameter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            kinds.setdefault(name.split(".")[-2] if "." in name else name, []).append(parameter)
    return kinds


class Journal(TrainerCallback):
    """The figures of a run, and its report.

    Attributes:
        rows: one for each logging step: step, seconds of training, loss, learning_rate, grad_norm,
            tokens_per_second since the last one, memory_bytes, peak_memory_bytes.
        gradient_norms: of each kind of projection, (step, norm before clipping) at each logging step.
        facts: what else is known of the run so far.
        doing: what it was doing last.
        resumed_at: the steps at which it went on from a checkpoint.
        counted_from: the step that rows and experts are counted from: 0, or that of a checkpoint without any.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.gradient_norms: dict[str, list[tuple[int, float]]] = {}
        self.facts: dict[str, Any] = {}
        self.doing = ""
        self.curve = Curve()
        self.started = time.time()
        self.load: ExpertLoad | None = None
        self.resumed_at: list[int] = []
        self.counted_from = 0
        self._earlier: dict[str, Any] = {}
        self._kinds: dict[str, list[nn.Parameter]] = {}
        self._norms: dict[str, float] = {}
        self._before = (0.0, 0)
        self._steps = (0, 0)
        self._begun = False

    def begin(self, config: TrainConfig) -> None:
        """The checks have passed: from here on a run that breaks leaves a report."""
        self.facts |= {"config": config.model_dump(), "adapter": config.output_dir}
        self._begun = True

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin to count experts."""
        model = kwargs["model"]
        self._kinds = projection_kinds(model)
        self.load = ExpertLoad(model, self._earlier.get("experts"))
        self._steps = (state.global_step, state.max_steps)

    def keep(self, folder: Path) -> None:
        """Write all of it into a checkpoint."""

        def few(rows: list[Any]) -> list[Any]:
            every = -(-len(rows) // MOST_ROWS)
            return rows[-1::-every][::-1] if rows else rows  # (the last one always)

        seconds, tokens = self._whole()
        kept = {
            "started": self.started,
            "resumed_at": self.resumed_at,
            "counted_from": self.counted_from,
            "rows": few(self.rows),
            "gradient_norms": {kind: few(points) for kind, points in self.gradient_norms.items()},
            "experts": {entry["name"]: entry["tokens"] for entry in self._experts()},
            "training_seconds": seconds,
            "tokens": tokens,
            "peak_memory_bytes": self._peak(),
        }
        (folder / KEPT).write_text(dumps(kept) + "\n", encoding="utf-8")

    def go_on_from(self, folder: Path, step: int) -> None:
        """Take over what a checkpoint holds; where it holds none, all is counted from its step on."""
        try:
            kept = json.loads((folder / KEPT).read_text(encoding="utf-8"))
            self.rows = list(kept["rows"])
            self.gradient_norms = {kind: [*map(tuple, p)] for kind, p in kept["gradient_norms"].items()}
            self.started, self.counted_from = float(kept["started"]), int(kept["counted_from"])
            self.resumed_at = [*kept["resumed_at"], step]
            self._earlier = kept
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.rows, self.gradient_norms, self._earlier = [], {}, {}
            self.resumed_at, self.counted_from = [step], step

    def _whole(self) -> tuple[float, int]:
        """Seconds and tokens of the run, those before it was resumed included."""
        earlier = self._earlier
        seconds = self.curve.training_seconds + float(earlier.get("training_seconds", 0.0))
        return seconds, self.curve.tokens + int(earlier.get("tokens", 0))

    def _peak(self) -> int:
        return max(peak_memory(), int(self._earlier.get("peak_memory_bytes", 0)))

    def _experts(self) -> list[dict[str, Any]]:
        with contextlib.suppress(RuntimeError):  # (a device that failed gives nothing back)
            if self.load is not None:
                return self.load.to_dict()
        return [{"name": name, "tokens": t} for name, t in self._earlier.get("experts", {}).items()]

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Norms of gradients by kind, where this step will be logged; one transfer from the device."""
        step = state.global_step + 1
        if step % max(1, int(args.logging_steps)) and not (args.logging_first_step and step == 1):
            return
        norms = {
            kind: torch.stack(
                [collective.here(p.grad).float().norm() for p in parameters if p.grad is not None]
            ).norm()
            for kind, parameters in self._kinds.items()
            if any(p.grad is not None for p in parameters)
        }
        if norms:
            values = torch.stack([norm.cpu() if norm.is_cpu else norm for norm in norms.values()]).tolist()
            if collective.is_sharded(kwargs["model"]):  # (each process has seen its own shards)
                squares = collective.sum_of([v * v for v in values], collective.device_of(kwargs["model"]))
                values = [square**0.5 for square in squares]
            self._norms = dict(zip(norms, values, strict=True))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note how far it is."""
        self._steps = (state.global_step, state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A row of figures."""
        if not logs or "loss" not in logs:
            return
        curve, step = self.curve, state.global_step
        seconds, tokens = curve.training_seconds - self._before[0], curve.tokens - self._before[1]
        self._before = (curve.training_seconds, curve.tokens)
        norm, held = logs.get("grad_norm"), memory_now()
        self.rows.append(
            {
                "step": step,
                "seconds": round(self._whole()[0], 3),
                "loss": float(logs["loss"]),
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": None if norm is None else float(norm),
                "tokens_per_second": tokens / seconds if seconds > 0 else None,
                "memory_bytes": held,
                "peak_memory_bytes": max(held, self._peak()),  # (the system counts pages a little late)
            }
        )
        # The trainer has clipped before the norms were taken; it says what the whole was.
        whole = sum(value**2 for value in self._norms.values()) ** 0.5
        clipped = norm is not None and args.max_grad_norm and float(norm) > args.max_grad_norm and whole
        scale = float(norm) / whole if clipped else 1.0
        for kind, value in self._norms.items():
            self.gradient_norms.setdefault(kind, []).append((step, value * scale))
        self._norms = {}

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop counting experts."""
        if self.load is not None:
            self.load.close()

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds of it."""
        seconds, tokens = self._whole()
        return {
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.started)),
            "resumed_at": self.resumed_at,
            "counted_from_step": self.counted_from,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "training_seconds": seconds,
            "peak_memory_bytes": self._peak(),
            "series": self.rows,
            "gradient_norms": self.gradient_norms,
            "expert_load": self._experts(),
            "versions": versions(),
        }

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Leave a report of a run that breaks: what happened, and where it was."""
        try:
            yield
        except BaseException as error:
            if self._begun and os.environ.get("RANK", "0") == "0":
                # (whatever goes wrong now must not hide what went wrong before)
                with contextlib.suppress(Exception):
                    self._write_failure(error)
            raise

    def _write_failure(self, error: BaseException) -> None:
        if self.load is not None:
            self.load.close()
        step, steps = self._steps
        message = str(error).strip() or type(error).__name__
        if not isinstance(error, FourfoldError):
            message = message.splitlines()[0]
        failure = {
            "type": type(error).__name__,
            "message": message,
            "doing": self.doing,
            "step": step,
            "max_steps": steps,
        }
        curve = {"train": self.curve.train, "held_out": self.curve.held_out}
        report = {
            "status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
            "failure": failure,
            **self.facts,
            "steps": step,
            "loss_curve": curve,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **self.to_dict(),
        }
        write_reports(report, Path(self.facts["adapter"]))


# What a report says of the training itself, which a run that had ended already does not do again.
_OF_TRAINING = (
    "started",
    "resumed_at",
    "counted_from_step",
    "series",
    "gradient_norms",
    "expert_load",
    "tokens_per_second",
    "training_seconds",
    "peak_memory_bytes",
)


def figures_left(folder: Path) -> dict[str, Any]:
    """What the report in ``folder`` says of the training that ended there; empty without one."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(report, dict) or not report.get("series"):
        return {}
    return {key: report[key] for key in _OF_TRAINING if key in report}


def write_reports(report: dict[str, Any], folder: Path) -> None:
    """report.json, and the same to look at: report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(dumps(report, indent=2) + "\n", encoding="utf-8")
    write_page(report, folder / PAGE)
