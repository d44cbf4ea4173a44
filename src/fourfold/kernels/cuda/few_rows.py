"""Products over packed experts of few rows each (`few_rows.cu`): what the kernel can do, and its launch."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.codebooks import absmax_codes, four_bit_codes
from fourfold.kernels.cuda import compile as compiled

THREADS, TILE_M = 128, 32
MAX_EXPERTS = 65535  # of a grid's second side


@functools.cache
def _source() -> str:
    return (Path(__file__).parent / "few_rows.cu").read_text(encoding="utf-8")


def _cubin(bits: int, dtype: torch.dtype, capability: tuple[int, int]) -> bytes:
    switches = (f"WEIGHTS={bits}", f"HALF={int(dtype == torch.float16)}")
    return compiled.cubin(_source(), compiled.portable_architecture(capability), switches)


def refusal(
    fmt: PackFormat | None,
    shape: StackShape,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    *,
    transposed: bool,
    aligned: bool = True,
) -> str | None:
    """Why the kernel cannot compute on a GPU, or None.

    Args:
        fmt: how weights are packed; None where they are not.
        shape: of the weights.
        dtype: of rows.
        capability: of the GPU; None: it is not NVIDIA's.
        transposed: the gradient of the input is wanted.
        aligned: the weights begin at a multiple of 16 bytes.
    """
    if capability is None or torch.version.hip is not None:
        return "it runs on NVIDIA GPUs"
    if capability < (8, 0):
        return "it needs a GPU of capability 8.0 or more, and this one has {}.{}".format(*capability)
    if transposed:
        return "it computes forward alone"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies in bf16 or fp16, not in {dtype}"
    if fmt is None:
        return "it multiplies with packed weights"
    if not aligned:
        return "it wants weights at a multiple of 16 bytes"
    if fmt.is_4bit and (fmt.blocksize < 32 or fmt.blocksize & (fmt.blocksize - 1)):
        return f"it reads blocks of 32 weights or more, by powers of two, not of {fmt.blocksize}"
    if shape.experts > MAX_EXPERTS:
        return f"it takes {MAX_EXPERTS} experts at most, not {shape.experts}"
    multiple = 8 if fmt.is_4bit else 16
    if shape.columns % multiple or shape.rows % 2:
        return (
            f"it wants an even number of rows and columns by {multiple}, not {shape.rows} x {shape.columns}"
        )
    return unavailable(capability)


@functools.cache
def unavailable(capability: tuple[int, int]) -> str | None:
    """Why it cannot be compiled for a GPU, or None."""
    try:
        compiled.driver()
        _cubin(4, torch.bfloat16, capability)
    except compiled.CompilerMissingError as error:
        return str(error)
    return None


def _launcher(bits: int, dtype: torch.dtype, device: int) -> compiled.Launcher:
    key = ("few_rows", bits, dtype, device)
    found: compiled.Launcher | None = compiled.launchers().get(key)
    if found is None:
        code = _cubin(bits, dtype, torch.cuda.get_device_capability(device))
        kernel = compiled.function(code, "few_rows", 0, device)
        found = compiled.launchers()[key] = compiled.Launcher(kernel, device, maps=0, pointers=11, ints=12)
    return found


def _tiles_of_a_block(rows: int) -> int:
    """A block makes tables first: where there are blocks for all processors anyway, it uses them longer."""
    return 1 if rows < 32 else 2


def few_rows_product(
    x_Sc: torch.Tensor,
    stack: PackedStack,
    offsets_E: torch.Tensor,
    factor_ENR: torch.Tensor | None = None,
    low_SR: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T``, the low-rank columns included; see `refusal` for what it takes. Any number of rows.

    Args:
        x_Sc: ``[S, K (+ R)]``, bf16 or fp16; rows in one piece each, at multiples of 16 bytes.
        stack: ``[E, N, K]``.
        offsets_E: ends of the experts' rows, int32.
        factor_ENR: contiguous; R even.
        low_SR: the low-rank columns, where they do not lie behind the rows.

    Returns:
        ``[S, N]``.

    Raises:
        ValueError: offsets or factors of another dtype, too few offsets, tensors on different devices.
    """
    if offsets_E.dtype != torch.int32:
        raise ValueError(f"offsets have to be int32, not {offsets_E.dtype}")
    others = {t.device for t in (stack.data, offsets_E, factor_ENR, low_SR) if t is not None} - {x_Sc.device}
    if others:
        raise ValueError(f"rows are on {x_Sc.device}, weights or offsets on {', '.join(map(str, others))}")
    if factor_ENR is not None and factor_ENR.dtype != x_Sc.dtype:
        raise ValueError(f"rows are {x_Sc.dtype}, factors {factor_ENR.dtype}")
    if offsets_E.numel() != stack.shape.experts:
        raise ValueError(f"{offsets_E.numel()} offsets of {stack.shape.experts} experts")
    fmt, shape, device, S = stack.fmt, stack.shape, x_Sc.device, x_Sc.shape[0]
    E, N, K = shape.experts, shape.rows, shape.columns
    R = 0 if factor_ENR is None else factor_ENR.shape[2]
    assert x_Sc.shape[1] == (K if low_SR is not None else K + R)
    assert R % 2 == 0
    out_SN = torch.empty(S, N, dtype=x_Sc.dtype, device=device)
    if S == 0:
        return out_SN
    x_Sc = compiled.readable(x_Sc)
    nothing = offsets_E  # (not read)
    scales = (nothing, nothing, nothing)
    groups, part_rows = 0, N
    if fmt.double_quant:
        assert stack.absmax_scale is not None
        assert stack.absmax_offset is not None
        groups, part_rows = stack.absmax_scale.shape[-1], N // shape.parts
        scales = (stack.absmax_scale, stack.absmax_offset, absmax_codes(device))
    codes = four_bit_codes(fmt.quant_type, device) if fmt.is_4bit else nothing
    factor = nothing if factor_ENR is None else compiled.aligned(factor_ENR.contiguous())
    if low_SR is None:
        low_SR = x_Sc[:, K:]
    else:
        assert low_SR.shape == (S, R)
        low_SR = compiled.readable(low_SR)
    used = (x_Sc, stack.data, stack.absmax, *scales, codes, offsets_E, factor, low_SR, out_SN)
    stored = shape.blocks(fmt) if fmt.is_4bit else 1
    row_bytes = stack.data.shape[2]
    with torch.cuda.device_of(x_Sc):
        index = x_Sc.get_device()
        _launcher(4 if fmt.is_4bit else 8, x_Sc.dtype, index)(
            (-(-N // TILE_M // _tiles_of_a_block(S)), min(E, S), 1),
            THREADS,
            0,
            compiled.stream(index),
            (),
            [t.data_ptr() for t in used],
            (
                E, N, K, R, x_Sc.stride(0), row_bytes, fmt.blocksize.bit_length() - 1, stored, part_rows,
                groups, int(fmt.double_quant), low_SR.stride(0),
            ),
        )  # fmt: skip
    return out_SN
