"""Sharded and replicated training against one process, case by case: how far losses and adapters end apart.

    python benchmarks/distributed_equality.py            # a few minutes on two cores
    python benchmarks/distributed.py --write             # the table into docs/distributed.md

20 steps in fp32 on the same global batch, two ranks by gloo on a CPU, every kind of experts;
`tests/distributed/` holds the same numbers to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import ranks  # noqa: E402
import sharded_checks  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "distributed-equality.json"
BOUND = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(sharded_checks.CASES), help="absent: all")
    parser.add_argument("--quick", action="store_true", help="without every combination of ways")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    cases = arguments.cases or list(sharded_checks.CASES)
    checks = [f"fsdp:{case}" for case in cases]
    checks += [f"ddp:{case}" for case in sharded_checks.REPLICATED if case in cases]
    checks += [] if arguments.quick else ["every_way"]
    with tempfile.TemporaryDirectory() as folder:
        ranks.run("sharded_checks", checks, Path(folder), 2, 1800)
        rows = [row(check, ranks.outcome(Path(folder), check)) for check in checks if check != "every_way"]
        ways = [] if arguments.quick else ranks.outcome(Path(folder), "every_way")
    names = ("torch", "transformers", "peft", "bitsandbytes")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"ranks": 2, "backend": "gloo"} | {name: metadata.version(name) for name in names},
        "steps": sharded_checks.STEPS,
        "bound": BOUND,
        "rows": rows,
        "every_way": every_way(ways),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    worst = [
        r for r in [*rows, *filter(None, [record["every_way"]])] if max(r["loss"], r["adapter"]) >= BOUND
    ]
    for found in rows:
        print(json.dumps(found))
    print(json.dumps(record["every_way"]))
    return 1 if worst else 0


def row(check: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """The rank that is furthest off."""
    engine, _, case = check.partition(":")
    model, packed, how = sharded_checks.CASES[case]
    quantized = packed.get("bnb_4bit_quant_type") or packed.get("experts_quant_type") or "int8"
    result: dict[str, Any] = {"engine": engine, "case": case, "model": model, "format": quantized, "how": how}
    return result | {name: max(one[name] for one in found) for name in ("loss", "adapter", "moved")}


def every_way(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The worst of all combinations, and how many there are."""
    if not found:
        return None
    ways = [way for of_rank in found for way in of_rank.values()]
    return {
        "combinations": len(found[0]),
        "loss": max(way["loss"] for way in ways),
        "adapter": max(way["adapter"] for way in ways),
        "moved": min(way["moved"] for way in ways),
    }


if __name__ == "__main__":
    raise SystemExit(main())
