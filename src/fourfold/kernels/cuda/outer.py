"""Sums over an expert's rows (`outer.cu`): the gradients of low-rank factors, without the host waiting."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from fourfold.kernels.cuda import compile as compiled

MOST_RANK = 32
"""Each 16 of a rank read the wide rows again; beyond it general products are the better ones."""
THREADS, TILE_N, TILE_R = 128, 128, 16
SHARED_BYTES = 3 * 64 * (TILE_N * 2 + 48)


@functools.cache
def _source() -> str:
    return (Path(__file__).parent / "outer.cu").read_text(encoding="utf-8")


def _cubin(wide_first: bool, dtype: torch.dtype, capability: tuple[int, int]) -> bytes:
    definitions = (f"WIDE_FIRST={int(wide_first)}", f"HALF={int(dtype == torch.float16)}")
    return compiled.cubin(_source(), compiled.portable_architecture(capability), definitions)


@functools.cache
def can(dtype: torch.dtype, device: torch.device, rank: int) -> bool:
    """Whether `outer` computes on this device; matrices must also lie as it wants them."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if (
        dtype not in (torch.bfloat16, torch.float16)
        or not 0 < rank <= MOST_RANK
        or rank % 8
        or capability < (8, 0)
    ):
        return False
    try:
        compiled.driver()
        _cubin(False, dtype, capability)
    except compiled.CompilerMissingError:
        return False
    return True


def takes(*matrices: torch.Tensor) -> bool:
    """Whether rows are in one piece, of whole 16 bytes, and begin at multiples of them."""
    return all(
        t.stride(1) == 1 and t.shape[1] % 8 == 0 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
        for t in matrices
    )


def outer(x_SM: torch.Tensor, y_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """``x[rows of e]^T y[rows of e]``, ``[E, M, N]``; the narrower of the two is the low-rank one.

    Args:
        x_SM: rows sorted by expert, bf16 or fp16; see `can` and `takes`.
        y_SN: likewise.
        offsets_E: ends of the experts' rows, int32.
    """
    assert offsets_E.dtype == torch.int32
    (M, N), E, device = (x_SM.shape[1], y_SN.shape[1]), offsets_E.shape[0], x_SM.device
    wide_first = M > N
    rows, low = (x_SM, y_SN) if wide_first else (y_SN, x_SM)
    out_EMN = torch.empty(E, M, N, dtype=x_SM.dtype, device=device)
    key = ("outer", wide_first, x_SM.dtype, x_SM.get_device())
    with torch.cuda.device_of(x_SM):
        launcher = compiled.launchers().get(key)
        if launcher is None:
            code = _cubin(wide_first, x_SM.dtype, torch.cuda.get_device_capability(device))
            kernel = compiled.function(code, "grouped_outer", SHARED_BYTES, key[3])
            launcher = compiled.launchers()[key] = compiled.Launcher(
                kernel, key[3], maps=0, pointers=4, ints=4
            )
        columns, rank = rows.shape[1], low.shape[1]
        launcher(
            (-(-columns // TILE_N), -(-rank // TILE_R), E),
            THREADS,
            SHARED_BYTES,
            compiled.stream(key[3]),
            (),
            (rows.data_ptr(), low.data_ptr(), offsets_E.data_ptr(), out_EMN.data_ptr()),
            (columns, rank, rows.stride(0), low.stride(0)),
        )
    return out_EMN
