"""CUDA kernels without a GPU: every variant compiles; what they refuse. (tests/gpu runs them.)"""

import ctypes
import itertools

import pytest
import torch

from fourfold.formats import PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.kernels.cuda import compile as compiled
from fourfold.kernels.cuda import few_rows, outer, routing, rows
from fourfold.kernels.cuda import hopper as products
from fourfold.kernels.cuda.hopper_source import shared_bytes, source

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


BF16 = torch.bfloat16
SHAPE = StackShape(2, 128, 128)
TAKEN: dict[str, object] = {"fmt": PackFormat("nf4"), "shape": SHAPE, "dtype": BF16, "capability": (9, 0)}


def test_it_takes_what_it_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "unavailable", lambda: None)  # (no driver without a GPU)
    assert products.refusal(**TAKEN) is None  # type: ignore[arg-type]
    assert products.refusal(**TAKEN | {"fmt": PackFormat("int8")}) is None  # type: ignore[arg-type]
    plain = {"fmt": None, "plain": (BF16, (128 * 128, 1, 128))}
    assert products.refusal(**TAKEN | plain) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"capability": None}, "NVIDIA"),
        ({"capability": (8, 0)}, "capability 9.x; this GPU has 8.0"),
        ({"capability": (10, 0)}, "this GPU has 10.0"),
        ({"dtype": torch.float32}, "bf16 or fp16"),
        ({"aligned": False}, "16 bytes"),
        ({"fmt": PackFormat("nf4", 32)}, "blocks of 64"),
        ({"shape": StackShape(2, 96, 128)}, "multiples of 64, not 96 x 128"),
        ({"shape": StackShape(2, 128, 200)}, "multiples of 64, not 128 x 200"),
        ({"shape": StackShape(1025, 128, 128)}, "1024 experts at most"),
        ({"fmt": None, "plain": (torch.float32, (128 * 128, 128, 1))}, "not of torch.float32"),
        ({"fmt": None, "plain": (BF16, (128 * 256, 256, 2))}, "in one piece"),
        ({"fmt": None, "plain": (BF16, (128 * 132, 132, 1))}, "in one piece"),
    ],
    ids=str,
)
def test_what_it_refuses(changed: dict[str, object], reason: str) -> None:
    assert reason in (products.refusal(**TAKEN | changed) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_factor_gradients_compile_for_every_card(capability: tuple[int, int]) -> None:
    for wide_first, dtype in itertools.product((False, True), (torch.bfloat16, torch.float16)):
        assert b"grouped_outer" in outer._cubin(wide_first, dtype, capability)


def test_shared_memory_of_factor_gradients() -> None:
    checked = outer._source() + f"static_assert(STAGES * STAGE_BYTES == {outer.SHARED_BYTES});\n"
    compiled.cubin(checked, "sm_80", ("WIDE_FIRST=0", "HALF=0"))
    assert outer.SHARED_BYTES <= 99 * 1024  # of a block on 8.6 and 8.9


MODES = list(itertools.product((rows.GATHER, rows.SILU, rows.BACKWARD), (False, True)))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_passes_over_rows_compile_for_every_card(capability: tuple[int, int]) -> None:
    for (mode, rank_first), dtype in itertools.product(MODES, (torch.bfloat16, torch.float16)):
        assert b"rows_pass" in rows._cubin(mode, rank_first, dtype, capability)
    for mode, dtype in itertools.product((rows.GATHER, rows.SILU), (torch.bfloat16, torch.float16)):
        assert b"rows_pass" in rows._cubin(mode, True, dtype, capability, one_row=True)


def test_when_a_block_takes_one_row() -> None:
    assert rows.takes_one_row(rows.GATHER, True, 512, 128, 2048)
    assert not rows.takes_one_row(rows.GATHER, True, 513, 128, 2048)
    assert not rows.takes_one_row(rows.GATHER, False, 8, 128, 2048)
    assert not rows.takes_one_row(rows.BACKWARD, True, 8, 128, 2048)
    assert not rows.takes_one_row(rows.SILU, True, 8, 128, 20000)
    assert rows.FEW_COLUMNS * 2 + 16 <= 48 * 1024


@pytest.mark.parametrize(("mode", "rank_first"), MODES)
def test_shared_memory_of_passes_over_rows(mode: int, rank_first: bool) -> None:
    size = rows.shared_bytes(mode, rank_first)
    checked = rows._source() + f"static_assert(SHARED_BYTES == {size});\n"
    compiled.cubin(checked, "sm_80", (f"MODE={mode}", f"RANK_FIRST={int(rank_first)}", "HALF=0"))
    assert size <= 48 * 1024  # (several blocks are to run on a processor)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_routing_compiles_for_every_card(capability: tuple[int, int]) -> None:
    for mode, dtype in itertools.product((routing.ROUTE, routing.SUM), (torch.bfloat16, torch.float16)):
        assert routing._KERNELS[mode][0].encode() in routing._cubin(mode, dtype, capability)
    checked = routing._source() + f"static_assert(THREADS == {routing.THREADS});\n"
    compiled.cubin(checked, "sm_80", ("MODE=1", "HALF=0"))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_products_of_few_rows_compile_for_every_card(capability: tuple[int, int]) -> None:
    for bits, dtype in itertools.product((4, 8), (torch.bfloat16, torch.float16)):
        assert b"few_rows" in few_rows._cubin(bits, dtype, capability)
    for name in ("THREADS", "TILE_M"):
        checked = few_rows._source() + f"static_assert({name} == {getattr(few_rows, name)});\n"
        compiled.cubin(checked, "sm_80", ("WEIGHTS=4", "HALF=0"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"capability": None}, "NVIDIA"),
        ({"capability": (7, 5)}, "8.0 or more, and this one has 7.5"),
        ({"transposed": True}, "forward alone"),
        ({"dtype": torch.float32}, "bf16 or fp16"),
        ({"fmt": None}, "packed weights"),
        ({"aligned": False}, "16 bytes"),
        ({"shape": StackShape(2, 128, 100)}, "columns by 8, not 128 x 100"),
        ({"shape": StackShape(2, 127, 128)}, "even number of rows"),
        ({"fmt": PackFormat("int8"), "shape": StackShape(2, 128, 104)}, "columns by 16, not 128 x 104"),
    ],
    ids=str,
)
def test_what_few_rows_refuses(
    changed: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "unavailable", lambda capability: None)
    taken = {
        "fmt": PackFormat("nf4", 32, True),
        "shape": StackShape(2, 128, 1000),
        "dtype": BF16,
        "capability": (8, 6),
        "transposed": False,
    }
    assert few_rows.refusal(**taken) is None  # type: ignore[arg-type]
    assert reason in (few_rows.refusal(**taken | changed) or "")  # type: ignore[arg-type]


def test_rows_that_the_copy_engine_cannot_read_are_copied() -> None:
    x = torch.randn(6, 64).bfloat16()
    assert compiled.readable(x) is x
    wide = torch.randn(6, 80).bfloat16()
    assert compiled.readable(wide[:, :64]).data_ptr() == wide.data_ptr()
    for odd in (torch.randn(6, 128).bfloat16()[:, ::2], torch.randn(6, 68).bfloat16()[:, 4:], x.t()):
        copy = compiled.readable(odd)
        assert torch.equal(copy, odd)
        assert copy.stride(1) == 1
        assert copy.stride(0) % 8 == 0
        assert copy.data_ptr() % 16 == 0


def test_offsets_of_another_dtype_and_devices_are_refused() -> None:
    stack = PlainStack(SHAPE, torch.randn(2, 128, 128).bfloat16())
    x = torch.randn(3, 128).bfloat16()
    with pytest.raises(ValueError, match=r"int32, not torch\.int64"):
        products.hopper_product(x, stack, torch.tensor([1, 3]), transposed=False)
    elsewhere = PlainStack(SHAPE, stack.data.to("meta"))
    with pytest.raises(ValueError, match="rows are on cpu, weights or offsets on meta"):
        products.hopper_product(x, elsewhere, torch.tensor([1, 3]).int(), transposed=False)
