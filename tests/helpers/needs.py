"""What tests need of the machine."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest


def triton() -> ModuleType:
    """Triton; the tests are skipped where it has no build, and fail on Linux, where it belongs."""
    if sys.platform == "linux":
        return importlib.import_module("triton")
    module: ModuleType = pytest.importorskip("triton", reason="Triton has no build for this platform")
    return module
