"""docs/offloading.md has a plan of GLM-4.5-Air; it is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fourfold
from fourfold.planning.pace import pace_of
from fourfold.planning.plan import Planner, Settings
from fourfold.planning.standins import Target

ROOT = Path(__file__).parents[2]
GIB = 2**30
CASES: dict[str, dict[str, Any]] = {
    "all on the card": {},
    "`auto`, a card of 48 GiB": {"experts_offload": "auto", "card": 48 * GIB},
    "`auto`, a card of 24 GiB": {"experts_offload": "auto", "card": 24 * GIB},
    "`cpu`": {"experts_offload": "cpu"},
    "`disk`": {"experts_offload": "disk"},
}
HEAD = [
    "| experts | peak GPU GiB | layers on the card | host GiB | peak host GiB | disk GiB | copied GiB a step "
    "| copy s | read s | compute s | bound by |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
]


def rows() -> list[str]:
    planner = Planner(ROOT / "examples" / "configs" / "glm-4.5-air", Target("cuda", (9, 0)))
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = fourfold.MoeBitsAndBytesConfig(**nf4)
    common: dict[str, Any] = {"batch": 2, "length": 2048, "r": 8, "optimizer": "adamw_8bit"}
    found = []
    for name, changes in CASES.items():
        plan = planner.plan(Settings(quantization=quantization, **common, **changes))
        cells: list[str] = [name, f"{plan.peak / GIB:.1f}"]
        placement, pace = plan.placement, pace_of(plan, link=53e9, disk=3e9)
        if placement is None:
            cells += ["all", *[""] * 8]
        else:
            assert pace is not None
            bytes_ = (placement.host_bytes, placement.host_peak, placement.disk_bytes, placement.copied)
            cells += [str(placement.resident_modules), *(f"{count / GIB:.1f}" for count in bytes_)]
            cells += [
                f"{pace.copying:.2f}",
                f"{pace.reading:.1f}",
                f"{pace.computing:.2f}",
                str(pace.bound_by),
            ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def test_the_table_is_computed() -> None:
    page = (ROOT / "docs" / "offloading.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- glm: begin -->\n")
    assert rest.partition("<!-- glm: end -->")[0].strip().splitlines() == [*HEAD, *rows()]


if __name__ == "__main__":
    print("\n".join([*HEAD, *rows()]))
