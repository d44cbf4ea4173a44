"""Shared fixtures. Without a GPU, Triton kernels run through Triton's interpreter on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when a kernel is defined, so before any import of one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--servers", help="folder of unpacked vLLM and SGLang, for the tests marked servers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _precision():
    """A run with ``tf32`` sets it for its process."""
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


@pytest.fixture
def poison_memory():
    """Fill uninitialised memory with NaN, so that a value nobody wrote cannot pass for a right one."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
