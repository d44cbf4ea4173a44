"""What is found about one model type, and the names of the checks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

CHECKS = (
    "packed",
    "same numbers",
    "noise",
    "controls",
    "backward",
    "forward",
    "reload",
    "bf16",
    "dequantize",
    "keys",
)
FORMATS: dict[str, dict[str, Any]] = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    # (with its default threshold, bitsandbytes' CPU code for outliers fails on batches of 3-D inputs)
    "INT8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
TIGHT = 2e-5  # relative, fp32: another order of summation
NOISE = {"NF4": (0.01, 0.35), "INT8": (1e-4, 0.06)}  # relative, of an output behind two or three products
OK, FAILED, NOT_APPLICABLE = "ok", "FAILED", "-"
NOT_RUN = "not run"  # all but the run itself was checked
AS_STOCK = "as stock"  # dtypes change as they do without quantization
SEPARATOR = ", "  # of several such things in one cell


@dataclass
class Row:
    """What was found about one model type.

    Attributes:
        kind: of its experts modules, or why there is none to check.
        cells: of each check in `CHECKS`, and ``built``: ``ok``, ``FAILED``, ``-``, ``refused``, or one or
            both of ``as stock`` and ``not run``.
        noise: relative, by format: the worst experts module.
        problems: what failed and how, a line each.
    """

    model_type: str
    model: str = ""
    kind: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}

    @contextlib.contextmanager
    def check(self, name: str, where: str = "") -> Iterator[None]:
        """Whatever goes wrong inside fails this check, of this row alone."""
        self.cells.setdefault(name, OK)
        try:
            yield
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}", where)

    def fail(self, name: str, how: str, where: str = "") -> None:
        self.cells[name] = FAILED
        line = " ".join(how.split())
        self.problems.append(f"{name}{f' ({where})' if where else ''}: {line[:300]}")
