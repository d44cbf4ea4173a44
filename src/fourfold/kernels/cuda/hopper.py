"""Products over packed experts by the Hopper kernel (`hopper.cu`): what it can do, and its launch."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.codebooks import absmax_codes, four_bit_codes
from fourfold.formats.plain import PlainStack
from fourfold.kernels.cuda import compile as compiled
from fourfold.kernels.cuda.hopper_source import CLUSTER, THREADS, shared_bytes, source

STEP = 64  # weights of a row that are decoded together
MAX_EXPERTS = 1024
_UINT8, _UINT16 = 0, 1  # CU_TENSOR_MAP_DATA_TYPE
_SWIZZLE = {32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE of bytes
_PROMOTE_256 = 3  # CU_TENSOR_MAP_L2_PROMOTION
_PRODUCT, _SCALES = "grouped_product", "scales_by_block"


def refusal(
    fmt: PackFormat | None,
    shape: StackShape,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    *,
    plain: tuple[torch.dtype, tuple[int, ...]] | None = None,
    aligned: bool = True,
) -> str | None:
    """Why the kernel cannot compute on a GPU, or None.

    Args:
        fmt: how weights are packed; None where they are not.
        shape: of the weights.
        dtype: of rows.
        capability: of the GPU; None: it is not NVIDIA's.
        plain: dtype and strides of weights that are not packed.
        aligned: the weights begin at a multiple of 16 bytes.
    """
    if capability is None or torch.version.hip is not None:
        return "it runs on NVIDIA GPUs"
    if capability[0] != 9:
        had = ".".join(map(str, capability))
        return f"it is written in instructions of Hopper (capability 9.x; this GPU has {had})"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies in bf16 or fp16, not in {dtype}"
    if not aligned:
        return "it wants weights at a multiple of 16 bytes"
    if plain is not None:
        weights_dtype, strides = plain
        if weights_dtype != dtype:
            return f"it multiplies {dtype} by weights of {dtype}, not of {weights_dtype}"
        if 1 not in strides[1:] or any(s * 2 % 16 for s in strides if s != 1):
            return f"it wants rows or columns of weights in one piece, not strides of {strides}"
    if fmt is not None and fmt.is_4bit and fmt.blocksize < STEP:
        return f"it reads blocks of {STEP} weights or more, not of {fmt.blocksize}"
    if shape.rows % STEP or shape.columns % STEP:
        return f"it wants sides that are multiples of {STEP}, not {shape.rows} x {shape.columns}"
    if shape.experts > MAX_EXPERTS:
        return f"it takes {MAX_EXPERTS} experts at most, not {shape.experts}"
    return unavailable()


@functools.cache
def unavailable() -> str | None:
    """Why it cannot be compiled here, or None."""
    try:
        compiled.driver()
        _cubin(_Variant(False, torch.bfloat16, 4, False))
    except compiled.CompilerMissingError as error:
        return str(error)
    return None


class _Variant(NamedTuple):
    """What the source is compiled for."""

    transposed: bool
    dtype: torch.dtype
    bits: int
    wide: bool


def _cubin(variant: _Variant) -> bytes:
    switches = {
        "TRANSPOSED": variant.transposed,
        "HALF": variant.dtype == torch.float16,
        "WEIGHTS": variant.bits,
        "WIDE": variant.wide,
    }
    return compiled.cubin(source(), "sm_90a", tuple(f"{name}={int(on)}" for name, on in switches.items()))


def _launcher(variant: _Variant, device: int) -> compiled.Launcher:
    found: compiled.Launcher | None = compiled.launchers().get((_PRODUCT, variant, device))
    if found is None:
        kernel = compiled.function(_cubin(variant), _PRODUCT, shared_bytes(variant.bits), device)
        found = compiled.Launcher(kernel, device, maps=3, pointers=5, ints=6)
        compiled.launchers()[_PRODUCT, variant, device] = found
    return found


def _scales_launcher(device: int) -> compiled.Launcher:
    found: compiled.Launcher | None = compiled.launchers().get((_SCALES, device))
    if found is None:
        kernel = compiled.function(_cubin(_Variant(False, torch.bfloat16, 4, False)), _SCALES, 0, device)
        found = compiled.Launcher(kernel, device, maps=0, pointers=6, ints=7)
        compiled.launchers()[_SCALES, device] = found
    return found


@functools.cache
def _blocks(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count // CLUSTER * CLUSTER


@functools.lru_cache(maxsize=8192)
def _tensor_map(
    kind: int, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> ctypes.Array[ctypes.c_char]:
    """A tensor for the copy engine: sizes and box innermost first, strides in bytes of all but that.

    Addresses come back (memory is reused), so maps are kept; they describe memory and own none.
    """
    memory = (ctypes.c_char * 192)()
    start = -ctypes.addressof(memory) % 64
    made = (ctypes.c_char * 128).from_buffer(memory, start)
    rank = len(sizes)
    status = compiled.driver().cuTensorMapEncodeTiled(
        made,
        kind,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        0,  # not interleaved
        _SWIZZLE[box[0] * (2 if kind == _UINT16 else 1)],
        _PROMOTE_256,
        0,  # zeros outside
    )
    compiled.check(status, f"a tensor of {sizes}, strides {strides}")
    return made


def scales_by_block(stack: PackedStack, offsets_E: torch.Tensor, stream: int) -> torch.Tensor:
    """Absmax of every 64 columns of a 4-bit stack in larger or equal blocks, fp32 ``[E, K / 64, N]``.

    It is what the kernel reads: a thirty-second of the decoded weights, and lies only as long as a product.
    The stack's device must be the current one. Experts without rows are left undefined.
    """
    fmt, shape, device = stack.fmt, stack.shape, stack.data.device
    E, N, blocks = shape.experts, shape.rows, shape.columns // STEP
    out = torch.empty(E, blocks, N, dtype=torch.float32, device=device)
    absmax, nothing = stack.absmax.data_ptr(), 0
    groups, part_rows = 0, N
    more = [nothing] * 3
    if fmt.double_quant:
        assert stack.absmax_scale is not None
        assert stack.absmax_offset is not None
        groups, part_rows = stack.absmax_scale.shape[-1], N // shape.parts
        more = [t.data_ptr() for t in (stack.absmax_scale, stack.absmax_offset, absmax_codes(device))]
    _scales_launcher(out.get_device())(
        (-(-N // 64), -(-blocks // 32), E),
        256,
        0,
        stream,
        (),
        (absmax, *more, out.data_ptr(), offsets_E.data_ptr()),
        (N, blocks, shape.blocks(fmt), fmt.blocksize // STEP, part_rows, groups, int(fmt.double_quant)),
    )
    return out


def _weights_map(stack: PackedStack | PlainStack, transposed: bool) -> tuple[Any, int, bool]:
    """The weights for the copy engine, their bits, and whether memory runs along the result's columns."""
    E, N, K = stack.shape.experts, stack.shape.rows, stack.shape.columns
    if isinstance(stack, PackedStack):
        bits = 4 if stack.fmt.is_4bit else 8
        step_bytes, row_bytes = STEP * bits // 8, stack.data.shape[2]
        box = (2 * step_bytes, STEP, 1) if transposed else (step_bytes, 2 * STEP, 1)
        sizes, strides = (row_bytes, N, E), (row_bytes, row_bytes * N)
        return _tensor_map(_UINT8, stack.data.data_ptr(), sizes, strides, box), bits, False
    along_k = stack.data.stride(2) == 1
    wide = along_k == transposed
    sizes = (K, N, E) if along_k else (N, K, E)
    strides = (stack.data.stride(1 if along_k else 2) * 2, stack.data.stride(0) * 2)
    box = (STEP, STEP if wide else 2 * STEP, 1)
    return _tensor_map(_UINT16, stack.data.data_ptr(), sizes, strides, box), 16, wide


def _rows_map(rows_SC: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    S, columns = rows_SC.shape
    return _tensor_map(_UINT16, rows_SC.data_ptr(), (columns, S), (rows_SC.stride(0) * 2,), (STEP, 64))


def hopper_product(
    x_Sc: torch.Tensor,
    stack: PackedStack | PlainStack,
    offsets_E: torch.Tensor,
    factor: torch.Tensor | None = None,
    *,
    transposed: bool,
    low_SR: torch.Tensor | None = None,
) -> torch.Tensor:
    """`kernels.linear.product` of rows in bf16 or fp16; see `refusal` for what it takes.

    Args:
        x_Sc: ``[S, K (+ R)]``, or transposed ``[S, N (+ R)]``; copied unless rows lie in one piece each, at
            multiples of 16 bytes.
        stack: ``[E, N, K]``, packed or in the dtype of the rows.
        offsets_E: ends of the experts' rows, int32.
        factor: contiguous B ``[E, N, R]``; transposed, A ``[E, R, K]``. R even.
        transposed: multiply by W instead of its transpose.
        low_SR: the low-rank columns, where they do not lie behind the rows.

    Returns:
        ``[S, N]``, or transposed ``[S, K]``.

    Raises:
        ValueError: offsets of another dtype, or tensors on different devices.
    """
    if offsets_E.dtype != torch.int32:
        raise ValueError(f"offsets have to be int32, not {offsets_E.dtype}")
    others = {t.device for t in (stack.data, offsets_E, factor, low_SR) if t is not None} - {x_Sc.device}
    if others:
        raise ValueError(f"rows are on {x_Sc.device}, weights or offsets on {', '.join(map(str, others))}")
    x_Sc = compiled.readable(x_Sc)
    if factor is not None:
        factor = compiled.aligned(factor.contiguous())
    shape, device, S = stack.shape, x_Sc.device, x_Sc.shape[0]
    C, M = (shape.rows, shape.columns) if transposed else (shape.columns, shape.rows)
    R = 0 if factor is None else factor.shape[1 if transposed else 2]
    assert x_Sc.shape[1] == (C if low_SR is not None else C + R)
    assert R % 2 == 0
    out_SM = torch.empty(S, M, dtype=x_Sc.dtype, device=device)
    if S == 0:
        return out_SM
    with torch.cuda.device_of(x_Sc):
        index = x_Sc.get_device()
        stream = compiled.stream(index)
        map_w, bits, wide = _weights_map(stack, transposed)
        scales = codes = offsets_E  # (not read)
        if isinstance(stack, PackedStack):
            scales = codes = compiled.aligned(stack.absmax)
            if bits == 4:
                scales = scales_by_block(stack, offsets_E, stream)
                codes = four_bit_codes(stack.fmt.quant_type, device)
        map_x = map_low = _rows_map(x_Sc)
        if low_SR is not None:
            assert low_SR.shape == (S, R)
            low_SR = compiled.readable(low_SR)
            map_low = _rows_map(low_SR)
        used = (offsets_E, scales, codes, codes if factor is None else factor, out_SM)
        _launcher(_Variant(transposed, x_Sc.dtype, bits, wide), index)(
            (_blocks(index), 1, 1),
            THREADS,
            shared_bytes(bits),
            stream,
            (map_x, map_w, map_low),
            [t.data_ptr() for t in used],
            (shape.experts, M, C, R, M, C if low_SR is None else 0),
        )
    return out_SM
