"""Sorting routed rows by expert in few launches, where `routing.route_sorted` takes six operations of torch.

Their host time is what a small layer waits for (150 us on an H100's host, 63 of them the sort alone; a launch
of Triton takes 29). A row's place is

    rows of smaller experts + rows of the same expert before it

and both are counts. The order is that of a stable sort and always the same: every output has one writer, and
there are no atomics between programs.

*Few rows or experts* (`ONE_LAUNCH` of their product): one launch. The program of an expert reads all rows
twice: it counts those below it and its own, then numbers its own. So all programs together read E times S
numbers, from the L2 cache.

*More*: a histogram of each tile of rows (one launch), a running sum over ``[E, tiles]`` (torch), and each
row's place from the sum before its tile and from the tile's rows before it (one launch).

An index that is no expert's goes last, behind the last offset: what is computed of such a row is undefined,
as everywhere, but it is a row (`order_S` is a permutation whatever the indices are).

S = T*k routed rows, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# E times S. That is 4,096 tokens of Qwen3-30B-A3B, about as many as a layer waits for the host with.
ONE_LAUNCH = 2**22
TILE, PART = 256, 32  # rows of a program, and how many it compares them with at a time


@triton.jit
def _expert_of(index_ptr, row, S, E):
    """Expert of each row; E for an index that is none, E + 1 past the last row."""
    expert = tl.load(index_ptr + row, mask=row < S, other=0)
    expert = tl.where((expert < 0) | (expert >= E), E, expert).to(tl.int32)
    return tl.where(row < S, expert, E + 1)


@triton.jit(do_not_specialize=["S"])
def _by_expert_kernel(index_ptr, order_ptr, position_ptr, expert_ptr, offsets_ptr, S, E, ROWS: tl.constexpr):
    mine = tl.program_id(0)
    below = tl.zeros((ROWS,), dtype=tl.int32)
    own = tl.zeros((ROWS,), dtype=tl.int32)
    for start in range(0, S, ROWS):
        expert = _expert_of(index_ptr, start + tl.arange(0, ROWS), S, E)
        below += (expert < mine).to(tl.int32)
        own += (expert == mine).to(tl.int32)
    at = tl.sum(below, 0)
    end = at + tl.sum(own, 0)
    if mine < E:
        tl.store(offsets_ptr + mine, end)
    if end > at:
        for start in range(0, S, ROWS):
            row = start + tl.arange(0, ROWS)
            hit = _expert_of(index_ptr, row, S, E) == mine
            to = at + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(order_ptr + to, row.to(tl.int64), mask=hit)
            tl.store(position_ptr + row, to.to(tl.int64), mask=hit)
            tl.store(expert_ptr + to, mine, mask=hit)
            at += tl.sum(hit.to(tl.int32), 0)


@triton.jit(do_not_specialize=["S", "tiles"])
def _count_kernel(index_ptr, counts_ptr, S, E, tiles, EP: tl.constexpr, ROWS: tl.constexpr):
    tile = tl.program_id(0)
    counts = tl.histogram(_expert_of(index_ptr, tile * ROWS + tl.arange(0, ROWS), S, E), EP)
    e = tl.arange(0, EP)
    tl.store(counts_ptr + e * tiles + tile, counts, mask=e <= E)


@triton.jit(do_not_specialize=["S", "tiles"])
def _place_kernel(
    index_ptr,
    ends_ptr,
    order_ptr,
    position_ptr,
    expert_ptr,
    offsets_ptr,
    S,
    E,
    tiles,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < S
    expert = _expert_of(index_ptr, row, S, E)
    before = tl.zeros((ROWS,), dtype=tl.int32)
    for start in range(0, ROWS, OTHERS):
        other = tile * ROWS + start + tl.arange(0, OTHERS)
        same = _expert_of(index_ptr, other, S, E)[None, :] == expert[:, None]
        before += tl.sum((same & (other[None, :] < row[:, None])).to(tl.int32), 1)
    at = expert * tiles + tile
    to = tl.load(ends_ptr + at - 1, mask=live & (at > 0), other=0) + before
    tl.store(order_ptr + to, row.to(tl.int64), mask=live)
    tl.store(position_ptr + row, to.to(tl.int64), mask=live)
    tl.store(expert_ptr + to, expert, mask=live)
    if tile == 0:
        e = tl.arange(0, EP)
        end = tl.load(ends_ptr + e * tiles + tiles - 1, mask=e < E, other=0)
        tl.store(offsets_ptr + e, end, mask=e < E)


def route_triton(
    top_k_index_Tk: torch.Tensor, num_experts: int, *, one_launch: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by expert.

    Args:
        top_k_index_Tk: expert of each token and slot, any integers.
        num_experts: E.
        one_launch: which of the two ways; by size without it.

    Returns:
        order ``[S]`` int64, position ``[T, k]`` int64, expert ``[S]`` int32, offsets ``[E]`` int32, as
        `routing.Routing` has them.
    """
    index_S = top_k_index_Tk.contiguous().view(-1)  # (`reshape` may leave strides)
    S, E, device = index_S.numel(), num_experts, index_S.device
    order_S = torch.empty(S, dtype=torch.int64, device=device)
    position_Tk = torch.empty(top_k_index_Tk.shape, dtype=torch.int64, device=device)
    expert_S = torch.empty(S, dtype=torch.int32, device=device)
    offsets_E = torch.empty(E, dtype=torch.int32, device=device)
    outputs = (order_S, position_Tk, expert_S, offsets_E)
    if one_launch is None:
        one_launch = E * S <= ONE_LAUNCH
    with torch.cuda.device_of(index_S):  # Triton launches on the current device
        if one_launch:
            rows, warps = (1024, 4) if S <= 4096 else (4096, 8)
            _by_expert_kernel[(E + 1,)](index_S, *outputs, S, E, ROWS=rows, num_warps=warps)
            return outputs
        tiles = triton.cdiv(S, TILE)
        counts = torch.empty((E + 1) * tiles, dtype=torch.int32, device=device)
        EP = triton.next_power_of_2(E + 2)
        _count_kernel[(tiles,)](index_S, counts, S, E, tiles, EP=EP, ROWS=TILE, num_warps=4)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        _place_kernel[(tiles,)](
            index_S, ends, *outputs, S, E, tiles, EP=EP, ROWS=TILE, OTHERS=PART, num_warps=4
        )
    return outputs
