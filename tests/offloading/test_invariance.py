"""docs/offloading-invariance.md says what is found when its cells are made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import needs
import offload_invariance
import offloading
import own_forward
from offload_invariance import FORMATS, LAYOUTS, cell, render

needs.triton()
PAGE = Path(__file__).parents[2] / "docs" / "offloading-invariance.md"


def stored() -> dict[str, list[str]]:
    """The cells of each layout's row."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): [text.removesuffix(" |") for text in row[1:]] for row in rows}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_what_is_found(layout: str) -> None:
    if layout in own_forward.TYPES and not own_forward.is_known(layout):
        pytest.skip("this version of transformers has no such model")
    found = [cell(layout, name) for name in FORMATS]
    assert found == stored()[layout]
    assert not any("of" in text for text in found)


def test_the_page_is_the_programs() -> None:
    cells = stored()
    again = render(lambda layout, name: cells[layout][list(FORMATS).index(name)])
    assert again == PAGE.read_text()


def test_a_cell_that_differs_would_be_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies that leave out a part."""

    class Forgetful(offloading.LateEngine):
        def wait(self, event: int) -> None:
            self.pending[event] = [(place, source) for place, source in self.pending[event] if place.ndim < 3]
            super().wait(event)

    def make(model: Any) -> list[torch.Tensor]:
        return [torch.nan_to_num(t) for t in offload_invariance_steps(model)]

    offload_invariance_steps = offload_invariance.steps
    monkeypatch.setattr(offload_invariance, "steps", make)
    monkeypatch.setattr(offloading, "LateEngine", Forgetful)
    assert " of 98**" in cell("qwen3_moe", "INT8")
