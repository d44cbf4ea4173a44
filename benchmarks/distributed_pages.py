"""The tables of docs/distributed.md, out of the results that are committed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distributed_report import table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "distributed.md"
RESULTS = ROOT / "benchmarks" / "results"


def equality(record: dict[str, Any]) -> str:
    """How far from one process training ends, a row for each case."""
    lines = [
        "| engine | experts of | format | besides | losses apart | adapters apart | adapters moved |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for row in record["rows"]:
        besides = ", ".join(f"{name} {value}" for name, value in row["how"].items())
        lines.append(
            _row({"fsdp": "FSDP2", "ddp": "DDP"}[row["engine"]], row["model"], row["format"], besides, row)
        )
    if every := record["every_way"]:
        besides = (
            f"{every['combinations']} combinations of checkpointing (none, plain, reentrant), accumulation, "
            "packed rows, `reshard_after_forward` and offloaded shards, the worst of each"
        )
        lines.append(_row("FSDP2", "qwen3_moe_5", "nf4", besides, every))
    return "\n".join(lines)


def _row(engine: str, model: str, packed: str, besides: str, found: dict[str, Any]) -> str:
    numbers = " | ".join(f"{found[name]:.0e}" for name in ("loss", "adapter", "moved"))
    return f"| {engine} | {model} | {packed} | {besides} | {numbers} |"


def versions(record: dict[str, Any]) -> str:
    """Of what was measured, and when."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    shown = ", ".join(f"{name} {record['machine'][name]}" for name in names)
    return f"{record['date']}, {shown}; `{record['command']}`."


def sections() -> dict[str, str]:
    """Text by the name of its place on the page."""
    small = json.loads((RESULTS / "distributed-cpu.json").read_text())
    equal = json.loads((RESULTS / "distributed-equality.json").read_text())
    projection = "\n".join(f"- {line}" for line in small["projection"]["text"])
    return {
        "benchmark": f"{table(small['results'])}\n\n{versions(small)}",
        "projection": projection,
        "equality": f"{equality(equal)}\n\n{versions(equal)}",
    }


def filled(page: str) -> str:
    """The page with every place filled.

    Raises:
        ValueError: a place is missing.
    """
    for name, text in sections().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"{PAGE} lacks {begin} and {end}, or has them twice")
        page = pattern.sub(lambda _, text=text, b=begin, e=end: f"{b}\n{text}\n{e}", page)
    return page


def write() -> None:
    """Fill the page anew."""
    PAGE.write_text(filled(PAGE.read_text()))
