"""The Triton decoder against its plain-torch twin: equal bits (on the CPU through Triton's interpreter)."""

import pytest
import torch

import needs
from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.quantize import pack_stack

triton = needs.triton()

FORMATS = [
    PackFormat("nf4"),
    PackFormat("nf4", 64, True),
    PackFormat("nf4", 32, True),
    PackFormat("fp4", 128),
    PackFormat("fp4", 64, True),
    PackFormat("int8"),
]


def rounded(w_fp32: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the kernel should store. Triton's interpreter cuts bf16 off where a GPU rounds to nearest."""
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        w_fp32 = (w_fp32.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return w_fp32.to(dtype)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [128, 200])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equals_the_torch_decoder(fmt: PackFormat, columns: int, dtype: torch.dtype) -> None:
    from fourfold.kernels.decode_triton import decode_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    stack = PackedStack.empty(fmt, StackShape(3, 40, columns, parts=2), device)
    pack_stack(stack, torch.randn(3, 40, columns, device=device), "w")
    wanted = rounded(decode_stack(stack, torch.float32), dtype)
    for extra_rows, extra_columns in ((0, 0), (8, 0), (0, 70)):
        row = -(-columns // fmt.blocksize) * fmt.blocksize if fmt.is_4bit else columns
        out_ENs = torch.full((3, 40 + extra_rows, row + extra_columns), 7.0, dtype=dtype, device=device)
        decode_triton(stack, out_ENs)
        assert torch.equal(out_ENs[:, :40, :columns], wanted)
        assert bool((out_ENs[:, 40:] == 7).all())
        assert bool((out_ENs[..., row:] == 7).all())
