"""LoRA on packed experts against stock PEFT on the dequantized model, one row for each kind of layout.

    python benchmarks/parity.py                    the table
    python benchmarks/parity.py --write            the same, and into docs/adapters.md

Tiny random models on a CPU. `tests/adapters/test_parity.py` holds the same numbers to their bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import parity  # noqa: E402
import tiny  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


def measure(kind: str) -> dict[str, float]:
    """Every number of one row."""
    with tempfile.TemporaryDirectory() as folder:
        pair = parity.Pair(kind, Path(folder))
        row = {f"logits {side}": parity.logits_difference(pair, side) for side in ("ours", "stock")}
        row |= {way: parity.exact_gradients(pair, way) for way in parity.EXACT}
        row["factors"] = parity.expected_factors(pair.packed())
        for way in parity.ROUNDED:
            errors = parity.rounded(kind, Path(folder) / way, way)
            row |= {f"{way} ours": errors.ours, f"{way} stock": errors.stock}
    return row


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| layout | factors | logits ours -> stock | logits stock -> ours | gradients | reentrant | "
        "non-reentrant | autocast: ours / stock | bf16: ours / stock |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, row in rows.items():
        exact = [row["logits ours"], row["logits stock"], *(row[way] for way in parity.EXACT)]
        rounded = [f"{row[f'{way} ours']:.4f} / {row[f'{way} stock']:.4f}" for way in parity.ROUNDED]
        cells = [kind, str(int(row["factors"])), *(f"{number:.0e}" for number in exact), *rounded]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/adapters.md")
    parser.add_argument("--json", action="store_true", help="print numbers for machines")
    arguments = parser.parse_args()
    rows = {kind: measure(kind) for kind in tiny.KINDS}
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{PAGE} has no lines {BEGIN} and {END} to put the table between")
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
