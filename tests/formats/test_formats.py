"""Packed bytes equal bitsandbytes' own, bit by bit; decoding gives the numbers that bitsandbytes decodes."""

from contextlib import nullcontext

import bitsandbytes.functional as bnb
import pytest
import torch

from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.codebooks import absmax_codes, four_bit_codes
from fourfold.formats.quantize import Packer, pack_stack

CPU = torch.device("cpu")
E = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pack(w_ENK: torch.Tensor, fmt: PackFormat, parts: int = 1) -> PackedStack:
    stack = PackedStack.empty(fmt, StackShape(*w_ENK.shape, parts=parts), CPU)
    return pack_stack(stack, w_ENK, "experts.w")


def test_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(absmax_codes(CPU), bnb.create_dynamic_map())
    for quant_type in ("nf4", "fp4"):
        assert torch.equal(four_bit_codes(quant_type, CPU), bnb.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("parts", [1, 2])
def test_four_bit_equals_bitsandbytes(
    quant_type: str, double_quant: bool, dtype: torch.dtype, blocksize: int, parts: int
) -> None:
    w = torch.randn(E, 40, 256).to(dtype)  # 40*256/64/2 = 80 absmax values a part: no multiple of 256
    stack = pack(w, PackFormat(quant_type, blocksize, double_quant), parts)
    decoded = decode_stack(stack, dtype)
    for e in range(E):
        for p, matrix in enumerate(w[e].chunk(parts)):
            rows = slice(p * 40 // parts, (p + 1) * 40 // parts)
            data, state = bnb.quantize_4bit(
                matrix.contiguous(),
                blocksize=blocksize,
                quant_type=quant_type,
                compress_statistics=double_quant,
            )
            assert torch.equal(stack.data[e, rows].reshape(-1, 1), data)
            if double_quant:
                assert stack.absmax_scale is not None
                assert stack.absmax_offset is not None
                assert torch.equal(stack.absmax[e, rows].flatten(), state.absmax)
                assert torch.equal(stack.absmax_scale[e, p].view(torch.float32), state.state2.absmax)
                assert torch.equal(stack.absmax_offset[e, p].view(torch.float32), state.offset)
            else:
                assert torch.equal(stack.absmax[e, rows].flatten().view(torch.float32), state.absmax)
            # As one row: bitsandbytes' CPU code is wrong where rows are no multiple of the block size.
            state.shape = torch.Size((1, matrix.numel()))
            assert torch.equal(decoded[e, rows].flatten(), bnb.dequantize_4bit(data, state).flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_equals_bitsandbytes(dtype: torch.dtype) -> None:
    w = torch.randn(E, 24, 40).to(dtype)
    stack = pack(w, PackFormat("int8"), parts=2)
    assert stack.data.shape == (E, 24, 40, 1)
    for e in range(E):
        codes, absmax, _ = bnb.int8_vectorwise_quant(w[e].half())
        assert torch.equal(stack.data[e].squeeze(-1), codes)
        assert torch.equal(decode_stack(stack, torch.float32)[e], bnb.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("columns", [63, 65, 100, 1407])
@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_are_padded_to_whole_blocks(columns: int, double_quant: bool) -> None:
    """Bytes of a padded row are those of the row with zeros appended; the padding does not show in the
    result.
    """
    w = torch.randn(E, 6, columns)
    fmt = PackFormat("nf4", 64, double_quant)
    padded = torch.nn.functional.pad(w, (0, -columns % 64))
    stack, whole = pack(w, fmt), pack(padded, fmt)
    for (suffix, ours), (_, theirs) in zip(stack.tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, theirs), suffix
    decoded = decode_stack(stack, torch.float32)
    assert decoded.shape == w.shape
    assert torch.equal(decoded, decode_stack(whole, torch.float32)[..., :columns])


@pytest.mark.parametrize(
    "fmt", [PackFormat("nf4"), PackFormat("nf4", 64, True), PackFormat("fp4"), PackFormat("int8")]
)
def test_slices_of_experts_decode_alone(fmt: PackFormat) -> None:
    stack = pack(torch.randn(E, 16, 128), fmt, parts=2)
    whole = decode_stack(stack, torch.float32)
    assert torch.equal(decode_stack(stack.experts(1, 3), torch.float32), whole[1:3])


@pytest.mark.parametrize(
    ("fmt", "low", "high"),
    [
        (PackFormat("int8"), 0.005, 0.012),
        (PackFormat("nf4"), 0.085, 0.097),
        (PackFormat("nf4", 64, True), 0.085, 0.097),
        (PackFormat("fp4"), 0.11, 0.14),
    ],
)
def test_error_of_normal_weights(fmt: PackFormat, low: float, high: float) -> None:
    """Relative root-mean-square error on normal weights, as published for these formats."""
    w = torch.randn(E, 64, 1024)
    error = (decode_stack(pack(w, fmt), torch.float32) - w).norm() / w.norm()
    assert low < error < high


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", [PackFormat("nf4"), PackFormat("int8")])
def test_weights_that_are_not_finite_are_named(fmt: PackFormat, value: float) -> None:
    w = torch.randn(E, 8, 64)
    w[1, 3, 5] = value
    with pytest.raises(CheckpointError, match=r"experts\.w: weights of expert\(s\) 1 "):
        pack(w, fmt)


@pytest.mark.parametrize(("largest", "refused"), [(65510.0, False), (65520.0, True)])
def test_the_range_of_fp16_is_the_same_in_batches_and_alone(largest: float, refused: bool) -> None:
    """fp32 weights up to half a step above fp16's largest number are rounded to it."""
    for count in (1, 2):
        w = torch.randn(count, 4, 64)
        w[0, 0, 0] = largest
        stack = PackedStack.empty(PackFormat("int8"), StackShape(count, 4, 64), "cpu")
        streamed = Packer(stack, "w")
        for expert in range(count):
            streamed.pack_(expert, 0, w[expert])
        fused = PackedStack.empty(PackFormat("int8"), StackShape(count, 4, 64), "cpu")
        for pack in (streamed.finish, lambda fused=fused, w=w: pack_stack(fused, w, "w")):
            with pytest.raises(CheckpointError, match="range of fp16") if refused else nullcontext():
                pack()


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_parameters_are_packed(quant_type: str) -> None:
    """As from a state dict that a caller hands in."""
    w = torch.nn.Parameter(torch.randn(2, 4, 64))
    stack = PackedStack.empty(PackFormat(quant_type, 64), StackShape(2, 4, 64), "cpu")
    packer = Packer(stack, "w")
    for expert in range(2):
        packer.pack_(expert, 0, torch.nn.Parameter(w[expert].detach().clone()))
    fused = pack_stack(PackedStack.empty(stack.fmt, stack.shape, "cpu"), w, "w")
    assert torch.equal(packer.finish().data, fused.data)
    assert torch.equal(stack.absmax, fused.absmax)


def test_weights_beyond_fp16_are_refused_for_int8_only() -> None:
    w = torch.randn(E, 8, 64)
    w[2, 0, 0] = 1e5
    pack(w, PackFormat("nf4"))
    with pytest.raises(CheckpointError, match="range of fp16"):
        pack(w, PackFormat("int8"))


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\(8, 32\).*\(8, 64\)"):
        pack_stack(
            PackedStack.empty(PackFormat("nf4"), StackShape(E, 8, 64), CPU),
            torch.randn(E, 8, 32),
            "experts.w",
        )


def test_bytes_are_counted_as_stored() -> None:
    fmt = PackFormat("nf4", 64, True)
    stack = pack(torch.randn(E, 32, 512), fmt, parts=2)
    assert stack.shape.nbytes(fmt) == sum(t.numel() * t.element_size() for _, t in stack.tensors())
    big = StackShape(128, 1536, 2048, 2)
    assert big.nbytes(fmt) * 8 / (128 * 1536 * 2048) < 4.13
    assert big.nbytes(PackFormat("nf4")) * 8 / (128 * 1536 * 2048) == 4.5


def test_unknown_settings_are_refused() -> None:
    for arguments in ({"quant_type": "nf5"}, {"quant_type": "nf4", "blocksize": 48}):
        with pytest.raises(ConfigurationError):
            PackFormat(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="double"):
        PackFormat("int8", double_quant=True)
