"""No result of an experts module is further from fp64 than stock's; figures in docs/adapters.md."""

from __future__ import annotations

import re

import pytest
import torch

import parity
import rounding


@pytest.mark.parametrize(("kind", "form", "way"), rounding.CASES)
def test_no_result_is_further_off_than_stocks(kind: str, form: str, way: str) -> None:
    if not parity.is_known(kind):
        pytest.skip(f"this transformers has no {kind}")
    rounding.check(kind, form, way)


@pytest.mark.parametrize(("kind", "way"), rounding.STOCK_FAILS)
def test_stock_cannot_what_is_not_compared(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = rounding.STOCK_FAILS.pop((kind, way))
    try:
        with pytest.raises(RuntimeError, match=re.escape(error)):
            rounding.measure(kind, "nf4", way)
    finally:
        rounding.STOCK_FAILS[kind, way] = error


def test_a_rounding_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more rounding of the output alone, of everything else the same."""
    measured = rounding.results

    def spoilt(model: object, *args: object) -> dict[str, torch.Tensor]:
        found = measured(model, *args)
        if args[-1] is False and hasattr(model, "fourfold_spoilt"):
            found["output"] = (found["output"] * 1.003).bfloat16().double() / 1.003
        return found

    made = rounding.models

    def marked(*args: object) -> object:
        lora = made(*args)
        lora[0].fourfold_spoilt = True
        return lora

    monkeypatch.setattr(rounding, "results", spoilt)
    monkeypatch.setattr(rounding, "models", marked)
    with pytest.raises(AssertionError, match="output"):
        rounding.check("mixtral", "nf4", "bf16")
