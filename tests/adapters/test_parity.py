"""LoRA on packed experts gives stock's logits and gradients; the table in docs/adapters.md in bounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import parity
import tiny


@pytest.fixture(params=parity.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if not parity.is_known(request.param):
        pytest.skip(f"this transformers has no {request.param}")
    return request.param


@pytest.mark.parametrize("saved_by", ["ours", "stock"])
def test_adapters_load_on_the_other_side_with_equal_logits(kind: str, saved_by: str, tmp_path: Path) -> None:
    assert parity.logits_difference(parity.Pair(kind, tmp_path), saved_by) < 1e-6


@pytest.mark.parametrize("way", parity.EXACT)
def test_every_factor_has_stocks_gradient(kind: str, way: str, tmp_path: Path) -> None:
    pair = parity.Pair(kind, tmp_path)
    if not pair.counted.supports_gradient_checkpointing and way != "eager":
        with pytest.raises(ValueError, match=parity.STOCK_CANNOT[kind, way].removeprefix("ValueError: ")):
            parity.exact_gradients(pair, way)  # stock's own word
        return
    assert not pair.is_read_from_outside or (kind, way) in parity.STOCK_CANNOT
    assert parity.exact_gradients(pair, way) < 1e-5  # and it counts them


@pytest.mark.parametrize(("kind", "way"), parity.STOCK_CANNOT)
def test_stocks_own_errors_are_those_that_the_table_names(kind: str, way: str, tmp_path: Path) -> None:
    """The other kinds go through stock as it is in the tests around."""
    pair = parity.Pair(kind, tmp_path, torch.bfloat16 if way == "bf16" else torch.float32)
    error = parity.stock_error(pair, way)
    assert error is not None
    assert re.match(parity.STOCK_CANNOT[kind, way], error)


@pytest.mark.parametrize("way", parity.ROUNDED)
def test_gradients_of_a_whole_model_in_bf16(kind: str, way: str, tmp_path: Path) -> None:
    """(Against stock: test_rounding.py.)"""
    assert parity.rounded(kind, tmp_path, way) < parity.BF16_NOISE


def test_a_factor_without_gradient_is_noticed() -> None:
    """The count is a count: it fails where one is missing, zero or not there at all."""
    base = tiny.build(tiny.mixtral())
    names = [f"lora_{number}" for number in range(parity.expected_factors(base))]
    whole: dict[str, torch.Tensor | None] = {name: torch.ones(1) for name in names}
    assert parity.complete(whole, base) == whole
    for spoilt in (
        whole | {names[0]: None},
        whole | {names[0]: torch.zeros(1)},
        dict(list(whole.items())[1:]),
    ):
        with pytest.raises(AssertionError):
            parity.complete(spoilt, base)
