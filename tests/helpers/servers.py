"""The servers' own modules that read adapters, run from their unpacked distributions, without the servers.

    pip download --no-deps sglang          (a wheel: unzip it)
    pip download --no-deps --no-binary vllm --no-clean vllm          (pip unpacks it in $TMPDIR, then fails)
    pytest -m servers --servers DIR          (DIR holds the folders vllm and sglang)

Modules named here are executed; whatever else they import of their package is an empty stand-in.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock

REAL = {
    "vllm": (
        "vllm.lora.peft_helper",
        "vllm.lora.lora_weights",
        "vllm.lora.lora_model",
        "vllm.lora.utils",
    ),
    "sglang": (
        "sglang.srt.lora.lora",
        "sglang.srt.lora.lora_config",
        "sglang.srt.lora.utils",
        "sglang.srt.layers.utils.common",
    ),
}


class _StandIn(ModuleType):
    """A module of which anything can be imported."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.isupper():  # a switch, such as PIN_MEMORY: off
            return False
        value = type(name, (), {}) if name[:1].isupper() else MagicMock(name=name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str, folder: Path) -> None:
        self.package, self.folder = package, folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        if name in REAL[self.package]:
            file = self.folder.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def installed(package: str, folder: Path) -> Iterator[None]:
    """``package`` can be imported meanwhile, as far as it is real."""
    if not all(folder.joinpath(*name.split(".")).with_suffix(".py").is_file() for name in REAL[package]):
        raise FileNotFoundError(f"{folder} holds no unpacked {package}")
    finder = _Finder(package, folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            del sys.modules[name]
