"""Routing by `routing.cu`: what `route_triton` (its first way) and `routing_triton` do, launched faster."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from fourfold.kernels.cuda import compile as compiled

ROUTE, SUM = 0, 1
THREADS = 256
_KERNELS = {ROUTE: ("route", 5, 2), SUM: ("sum_rows", 4, 5)}  # name, pointers, ints
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _source() -> str:
    return (Path(__file__).parent / "routing.cu").read_text(encoding="utf-8")


def _cubin(mode: int, dtype: torch.dtype, capability: tuple[int, int]) -> bytes:
    switches = (f"MODE={mode}", f"HALF={int(dtype == torch.float16)}")
    return compiled.cubin(_source(), compiled.portable_architecture(capability), switches)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether these kernels can be compiled for a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return False
    try:
        compiled.driver()
        _cubin(ROUTE, torch.bfloat16, capability)
    except compiled.CompilerMissingError:
        return False
    return True


def _launcher(mode: int, dtype: torch.dtype, device: int) -> compiled.Launcher:
    key = ("routing", mode, dtype, device)
    found: compiled.Launcher | None = compiled.launchers().get(key)
    if found is None:
        name, pointers, ints = _KERNELS[mode]
        code = _cubin(mode, dtype, torch.cuda.get_device_capability(device))
        kernel = compiled.function(code, name, 0, device)
        found = compiled.Launcher(kernel, device, maps=0, pointers=pointers, ints=ints)
        compiled.launchers()[key] = found
    return found


def route(
    top_k_index_Tk: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route_triton` in its first way: every block reads all rows, so for few rows or experts.

    Args:
        top_k_index_Tk: contiguous, int64.
        num_experts: E.
    """
    S, E, device = top_k_index_Tk.numel(), num_experts, top_k_index_Tk.device
    assert top_k_index_Tk.dtype == torch.int64
    assert top_k_index_Tk.is_contiguous()
    order_S = torch.empty(S, dtype=torch.int64, device=device)
    position_Tk = torch.empty_like(top_k_index_Tk)
    expert_S = torch.empty(
        S, dtype=torch.int32, device=device
    )  # (views of one would be no operator's results)
    offsets_E = torch.empty(E, dtype=torch.int32, device=device)
    outputs = (order_S, position_Tk, expert_S, offsets_E)
    with torch.cuda.device_of(top_k_index_Tk):
        index = top_k_index_Tk.get_device()
        _launcher(ROUTE, torch.bfloat16, index)(
            (E + 1, 1, 1),
            THREADS,
            0,
            compiled.stream(index),
            (),
            (top_k_index_Tk.data_ptr(), *(t.data_ptr() for t in outputs)),
            (S, E),
        )
    return outputs


def can_sum(
    rows_SH: torch.Tensor, position_Tk: torch.Tensor, weights_Tk: torch.Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether `sum_rows` takes these: rows of 16 bits in whole 16 bytes, numbers of a kind it knows."""
    return (
        position_Tk.dtype == torch.int64
        and position_Tk.is_contiguous()
        and rows_SH.dtype in (torch.bfloat16, torch.float16)
        and rows_SH.shape[1] % 8 == 0
        and rows_SH.is_contiguous()
        and rows_SH.data_ptr() % 16 == 0
        and dtype in _KINDS
        and (weights_Tk is None or weights_Tk.dtype in _KINDS)
        and available(rows_SH.device)
    )


def sum_rows(
    rows_SH: torch.Tensor, position_Tk: torch.Tensor, weights_Tk: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`routing_triton.sum_rows_triton`."""
    T, k = position_Tk.shape
    H = rows_SH.shape[1]
    out_TH = torch.empty(T, H, dtype=dtype, device=rows_SH.device)
    if out_TH.numel() == 0:
        return out_TH
    blocks = -(-(H // 8) // THREADS)
    if weights_Tk is not None:
        weights_Tk = weights_Tk.contiguous()
    with torch.cuda.device_of(rows_SH):
        index = rows_SH.get_device()
        _launcher(SUM, rows_SH.dtype, index)(
            (T * blocks, 1, 1),
            THREADS,
            0,
            compiled.stream(index),
            (),
            (
                rows_SH.data_ptr(),
                position_Tk.data_ptr(),
                0 if weights_Tk is None else weights_Tk.data_ptr(),
                out_TH.data_ptr(),
            ),
            (H // 8, k, -1 if weights_Tk is None else _KINDS[weights_Tk.dtype], _KINDS[dtype], blocks),
        )
    return out_TH
