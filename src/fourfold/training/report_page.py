"""report.html: what report.json holds, on one page without scripts and without network, light and dark.

Everything that comes from a model, from data or from a configuration is text: it is escaped where it enters
the page, in `_text` and in the charts, and nowhere else.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourfold.planning.units import format_bytes
from fourfold.training import offload_watch
from fourfold.training.report_charts import LEVELS, Line, cells, line_chart, number
from fourfold.training.report_style import STYLE

Report = Mapping[str, Any]
MOST_LAYERS = 200


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The page of a report, complete or of a run that broke."""
    config = report.get("config") or {}
    model = str(config.get("base_model", "a model"))
    sections = [
        _failure(report),
        _tiles(report),
        _section("Training", _charts(report), "charts"),
        _section("Expert load", _load(report)),
        _section("Samples", _samples(report)),
        _section("What was packed", _packed(report)),
        _section("Where experts lay", _offload(report)),
        _section("Adapters and data", _adapters(report)),
        _section("Where the time went", _seconds(report)),
        _section("Configuration", _config(config)),
        _section("Versions", _table([("", ""), *sorted((report.get("versions") or {}).items())])),
    ]
    status = str(report.get("status", "done"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(_short(model))} · fourfold train</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="over">fourfold train · {_text(report.get("started", ""))}</p>'
        f"<h1>{_text(_short(model))}</h1>"
        f'<p><span class="badge {"ok" if status == "done" else "bad"}">{_text(status)}</span> '
        f"<code>{_text(report.get('adapter', ''))}</code></p>{_resumed(report)}</header>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    """Anything as text of the page."""
    return html.escape(str(value))


def _short(name: str) -> str:
    """A folder's last two parts; a model's id as it is."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{_text(title)}</h2>{body}</section>' if body else ""


def _table(rows: Sequence[Sequence[Any]], right: int | None = None) -> str:
    """A table; the first row is its head (empty cells: none), columns from ``right`` on are numbers."""
    if len(rows) < 2:
        return ""

    def cell(tag: str, index: int, value: Any) -> str:
        number_of = ' class="n"' if right is not None and index >= right else ""
        return f"<{tag}{number_of}>{_text(value)}</{tag}>"

    body = ["".join(cell("td", i, v) for i, v in enumerate(row)) for row in rows[1:]]
    head = "".join(cell("th", i, v) for i, v in enumerate(rows[0]))
    top = f"<thead><tr>{head}</tr></thead>" if any(rows[0]) else ""
    rest = "".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="wide"><table>{top}<tbody>{rest}</tbody></table></div>'


def _failure(report: Report) -> str:
    failure = report.get("failure")
    if not failure:
        return ""
    where = f"while {failure['doing'].rstrip(' .')}" if failure.get("doing") else ""
    if failure.get("max_steps"):
        where += f", after step {failure['step']} of {failure['max_steps']}"
    return (
        f'<section class="failure"><h2>{_text(failure["type"])}</h2><p>{_text(failure["message"])}</p>'
        f"<p>{_text(where.lstrip(', ').capitalize())}</p></section>"
    )


def _resumed(report: Report) -> str:
    """Where the run went on from checkpoints, and from which step on its figures count."""
    steps = report.get("resumed_at") or []
    if not steps:
        return ""
    text = f"Resumed at step {', '.join(str(step) for step in steps)}; "
    first = report.get("counted_from_step")
    text += (
        "the checkpoint kept no figures: speed, memory, gradients and expert load count from step "
        f"{first} on."
        if first
        else "all figures are of the whole run."
    )
    return f'<p class="over">{_text(text)}</p>'


def _tiles(report: Report) -> str:
    train = (report.get("loss_curve") or {}).get("train") or []
    held_out = report.get("held_out_loss")
    tiles: list[tuple[str, str, str]] = [("steps", f"{report.get('steps', 0):,}", "")]
    if train:
        tiles.append(("last training loss", f"{train[-1][1]:.3f}", f"first {train[0][1]:.3f}"))
    if held_out:
        before, after = held_out["before"]["mean"], held_out["after"]["mean"]
        fell = held_out["improvement"]
        error = fell.get("standard_error")
        tiles.append(
            (
                "held-out loss",
                f"{after:.3f}",
                f"before {before:.3f}"
                + ("" if error is None else f", fell by {fell['mean']:.3f} ± {error:.3f}"),
            )
        )
    if report.get("tokens_per_second"):
        tiles.append(("speed", f"{report['tokens_per_second']:,.0f}", "tokens a second"))
    if report.get("peak_memory_bytes"):
        where = "resident set" if report.get("device") == "cpu" else "of the GPU"
        tiles.append(("peak memory", format_bytes(report["peak_memory_bytes"]), where))
    lora = report.get("lora") or {}
    if lora.get("trainable_parameters"):
        tiles.append(("trained", f"{lora['trainable_parameters']:,}", "parameters"))
    if report.get("device"):
        tiles.append(("device", str(report["device"]), "bf16" if report.get("bf16") else ""))
    cards = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd><small>{_text(more)}</small></div>"
        for name, value, more in tiles
    )
    return f'<dl class="tiles">{cards}</dl>'


def _charts(report: Report) -> str:
    curve = report.get("loss_curve") or {}
    series = report.get("series") or []

    def column(name: str) -> list[tuple[float, float | None]]:
        return [(row["step"], row.get(name)) for row in series]

    norms = report.get("gradient_norms") or {}
    memory = [
        Line("held", column("memory_bytes"), 0),
        Line("most so far", column("peak_memory_bytes"), 1),
    ]
    charts = [
        line_chart(
            "Loss, nats a token",
            [
                Line("training", curve.get("train") or [], 0),
                Line("held out", curve.get("held_out") or [], 1, dots=True),
            ],
        ),
        line_chart("Learning rate", [Line("", column("learning_rate"), 2)]),
        line_chart("Tokens a second", [Line("", column("tokens_per_second"), 3)]),
        line_chart("Memory", memory, format_bytes),
        line_chart(
            "Gradient norm before clipping, by projection",
            [Line(kind, points, i % 8) for i, (kind, points) in enumerate(norms.items())],
        ),
        line_chart("Gradient norm before clipping", [Line("", column("grad_norm"), 4)]),
    ]
    return "".join(charts)


def _load(report: Report) -> str:
    layers = [layer for layer in report.get("expert_load") or [] if sum(layer["tokens"])]
    if not layers:
        return ""
    rows = [(_layer_name(layer["name"]), layer["tokens"]) for layer in layers[:MOST_LAYERS]]
    unused = sum(count == 0 for _, counts in rows for count in counts)
    worst = max((max(counts) * len(counts) / sum(counts), name) for name, counts in rows)
    experts = sum(len(counts) for _, counts in rows)
    text = (
        f"{sum(rows[0][1]):,} routed rows in each layer. The busiest expert has {worst[0]:.1f} times its "
        f"layer's mean ({worst[1]}); {unused:,} of {experts:,} experts got none."
    )
    scale = "".join(f'<i class="h{i}"></i>' for i in range(LEVELS))
    key = f'<p class="scale">none {scale} four times the mean or more</p>'
    return f"<p>{_text(text)}</p>{cells(rows)}{key}"


def _layer_name(name: str) -> str:
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    return f"layer {numbers[0]}" if numbers else name


def _samples(report: Report) -> str:
    sample = report.get("sample")
    if not sample:
        return ""
    names = {
        "prompt": "question",
        "before": "before training",
        "after": "after training",
        "reference": "in the data",
    }
    return "".join(
        f"<article><h3>{_text(title)}</h3><pre>{_text(sample[name]) or '<i>nothing</i>'}</pre></article>"
        for name, title in names.items()
        if name in sample
    )


def _packed(report: Report) -> str:
    packed = report.get("model")
    if not packed:
        return ""
    rows: list[Sequence[Any]] = [("role", "held as", "parameters", "before", "bytes")]
    for row in packed["rows"]:
        rows.append(_packed_row(row["role"], row["dtype"], row))
    rows.append(_packed_row("all", "", packed))
    kinds: dict[tuple[str, str], int] = {}
    for entry in packed.get("experts") or []:
        key = (entry["kind"], entry["format"])
        kinds[key] = kinds.get(key, 0) + 1
    experts = "; ".join(
        f"{count} experts modules, {kind}, in {form}" for (kind, form), count in kinds.items()
    )
    return _table(rows, right=2) + (f"<p>{_text(experts)}</p>" if experts else "")


def _packed_row(role: str, held_as: str, row: Mapping[str, Any]) -> Sequence[Any]:
    before, after = format_bytes(row["bytes_before"]), format_bytes(row["bytes"])
    return (role, held_as, f"{row['logical_params']:,}", before, after)


def _offload(report: Report) -> str:
    offload = report.get("offload")
    said = offload_watch.warning(offload)
    return (f"<p>{_text(said)}</p>" if said else "") + _table([("", ""), *offload_watch.rows(offload)])


def _adapters(report: Report) -> str:
    lora, rows = report.get("lora") or {}, []
    if lora:
        modules = lora.get("target_modules") or []
        names = [modules] if isinstance(modules, str) else [*modules]
        rows.append(("targets", ", ".join([*names, *(lora.get("target_parameters") or [])])))
        rows.append(
            ("parameters", f"{lora.get('trainable_parameters', 0):,} {', '.join(lora.get('dtypes', []))}")
        )
    for name, counts in (report.get("data") or {}).items():
        if counts:
            said = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in _counts(counts))
            rows.append((f"{name.replace('_', '-')} data", said))
    return _table([("", ""), *rows])


def _counts(counts: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    return ((key, value) for key, value in counts.items() if isinstance(value, int) and value)


def _seconds(report: Report) -> str:
    seconds = report.get("seconds") or {}
    rows = [(name, f"{value:,.1f} s") for name, value in seconds.items()]
    return _table([("", ""), *rows], right=1)


def _config(config: Mapping[str, Any]) -> str:
    rows = [(key, _value(value)) for key, value in config.items() if value not in (None, [], {}, "")]
    table = _table([("", ""), *rows])
    return (
        f"<details><summary>{len(rows)} keys, defaults filled in</summary>{table}</details>" if rows else ""
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return number(value) if isinstance(value, float) else str(value)
