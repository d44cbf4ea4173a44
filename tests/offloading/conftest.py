"""A driver that pins memory, where there is none."""

from __future__ import annotations

import pytest
import torch

from fourfold.offloading import host
from fourfold.offloading.host import HostMemory
from offloading import Driver, buffered


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(HostMemory, "_cannot", staticmethod(lambda: None))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(host, "_pinned_by_torch", lambda shape, dtype: None)
    monkeypatch.setattr(host, "_take_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda status: "out of memory")
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t, *_: t.data_ptr() in made.pages)
    return made


@pytest.fixture(params=["in place", "early", "late"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of experts on disk: mapped pages computed with; or read by the thread, then copied early, or late."""
    if request.param != "in place":
        buffered(monkeypatch, request.param == "late")
    return str(request.param)
