"""What the layer benchmark's records say: ratios, targets met and missed, a plot.

Everything is computed within one invocation: of each pair of shape and tokens the latest one in which the
baseline ran, else the latest one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
BASELINE, STARTING_SYSTEM, DEFAULT = "bf16", "parametrization", "fourfold-nf4:default"
PEERS = ("grouped-nf4-gemm", "scattermoe")  # names begin with one of these
ELSEWHERE = "loading and reloading: benchmarks/load.py; a whole step: benchmarks/step.py"

Record = dict[str, Any]
Cells = dict[tuple[str, int], dict[str, Record]]


@dataclass(frozen=True)
class Target:
    """One measured value against its bound; ``met`` is None where there is nothing to compare with."""

    what: str
    shape: str
    tokens: int
    variant: str
    value: float | None
    bound: float
    unit: str
    met: bool | None
    note: str = ""


def cells(records: list[Record]) -> Cells:
    """Records by variant, of each pair of shape and tokens, from one invocation each."""
    found: Cells = {}
    for record in records:
        key = record["shape"], record["tokens"]
        if record["variant"] == BASELINE and (record["status"] == "ok" or not _ran(found.get(key, {}))):
            found[key] = {r["variant"]: r for r in records if _place(r) == (*key, record["invocation"])}
    return found


def _ran(cell: dict[str, Record], variant: str = BASELINE) -> bool:
    return cell.get(variant, {}).get("status") == "ok"


def _place(record: Record) -> tuple[str, int, str]:
    return record["shape"], record["tokens"], record["invocation"]


def ratio(cell: dict[str, Record], ours: str, other: str, key: str) -> float | None:
    """``ours / other``, None where either was not measured."""
    if not (_ran(cell, ours) and _ran(cell, other)):
        return None
    return cell[ours][key] / cell[other][key]


def _cell_targets(cell: dict[str, Record], tokens: int, ours: str) -> Iterator[tuple[Any, ...]]:
    """(what, value, bound, unit, note) for one of our variants; a target on a peer names it."""

    def against(other: str, key: str) -> float | None:
        return ratio(cell, ours, other, key)

    step, forward = "step_ms", "forward_ms"
    if tokens >= 2048:
        yield "gate: fwd faster than bf16", against(BASELINE, forward), 1.0, "x", ""
        yield "gate: fwd+bwd faster than bf16", against(BASELINE, step), 1.0, "x", ""
    if tokens == 8192:
        yield "fwd+bwd against bf16", against(BASELINE, step), 0.50, "x", "then 0.35"
    if tokens == 2048:
        yield "fwd+bwd against bf16", against(BASELINE, step), 0.80, "x", "then 0.6"
    if tokens <= 64:
        yield "fwd against bf16 (decode)", against(BASELINE, forward), 0.60, "x", ""
    for name, key in (("fwd", forward), ("fwd+bwd", step)):
        yield f"{name} against the starting system", against(STARTING_SYSTEM, key), 0.45, "x", ""
    for peer in (name for name in cell if name.startswith(PEERS)):
        status = cell[peer]["status"]
        note = "" if status == "ok" else status
        for name, key in (("fwd", forward), ("fwd+bwd", step)):
            yield f"{name} against {peer}", against(peer, key), 1.0, "x", note
    mine = cell[ours]
    yield "peak beyond bf16's", _extra_peak(cell, ours), 64, "MiB", "then 0"
    yield "host synchronisations", mine["synchronisations"], 0, "", ""
    if any(name.startswith("step_graph") for name in mine):
        failed = 0 if "step_graph_ms" in mine else 1
        yield "fwd+bwd not captured in a CUDA graph", failed, 0, "", mine.get("step_graph", "")
    # Two decimals: the same computation in another order differs in the third.
    errors = mine["error_ratio"]
    outputs = ("output", "forward")  # with and without gradients
    error = max(errors[name] for name in outputs)
    yield "error of the output, against bf16's", round(error, 2), 1.0, "x", ""
    worst = max((name for name in errors if name not in outputs), key=lambda name: errors[name])
    yield "error of the worst gradient, against bf16's", round(errors[worst], 2), 1.0, "x", worst


def targets(records: list[Record]) -> list[Target]:
    """Every target of every variant of Fourfold on packed weights, by shape and tokens.

    "Faster" is strict, every other bound may be reached.
    """
    found: list[Target] = []
    for (shape, tokens), cell in cells(records).items():
        for ours in (name for name in cell if name.startswith("fourfold-")):
            if cell[ours]["status"] != "ok":
                status = cell[ours]["status"]
                found.append(Target("computes", shape, tokens, ours, None, 0, "", False, status))
                continue
            for what, value, bound, unit, note in _cell_targets(cell, tokens, ours):
                faster = bound == 1.0 and "error" not in what
                met = None if value is None else value < bound if faster else value <= bound
                found.append(Target(what, shape, tokens, ours, value, bound, unit, met, note))
    return found


def _number(value: float, unit: str) -> str:
    return f"{value:.2f} x" if unit == "x" else f"{value:.0f} {unit}".strip()


def target_table(found: list[Target], variant: str = DEFAULT) -> str:
    """Markdown: each target of one variant, and how many every other one meets."""
    lines = [
        f"`{variant}`:",
        "",
        "| shape | tokens | target | bound | measured | |",
        "|---|---:|---|---:|---:|---|",
    ]
    for t in (t for t in found if t.variant == variant):
        word = {True: "met", False: "MISSED", None: "not measured"}[t.met]
        value = "" if t.value is None else _number(t.value, t.unit)
        tail = f"{word} ({t.note})" if t.note else word
        lines.append(
            f"| {t.shape} | {t.tokens:,} | {t.what} | {_number(t.bound, t.unit)} | {value} | {tail} |"
        )
    lines += ["", f"Not of a layer: {ELSEWHERE}.", "", "| variant | met | missed |", "|---|---:|---:|"]
    for name in dict.fromkeys(t.variant for t in found):
        mine = [t.met for t in found if t.variant == name]
        lines.append(f"| {name} | {mine.count(True)} | {mine.count(False)} |")
    return "\n".join(lines)


def table(records: list[Record]) -> str:
    """Markdown: every variant measured, with its ratio to the baseline of the same invocation."""
    lines = [
        "| shape | tokens | variant | fwd ms | x bf16 | fwd+bwd ms | x bf16 | peak MiB | syncs | error | "
        "x bf16's |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (shape, tokens), cell in cells(records).items():
        for name, r in cell.items():
            head = f"| {shape} | {tokens:,} | {name} |"
            if r["status"] != "ok":
                lines.append(f"{head} {r['status']} | | | | | | | |")
                continue
            times = []
            for key in ("forward_ms", "step_ms"):
                relative = ratio(cell, name, BASELINE, key)
                times.append(f"{r[key]:.3f} | {'' if relative is None else f'{relative:.2f}'}")
            lines.append(
                f"{head} {' | '.join(times)} | {r['step_peak_bytes'] / MIB:,.0f} | {r['synchronisations']} | "
                f"{r['error']['output']:.1e} | {r['error_ratio']['output']:.2f} |"
            )
    return "\n".join(lines)


def as_json(found: list[Target]) -> list[dict[str, Any]]:
    return [asdict(t) for t in found]


def plot(records: list[Record], path: Path) -> bool:
    """Time of a step relative to bf16 and peak beyond bf16's, by tokens; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = cells(records)
    shapes = list(dict.fromkeys(shape for shape, _ in found))
    if not shapes:
        return False
    panels = (
        ("fwd, times bf16", lambda c, n: ratio(c, n, BASELINE, "forward_ms")),
        ("fwd+bwd, times bf16", lambda c, n: ratio(c, n, BASELINE, "step_ms")),
        ("peak beyond bf16's, MiB", _extra_peak),
    )
    figure, axes = pyplot.subplots(
        len(shapes), len(panels), figsize=(15, 4 * len(shapes)), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(n for c in found.values() for n in c if _ran(c, n)))
    colours = pyplot.get_cmap("tab20")
    for row, shape in zip(axes, shapes, strict=True):
        here = {tokens: cell for (s, tokens), cell in sorted(found.items()) if s == shape}
        for axis, (title, value) in zip(row, panels, strict=True):
            for number, name in enumerate(names):
                points = [(t, value(c, name)) for t, c in here.items() if name in c]
                points = [(t, v) for t, v in points if v is not None]
                style = "-o" if "fourfold" in name else "--." if name == BASELINE else ":."
                axis.plot(*zip(*points, strict=True) if points else ([], []), style, label=name,
                          color=colours(number % 20), markersize=4)  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_xlabel("tokens")
            axis.set_title(f"{shape}: {title}", fontsize=10)
            if "times" in title:
                axis.set_yscale("log", base=2)
            else:
                axis.set_yscale("symlog", linthresh=64)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _extra_peak(cell: dict[str, Record], name: str) -> float | None:
    if not (_ran(cell, name) and _ran(cell)):
        return None
    return (cell[name]["step_peak_bytes"] - cell[BASELINE]["step_peak_bytes"]) / MIB
