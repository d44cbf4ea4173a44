"""No result of an experts module is further from fp64 than stock's; figures in docs/adapters.md."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import rounding
from fourfold.experts import find_experts, forward
from fourfold.experts.own_precision import multiplies_in_fp32


@pytest.mark.parametrize(("kind", "form", "way"), rounding.CASES)
def test_no_result_is_further_off_than_stocks(kind: str, form: str, way: str) -> None:
    if not rounding.is_known(kind):
        pytest.skip(f"this transformers has no {kind}")
    rounding.check(kind, form, way)


@pytest.mark.parametrize(("kind", "way"), rounding.STOCK_FAILS)
def test_stock_cannot_what_is_not_compared(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = rounding.STOCK_FAILS[kind, way]
    monkeypatch.setattr(rounding, "STOCK_FAILS", {})
    with pytest.raises(RuntimeError, match=re.escape(error)):
        rounding.measure(kind, "nf4", way)


def test_a_rounding_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the output, off bf16's grid, on our side alone."""
    measured, made = rounding.results, rounding.models

    def results(model: Any, *args: Any) -> dict[str, torch.Tensor]:
        found = measured(model, *args)
        if model is ours[0]:
            found["output"] = (found["output"] * 1.3).bfloat16().double() / 1.3
        return found

    ours: list[Any] = []

    def models(*args: Any) -> Any:
        lora = made(*args)
        ours.append(lora[0])
        return lora

    monkeypatch.setattr(rounding, "results", results)
    monkeypatch.setattr(rounding, "models", models)
    with pytest.raises(AssertionError, match=r"^output: 1\.\d+ \+- 0\.0"):
        rounding.check("step3p5", "nf4", "bf16")


@pytest.fixture
def grouped_in_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our grouped products take autocast's dtype on a CPU too, as they do on CUDA."""
    chosen = forward.compute_dtype
    monkeypatch.setattr(forward, "compute_dtype", lambda module, x, *, grouped=False: chosen(module, x))


@pytest.mark.usefixtures("grouped_in_autocast")
@pytest.mark.parametrize("form", ["nf4", "unquantized"])
@pytest.mark.parametrize("kind", rounding.DECORATED)
def test_where_autocast_decides_grouped_products_as_on_cuda(kind: str, form: str) -> None:
    if not rounding.is_known(kind):
        pytest.skip(f"this transformers has no {kind}")
    rounding.check(kind, form, "autocast", autocast_groups=True)


@pytest.mark.usefixtures("grouped_in_autocast")
def test_there_stock_stays_in_fp32_and_is_no_yardstick() -> None:
    errors = rounding.measure("qwen3_moe", "nf4", "autocast", autocast_groups=False)
    assert max(errors["output"].stock) < 1e-5
    assert min(errors["output"].ours) > 1e-3


@pytest.mark.usefixtures("grouped_in_autocast")
def test_there_a_rounding_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each product, off bf16's grid: our error of the output, else 0.7 of stock's, becomes as large."""
    product = forward.packed_linear

    def rounded(*args: Any, **kwargs: Any) -> torch.Tensor:
        return ((product(*args, **kwargs) * 1.3).bfloat16() / 1.3).bfloat16()

    monkeypatch.setattr(forward, "packed_linear", rounded)
    with pytest.raises(AssertionError, match=r"^d hidden_states: 1\.\d+ \+- 0\.0"):
        rounding.check("qwen3_moe", "nf4", "autocast", autocast_groups=True)


def test_the_spread_of_a_ratio_shrinks_with_the_seeds() -> None:
    few, many = (rounding.Errors([0.9, 1.1] * n, [1.0, 1.0] * n) for n in (3, 48))
    assert few.ratio == pytest.approx(1)
    assert few.spread == pytest.approx(4 * many.spread, rel=0.1)
    assert rounding.Errors([1e-9], [1e-8]).ratio == 1  # (fp32 both)


@pytest.mark.parametrize(("kind", "wanted"), [("privacy_filter", True), ("mixtral", False)])
def test_whose_own_forward_multiplies_in_fp32(kind: str, wanted: bool) -> None:
    if not rounding.is_known(kind):
        pytest.skip(f"this transformers has no {kind}")
    ours, _, _ = rounding.models(kind, "nf4", torch.bfloat16)
    found = next(f for f in find_experts(ours) if f.layout is not None)
    assert found.module.config._experts_implementation == "eager"
    assert multiplies_in_fp32(found.module, found.layout) is wanted
    found.module.config._experts_implementation = "grouped_mm"
    assert not multiplies_in_fp32(found.module, found.layout)
