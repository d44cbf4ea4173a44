"""On a GPU too, no result of an experts module is further from fp64 than stock's.

The same function runs on a CPU in `tests/adapters/test_rounding.py`.
"""

from __future__ import annotations

import pytest

import rounding

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("kind", "form", "way"), rounding.CASES)
def test_no_result_is_further_off_than_stocks(kind: str, form: str, way: str) -> None:
    if not rounding.is_known(kind):
        pytest.skip(f"this transformers has no {kind}")
    rounding.check(kind, form, way, "cuda")


def test_autocast_does_not_reach_stocks_grouped_products() -> None:
    """What `rounding` measures with and docs/adapters.md says: true of torch 2.11."""
    errors = rounding.measure("qwen3_moe", "nf4", "autocast", "cuda", autocast_groups=False)
    assert max(errors["output"].stock) < 1e-5
    assert min(errors["output"].ours) > 1e-3
