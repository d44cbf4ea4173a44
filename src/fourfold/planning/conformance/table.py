"""The conformance matrix as a file: written, read back, and compared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from fourfold.errors import ConfigurationError
from fourfold.planning.conformance.row import (
    AS_STOCK,
    CHECKS,
    FAILED,
    NOT_APPLICABLE,
    NOT_RUN,
    OK,
    SEPARATOR,
    Row,
)

_RANK = {OK: 4, AS_STOCK: 3, NOT_RUN: 2, "refused": 2, NOT_APPLICABLE: 1, FAILED: 0, "not built": 0}
_COLUMNS = ("model type", "model", "experts", "noise NF4", "noise INT8", *CHECKS)
_EXPLANATION = """\
Written by `fourfold conformance`; do not edit. For every model type of transformers with routed experts, a
tiny random model is made from its configuration class and taken through loading in NF4 (double-quantized) and
in INT8. A cell holds for both formats.

- *noise*: distance of the experts' own output from that of the unquantized experts, relative; the worst.
- *packed*: every experts module is, from an ordinary float checkpoint, and every matrix within the noise of
  its format; everything else is bit-equal. *refused*: it cannot be, and loading says so before it reads a
  weight, naming the setting that leaves it in high precision.
- *same numbers*: the experts' output equals that of the same numbers dequantized, within 2e-5.
- *controls*: experts rolled by one, scales of the neighbour, gate and up swapped: both comparisons see each.
- *backward*: the gradient of the input equals that of the same numbers dequantized.
- *forward*: the whole model runs on token ids, and bit-equal after reloading (`-`: it wants other inputs).
- *bf16*: loaded in bf16 (NF4), the same holds of *packed*, *reload* and *forward* (`not run`: the
  unquantized model does not run in bf16 either, or wants other inputs; the rest was checked. `as stock`:
  unpacked tensors come back from the saved checkpoint in another dtype, with the same values, and so they do
  in the unquantized model: where its first parameter is kept in fp32, config.json says fp32 of all).
- *reload*: saved and loaded again, every tensor is bit-equal, in the same dtype.
- *dequantize*: the model's own classes come back with exactly the packed numbers; *keys*: saved under the
  original keys, and loaded from there with the same values.
"""


def cells_of(row: Row) -> dict[str, str]:
    """The checks' cells of a row; one that could not be built has none."""
    if row.cells.get("built") != OK:
        return dict.fromkeys(CHECKS, NOT_APPLICABLE) | {"packed": "not built"}
    return {check: row.cells.get(check, NOT_APPLICABLE) for check in CHECKS}


def render(rows: list[Row], kept: Sequence[Row] = ()) -> str:
    """The whole file; ``kept`` are rows of an earlier one, of types that this transformers does not have."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("transformers", "torch", "bitsandbytes")
    )
    rows = sorted([*rows, *kept], key=lambda row: row.model_type)
    total, passed = Counter(row.kind for row in rows), Counter(row.kind for row in rows if row.passed)
    summary = f"{versions}. {sum(passed.values())} of {len(rows)} model types pass."
    lines = ["# Conformance", "", _EXPLANATION, summary, ""]
    lines += ["## Totals", "", "| experts | model types | pass |", "|---|---:|---:|"]
    lines += [f"| {_clean(kind)} | {n} | {passed[kind]} |" for kind, n in sorted(total.items())]
    lines += ["", "## Rows", "", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for row in rows:
        noise = [f"{row.noise[f]:.2g}" if f in row.noise else NOT_APPLICABLE for f in ("NF4", "INT8")]
        cells = [f"`{row.model_type}`", row.model, _clean(row.kind), *noise, *cells_of(row).values()]
        lines.append(f"| {' | '.join(cells)} |")
    if kept:
        names = ", ".join(f"`{row.model_type}`" for row in kept)
        lines += ["", f"Kept as they were, for this transformers has no such type: {names}."]
    problems = [(row, problem) for row in rows for problem in row.problems]
    if problems:
        lines += ["", "## What fails", ""]
        lines += [f"- `{row.model_type}`: {_clean(problem)}" for row, problem in problems]
    return "\n".join(lines) + "\n"


def _clean(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def read(path: Path) -> dict[str, Row]:
    """Rows by model type, of a file that `render` wrote.

    Raises:
        ConfigurationError: there is no table in it.
    """
    found: dict[str, Row] = {}
    header: list[str] = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| model type |"):
            header = cells
        elif header and (match := re.match(r"^\| `([^`]+)` \|", line)) and len(cells) == len(header):
            found[match[1]] = _read_row(match[1], dict(zip(header, cells, strict=True)))
        elif (match := re.match(r"^- `([^`]+)`: (.*)", line)) and match[1] in found:
            found[match[1]].problems.append(match[2])
    if not found:
        raise ConfigurationError(f"{path} holds no conformance table; name another file with --out")
    return found


def _read_row(model_type: str, named: dict[str, str]) -> Row:
    row = Row(model_type, named.get("model", ""), named.get("experts", ""))
    if named.get("packed") != "not built":
        row.cells = {"built": OK} | {check: named[check] for check in CHECKS if check in named}
    noise = {fmt: named.get(f"noise {fmt}", NOT_APPLICABLE) for fmt in ("NF4", "INT8")}
    row.noise = {fmt: float(value) for fmt, value in noise.items() if value != NOT_APPLICABLE}
    return row


def worse(before: dict[str, Row], rows: list[Row], expected: list[str]) -> list[str]:
    """What got worse, a line each.

    Args:
        before: what `read` gave.
        rows: of this run.
        expected: model types that this run should have a row of, as far as there was one before.
    """
    lines = []
    now = {row.model_type: row for row in rows}
    for model_type, old in before.items():
        if model_type not in now:
            if model_type in expected:
                lines.append(f"{model_type}: no row any more")
            continue
        lines += [f"{model_type}: {line}" for line in _worse_row(old, now[model_type])]
    for row in rows:
        if row.model_type not in before and not row.passed:
            lines.append(f"{row.model_type}: new, and fails: {row.problems[0]}")
    return lines


def _rank(cell: str) -> int:
    return min(_RANK.get(part, 0) for part in cell.split(SEPARATOR))


def _worse_row(old: Row, new: Row) -> list[str]:
    before, now = cells_of(old), cells_of(new)
    lines = [
        f"{check} was {cell}, is {now[check]}"
        for check, cell in before.items()
        if _rank(now[check]) < _rank(cell)
    ]
    # Other experts than before are no better for passing: some may not be found any more.
    better = _rank(now["packed"]) > _rank(before["packed"])
    if _clean(new.kind) != _clean(old.kind) and not better:
        lines.append(f"experts were {_clean(old.kind)}, are {_clean(new.kind)}")
    return lines
