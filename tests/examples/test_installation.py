"""What `make` installs: one pin for each package under every supported Python, and where torch comes from;
and what the tests themselves put on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import needs

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def applies(pin: Requirement, python: str) -> bool:
    return pin.marker is None or pin.marker.evaluate({"python_version": python})


@pytest.mark.parametrize("python", PYTHONS)
def test_each_package_is_pinned_once_under_each_python(python: str) -> None:
    chosen = [pin.name for pin in pins() if applies(pin, python)]
    assert sorted(chosen) == sorted({pin.name for pin in pins()})


@pytest.mark.parametrize("python", PYTHONS)
def test_no_pin_asks_for_a_newer_python(python: str) -> None:
    for pin in pins():
        try:
            installed = metadata.metadata(pin.name)
        except metadata.PackageNotFoundError:
            continue
        if pin.specifier.contains(installed["Version"]) and applies(pin, python):
            assert SpecifierSet(installed["Requires-Python"] or "").contains(f"{python}.99"), pin


def test_triton_is_the_one_that_torch_asks_for() -> None:
    by_name = {pin.name: pin for pin in pins()}
    assert str(by_name["torch"].specifier) == "==2.13.0"
    assert str(by_name["triton"].specifier) == "==3.7.1"  # of torch 2.13.0; its CPU build does not say so
    for line in metadata.requires("torch") or ():
        wanted = Requirement(line)
        if wanted.name == "triton" and by_name["torch"].specifier.contains(metadata.version("torch")):
            assert wanted.specifier == by_name["triton"].specifier


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("index", ["", "https://download.pytorch.org/whl/cpu"])
def test_the_index_is_for_torch_alone(tmp_path: Path, index: str) -> None:
    for name in (
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    ):  # as in a clone, where nothing is installed
        shutil.copy(ROOT / name, tmp_path / name)
    arguments = ["make", "-n", "quickstart", f"TORCH_INDEX={index}"]
    planned = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    steps = [line.strip() for line in planned.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert steps[0].split()[-1] == "torch"
    assert (f"--index-url {index}" in steps[0]) == bool(index)
    assert not any("index" in step for step in steps[1:])


def test_the_folders_of_tests_are_no_packages() -> None:
    """`tests` on the path would make tests/kernels a package `kernels`, which transformers looks for."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    added = {Path(place).resolve() for place in sys.path if place and place not in given}
    assert ROOT / "tests" not in added
    assert ROOT / "tests" / "helpers" in added or str(ROOT / "tests" / "helpers") in given


def test_a_missing_triton_is_a_failure_on_linux_and_a_skip_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ImportError):
        needs.triton()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(pytest.skip.Exception):
        needs.triton()
