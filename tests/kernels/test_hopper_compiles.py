"""The CUDA source for Hopper, compiled by NVRTC, every variant. (To run, it needs such a GPU: tests/gpu.)"""

import ctypes
import itertools

import pytest
import torch

from fourfold.kernels.hopper import compile as compiled
from fourfold.kernels.hopper import products
from fourfold.kernels.hopper.source import shared_bytes, source

VARIANTS = [
    products._Variant(transposed, dtype, bits, wide)
    for transposed, dtype, (bits, wide) in itertools.product(
        (False, True), (torch.bfloat16, torch.float16), ((4, False), (8, False), (16, False), (16, True))
    )
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_compiles(variant: products._Variant) -> None:
    code = products._cubin(variant)
    assert code[:4] == b"\x7fELF"
    assert b"grouped_product" in code


def test_a_mistake_is_told() -> None:
    with pytest.raises(compiled.CompilerMissingError, match="expected a"):
        compiled.cubin("int wrong", "sm_90a", ())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_its_shared_memory_is_what_is_asked_for(bits: int) -> None:
    # a block of Hopper can have 227 KiB
    assert shared_bytes(bits) <= 227 * 1024
    checked = source() + f"static_assert(AT_BARRIERS + 2 * STAGES * 8 == {shared_bytes(bits)});\n"
    compiled.cubin(checked, "sm_90a", ("TRANSPOSED=0", "HALF=0", f"WEIGHTS={bits}", "WIDE=0"))
    wrong = source() + f"static_assert(AT_BARRIERS + 2 * STAGES * 8 != {shared_bytes(bits)});\n"
    with pytest.raises(compiled.CompilerMissingError, match="static assertion"):
        compiled.cubin(wrong, "sm_90a", ("TRANSPOSED=0", "HALF=0", f"WEIGHTS={bits}", "WIDE=0"))


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> ctypes.CDLL:
        raise compiled.CompilerMissingError("libnvrtc was not found")

    monkeypatch.setattr(compiled, "driver", missing)
    products.unavailable.cache_clear()
    try:
        assert products.unavailable() == "libnvrtc was not found"
    finally:
        products.unavailable.cache_clear()
