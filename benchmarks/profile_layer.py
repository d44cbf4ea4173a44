"""Where the time of one packed experts layer goes, forward and backward with LoRA.

    python benchmarks/profile_layer.py                   Qwen3-30B-A3B's layer on a GPU, by kernel
    python benchmarks/profile_layer.py --device cpu      a small layer, beside a plain loop over experts

`benchmarks/layer.py` compares and times; this only takes apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, combine, dispatch, packed_linear, reference_linear, route
from fourfold.kernels.layer import silu_experts

# E experts, T tokens, k experts a token, H hidden, I intermediate
SHAPES = {"cuda": (128, 8192, 8, 2048, 768), "cpu": (4, 512, 2, 576, 1536)}
RANK = 16


def milliseconds(step: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Mean of some calls, after two that do not count."""
    for _ in range(2):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(SHAPES), default="cuda")
    parser.add_argument("--tokens", type=int)
    arguments = parser.parse_args()
    device = arguments.device
    E, T, k, H, I = SHAPES[device]  # noqa: E741
    T = arguments.tokens or T
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    up, down = (
        pack_stack(
            PackedStack.empty(PackFormat("nf4", 64, True), StackShape(E, n, columns, parts), device),
            torch.randn(E, n, columns, device=device) * columns**-0.5,
            "w",
        )
        for n, columns, parts in ((2 * I, H, 2), (H, I, 1))
    )
    low_up, low_down = (
        LowRank(
            torch.randn(E, RANK, columns, device=device).requires_grad_(),
            torch.randn(E, n, RANK, device=device).requires_grad_(),
        )
        for n, columns in ((2 * I, H), (H, I))
    )
    x = torch.randn(T, H, device=device, dtype=dtype, requires_grad=True)
    scores = torch.randn(T, E, device=device) + torch.randn(E, device=device)
    weights, index = torch.softmax(scores, -1).topk(k)

    def packed() -> None:
        routing = route(index, E)
        if device == "cuda":
            y = silu_experts(x, weights, routing, up, down, low_up, low_down, compute_dtype=dtype)
        else:
            gate, lift = packed_linear(dispatch(x, routing), up, routing.offsets_E, low_up).chunk(2, 1)
            act = torch.nn.functional.silu(gate) * lift
            y = combine(packed_linear(act, down, routing.offsets_E, low_down), weights, routing, dtype)
        y.sum().backward()

    def loop() -> None:
        order = index.reshape(-1).argsort(stable=True)
        offsets = torch.bincount(index.reshape(-1), minlength=E).cumsum(0).int()
        rows = reference_linear(x[order // k], up, offsets, low_up.a_ERK, low_up.b_ENR)
        gate, lift = rows.chunk(2, 1)
        act = torch.nn.functional.silu(gate) * lift
        rows = reference_linear(act, down, offsets, low_down.a_ERK, low_down.b_ENR)
        weighted = rows * weights.reshape(-1)[order, None]
        torch.zeros_like(x).index_add(0, order // k, weighted).sum().backward()

    print(f"{device}: {E} experts, {T} tokens x {k}, {H} x {I}, rank {RANK}, torch {torch.__version__}")
    print(f"packed: {milliseconds(packed, device):.2f} ms")
    if device == "cpu":
        print(f"loop:   {milliseconds(loop, device):.2f} ms ({torch.get_num_threads()} threads)")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as seen:
        for _ in range(3):
            packed()
        if device == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=50))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
