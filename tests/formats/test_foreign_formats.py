"""MXFP4 and block-FP8 decode to the very bits of transformers' own decoders."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import fourfold.formats.foreign as foreign
from fourfold.formats.foreign import decode_fp8, decode_mxfp4, e8m0

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("temporary", [2**21, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_equals_transformers(dtype: torch.dtype, temporary: int, monkeypatch) -> None:
    monkeypatch.setattr(foreign, "_TEMPORARY", temporary)
    blocks = torch.randint(0, 256, (3, 10, 5, 16), dtype=torch.uint8)
    scales = torch.randint(0, 254, (3, 10, 5), dtype=torch.uint8)
    scales[0, 0, :2] = 0
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(bits(decode_mxfp4(blocks, scales, dtype)), bits(wanted))


def test_powers_of_two_are_exact() -> None:
    byte = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(e8m0(byte).double(), 2.0 ** (byte.double() - 127))
    assert e8m0(torch.tensor([255], dtype=torch.uint8)).isinf()


@pytest.mark.parametrize("temporary", [2**21, 128 * 384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_equals_transformers(dtype: torch.dtype, temporary: int, monkeypatch) -> None:
    monkeypatch.setattr(foreign, "_TEMPORARY", temporary)
    codes = torch.randn(512, 384).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 3)
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
    assert torch.equal(bits(decode_fp8(codes, scales, (128, 128), dtype)), bits(wanted))


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300, 512])
@pytest.mark.parametrize("columns", [64, 384, 300])
def test_fp8_tiles_may_be_cut_at_the_edges(rows: int, columns: int) -> None:
    """transformers refuses such shapes; the published ones (576 rows in DeepSeek-V3) have them."""
    codes, scales = torch.randn(512, 384).to(torch.float8_e4m3fn), torch.rand(4, 3)
    whole = decode_fp8(codes, scales, (128, 128), torch.bfloat16)
    part = scales[: -(-rows // 128), : -(-columns // 128)]
    assert torch.equal(
        decode_fp8(codes[:rows, :columns], part, (128, 128), torch.bfloat16), whole[:rows, :columns]
    )


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles of"):
        decode_fp8(torch.zeros(130, 8).to(torch.float8_e4m3fn), torch.ones(1, 1), (128, 128), torch.float32)
    with pytest.raises(ValueError, match="MXFP4"):
        decode_mxfp4(torch.zeros(4, 2, 16).byte(), torch.zeros(4, 1).byte(), torch.float32)
