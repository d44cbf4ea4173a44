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
