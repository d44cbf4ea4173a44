"""What tests need of the machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType

import pytest


def triton() -> ModuleType:
    """Triton; the tests are skipped where it has no build, and fail on Linux, where it belongs."""
    if sys.platform == "linux":
        return importlib.import_module("triton")
    module: ModuleType = pytest.importorskip("triton", reason="Triton has no build for this platform")
    return module


def transformers_mixin() -> None:
    """Skips where transformers' own adapter methods refuse the installed PEFT, for whatever model.

    (5.24 wants PEFT 0.22, which nobody could install when it came out.)
    """
    from packaging.version import Version
    from transformers.integrations import peft as mixin

    wanted = Version(getattr(mixin, "MIN_PEFT_VERSION", "0"))
    installed = Version(importlib.metadata.version("peft"))
    if installed < wanted:
        pytest.skip(f"this transformers' own adapter methods want PEFT {wanted}, not {installed}")
