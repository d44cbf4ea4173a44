"""What a run leaves behind: the result with its report.json, the table on the terminal, the loss curve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourfold.planning.units import format_bytes
from fourfold.training import offload_watch
from fourfold.training.callbacks import Curve
from fourfold.training.evaluate import AnswerLosses, Improvement


@dataclass
class RunResult:
    """Everything a run has to say.

    Attributes:
        config: the settings, defaults filled in.
        adapter: the folder with adapter and tokenizer.
        packed: the report of the base model as loaded (see ``fourfold.planning.report.Report``).
        adapters: targets, number and dtype of the trainable parameters, and what `loftq_init` did.
        data: counts of examples and tokens, and how many were cut or dropped.
        steps: optimizer steps in all, those before a resumption included.
        before: loss on held-out answers before training (of the base model, with the adapter that
            ``lora_model_dir`` names).
        after: the same after it.
        improvement: the paired difference of the two.
        curve: losses along the run and its speed.
        device: the GPU's name, or "cpu".
        unused_gpus: how many other GPUs are visible; a run uses one.
        bf16: whether it computed in bf16.
        sample: one prompt, the data's answer, the model's before and after.
        seconds: where the time went.
        journal: figures along the run (``fourfold.training.journal.Journal.to_dict``).
        merged: the folder with base and adapter merged (``merge_lora``).
        uploaded: where the adapter lies on the hub (``hub_model_id``).
        offload: where experts lay (``fourfold.OffloadReport.to_dict``), and in "training" what steps copied
            and how long they waited; None for where the model computed.
    """

    config: dict[str, Any]
    adapter: str
    packed: dict[str, Any]
    adapters: dict[str, Any]
    data: dict[str, Any]
    steps: int
    before: AnswerLosses | None
    after: AnswerLosses | None
    improvement: Improvement | None
    curve: Curve
    device: str
    unused_gpus: int
    bf16: bool
    sample: dict[str, str]
    seconds: dict[str, float]
    journal: dict[str, Any]
    offload: dict[str, Any] | None = None
    merged: str | None = None
    uploaded: str | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """GPU memory, or the process's resident set on a CPU."""
        return int(self.journal["peak_memory_bytes"])

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds."""
        held_out = None
        if self.before is not None and self.after is not None and self.improvement is not None:
            held_out = {
                "before": self.before.to_dict(),
                "after": self.after.to_dict(),
                "improvement": self.improvement.to_dict(),
            }
        return {
            "status": "done",
            "adapter": self.adapter,
            "config": self.config,
            "model": self.packed,
            "lora": self.adapters,
            "data": self.data,
            "steps": self.steps,
            "held_out_loss": held_out,
            "loss_curve": {"train": self.curve.train, "held_out": self.curve.held_out},
            "device": self.device,
            "unused_gpus": self.unused_gpus,
            "bf16": self.bf16,
            "offload": self.offload,
            "merged": self.merged,
            "uploaded": self.uploaded,
            "sample": self.sample,
            "seconds": self.seconds,
            **self.journal,
        }


def write_loss_curve(result: RunResult, path: Path) -> None:
    """The loss against the step, as a PNG: training (each logged step) and held-out (each evaluation)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    FigureCanvasAgg(figure)  # no display, and pyplot's global state is left alone
    axes = figure.subplots()
    if result.curve.train:
        axes.plot(*zip(*result.curve.train, strict=True), color="tab:blue", alpha=0.7, label="training batch")
    if result.curve.held_out:
        axes.plot(
            *zip(*result.curve.held_out, strict=True), "o-", color="tab:orange", label="held-out answers"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss on answers, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def show(result: RunResult, console: Console) -> None:
    """The final tables."""
    console.print()
    console.print(packed_table(result.packed))
    table = Table(title="run", title_justify="left", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(result):
        table.add_row(name, Text(value))  # an answer's square brackets are no markup
    console.print(table)


def packed_table(report: dict[str, Any]) -> Table:
    """What was packed: bytes by role, before (in the model's own dtype) and after."""
    table = Table(title="base model", title_justify="left", show_footer=True)
    table.add_column("role", footer="all")
    table.add_column("stored as", footer="")
    table.add_column("parameters", justify="right", footer=f"{report['logical_params']:,}")
    table.add_column("before", justify="right", footer=format_bytes(report["bytes_before"]))
    table.add_column("packed", justify="right", footer=format_bytes(report["bytes"]))
    for row in report["rows"]:
        table.add_row(
            row["role"],
            str(row["dtype"]).removeprefix("torch."),
            f"{row['logical_params']:,}",
            format_bytes(row["bytes_before"]),
            format_bytes(row["bytes"]),
        )
    return table


def _facts(result: RunResult) -> list[tuple[str, str]]:
    figures = result.journal
    where = "GPU memory" if result.device != "cpu" else "resident set"
    facts = [
        (
            "trained",
            f"{result.adapters['trainable_parameters']:,} parameters in "
            f"{', '.join(result.adapters['dtypes'])}",
        ),
        ("targets", ", ".join(_targets(result.adapters))),
        ("data", _data_fact(result.data)),
        ("steps", f"{result.steps} ({figures['training_seconds']:.0f} s{_resumed(figures)})"),
        ("speed", f"{figures['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", f"{format_bytes(result.peak_memory_bytes)} ({where})"),
    ]
    facts += offload_watch.rows(result.offload)
    if result.unused_gpus:
        facts.append(("device", f"{result.device}; {result.unused_gpus} more visible, a run uses one"))
    if result.before is not None and result.after is not None and result.improvement is not None:
        fell = result.improvement
        facts += [
            ("held-out before", f"{result.before.mean:.3f} ± {result.before.standard_error:.3f} nats/token"),
            ("held-out after", f"{result.after.mean:.3f} ± {result.after.standard_error:.3f} nats/token"),
            (
                "it fell by",
                f"{fell.mean:.3f} ± {fell.standard_error:.3f} ({len(result.before.tokens)} answers, paired)",
            ),
        ]
    return [
        *facts,
        ("question", result.sample["prompt"]),
        ("answer before", result.sample["before"]),
        ("answer after", result.sample["after"]),
        ("in the data", result.sample["reference"]),
        ("adapter", result.adapter),
        *([("merged", result.merged)] if result.merged is not None else []),
        *([("uploaded to", result.uploaded)] if result.uploaded is not None else []),
        ("loss curve", str(Path(result.adapter) / "loss.png")),
        ("report", str(Path(result.adapter) / "report.html")),
        ("all of this", str(Path(result.adapter) / "report.json")),
    ]


def _resumed(figures: dict[str, Any]) -> str:
    """Where a run went on from checkpoints, and what its figures leave out."""
    if not figures.get("resumed_at"):
        return ""
    said = f"; resumed at step {', '.join(str(step) for step in figures['resumed_at'])}"
    if figures.get("counted_from_step"):
        said += f", time and speed from step {figures['counted_from_step']} on"
    return said


def _data_fact(data: dict[str, Any]) -> str:
    parts = []
    for name, counts in data.items():
        if counts is None:
            continue
        text = f"{counts['examples']} examples, {counts['tokens']:,} tokens"
        text += f" ({counts['trained_tokens']:,} of answers)"
        if counts["truncated"]:
            text += f", {counts['truncated']} cut to sequence_len"
        if counts["dropped"]:
            text += f"; {counts['dropped']} longer ones dropped"
        parts.append(f"{name.replace('_', '-')}: {text}")
    return "\n".join(parts)


def _targets(adapters: dict[str, Any]) -> list[str]:
    modules = adapters["target_modules"]
    return [*([modules] if isinstance(modules, str) else modules), *adapters["target_parameters"]]
