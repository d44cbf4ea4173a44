"""LoRA on packed experts against stock PEFT on the dequantized model, one row for each kind of layout.

    python benchmarks/parity_table.py                    the table
    python benchmarks/parity_table.py --write            the same, and into docs/adapters.md

Tiny random models on a CPU. `tests/adapters/test_parity.py` and `test_rounding.py` hold the same numbers
to their bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import parity  # noqa: E402
import rounding  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"
ROUNDED = {
    "bf16": ("nf4", "bf16"),
    "autocast": ("nf4", "autocast"),
    "INT8, bf16": ("int8", "bf16"),
    "unquantized, bf16": ("unquantized", "bf16"),
}
"""Columns of rounding: how experts are held, and the way of computing (`rounding.CASES`)."""
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


def measure(kind: str) -> dict[str, Any]:
    """Every number of one row; ``errors`` holds what stock as it is answers, by the way in which it fails."""
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        pair = parity.Pair(kind, Path(folder))
        row: dict[str, Any] = {
            f"logits {side}": parity.logits_difference(pair, side) for side in ("ours", "stock")
        }
        row["factors"] = parity.expected_factors(pair.counted)
        for way in (*parity.EXACT, *parity.ROUNDED):
            error = parity.stock_error(pair, way)
            if error is not None:
                errors[way] = error
        for way in parity.EXACT:
            checkpoints = pair.counted.supports_gradient_checkpointing or way == "eager"
            row[way] = parity.exact_gradients(pair, way) if checkpoints else None
    for name, (form, way) in ROUNDED.items():
        row[name] = _worst(kind, form, way) if (kind, form, way) in rounding.CASES else None
    return row | {"errors": errors}


def _worst(kind: str, form: str, way: str) -> dict[str, Any] | None:
    """The result whose error is largest by stock's; None where stock cannot run."""
    if (kind, way) in rounding.STOCK_FAILS:
        return None
    errors = rounding.measure(kind, form, way)
    name = rounding.worst(errors)
    return {"result": name, "ratio": errors[name].ratio, "spread": errors[name].spread}


def _ratio(worst: dict[str, Any] | None) -> str:
    if worst is None:
        return "-"
    if worst["ratio"] == 1:
        return "1: both fp32"  # (`rounding.FP32`)
    return f"{worst['ratio']:.2f} ± {worst['spread']:.2f} {worst['result']}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: the rows, and below them stock's own errors."""
    lines = [
        "| layout | factors | logits ours -> stock | logits stock -> ours | gradients | reentrant | "
        f"non-reentrant | {' | '.join(ROUNDED)} |",
        f"|---{'|---:' * 6}{'|---' * len(ROUNDED)}|",
    ]
    notes: list[str] = []
    for kind, row in rows.items():
        marks: list[str] = []
        for error in dict.fromkeys(row["errors"].values()):
            ways = [way for way, said in row["errors"].items() if said == error]
            where = "" if len(ways) == len(parity.EXACT) + len(parity.ROUNDED) else f" ({', '.join(ways)})"
            notes.append(f"{len(notes) + 1}. {kind}{where}: stock raises `{error}`")
            marks.append(str(len(notes)))
        exact = [row["logits ours"], row["logits stock"], *(row[way] for way in parity.EXACT)]
        rounded = [_ratio(row[column]) for column in ROUNDED]
        name = f"{kind} ({', '.join(marks)})" if marks else kind
        cells = [name, str(row["factors"]), *(_number(number, ".0e") for number in exact), *rounded]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes] if notes else lines)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/adapters.md")
    parser.add_argument("--json", action="store_true", help="print numbers for machines")
    arguments = parser.parse_args()
    rows = {kind: measure(kind) for kind in parity.KINDS}
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{PAGE} has no lines {BEGIN} and {END} to put the table between")
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
