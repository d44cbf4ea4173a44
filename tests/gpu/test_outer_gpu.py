"""Sums over an expert's rows on CUDA: rounded once, the host never waits."""

import pytest
import torch

from fourfold.kernels.cuda import outer
from fourfold.kernels.grouped import grouped_outer

pytestmark = pytest.mark.gpu
COUNTS = {"many": [700, 1, 0, 129, 37, 256, 64, 63], "few": [1, 0, 7], "none": [0, 0, 0]}


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("rank", [8, 16, 24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [768, 136])
@pytest.mark.parametrize("wide_first", [True, False])
def test_rounded_once(wide_first: bool, columns: int, dtype: torch.dtype, rank: int) -> None:
    for counts in COUNTS.values():
        offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
        S = sum(counts)
        # rows with room behind them, as they lie in a layer; what lies there must not be read
        rows = torch.full((S, columns + 24), float("nan"), device="cuda", dtype=dtype)[:, :columns]
        rows.copy_(torch.randn(S, columns, device="cuda"))
        low = torch.randn(S, rank, device="cuda").to(dtype)
        x, y = (rows, low) if wide_first else (low, rows)
        assert outer.can(dtype, x.device, rank)
        assert outer.takes(x, y)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = grouped_outer(x, y, offsets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        spans = torch.arange(S, device="cuda").split(counts)
        wanted = torch.stack([x[s].double().T @ y[s].double() for s in spans])
        error, rounding = (found - wanted).norm(), (wanted.to(dtype) - wanted).norm()
        assert error <= 1.02 * rounding, (counts, float(error), float(rounding))


def test_what_it_leaves_to_others() -> None:
    cuda = torch.device("cuda", 0)
    assert not outer.can(torch.float32, cuda, 16)
    assert not outer.can(torch.bfloat16, cuda, 64)
    assert not outer.can(torch.bfloat16, cuda, 12)
    rows = torch.zeros(10, 130, device="cuda", dtype=torch.bfloat16)
    assert not outer.takes(rows)
    assert not outer.takes(rows[:, 1:129])
