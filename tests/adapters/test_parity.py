"""LoRA on packed experts gives stock's logits and gradients; the table in docs/adapters.md in bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parity
import tiny


@pytest.fixture(params=tiny.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("saved_by", ["ours", "stock"])
def test_adapters_load_on_the_other_side_with_equal_logits(kind: str, saved_by: str, tmp_path: Path) -> None:
    assert parity.logits_difference(parity.Pair(kind, tmp_path), saved_by) < 1e-6


@pytest.mark.parametrize("way", parity.EXACT)
def test_every_factor_has_stocks_gradient(kind: str, way: str, tmp_path: Path) -> None:
    assert parity.exact_gradients(parity.Pair(kind, tmp_path), way) < 1e-5  # and it counts them


@pytest.mark.parametrize("way", parity.ROUNDED)
def test_gradients_in_bf16(kind: str, way: str, tmp_path: Path) -> None:
    errors = parity.rounded(kind, tmp_path, way)
    assert errors.ours < parity.BF16_NOISE
    assert errors.ours <= errors.stock * parity.AGAINST_STOCK[way]


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
