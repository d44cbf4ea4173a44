"""Kernels over rows fit into the shared memory of every card, whatever the rank; compiled without a GPU."""

import os
import subprocess
import sys

import pytest

import needs

needs.triton()

# Bytes a program may have on the smallest of the supported cards (capability 8.6 and 8.9).
SMALLEST = 101_376

COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourfold.kernels import rows_triton

rank, target = int(sys.argv[1]), GPUTarget("cuda", int(sys.argv[2]), 32)
_, shared = rows_triton._launch(65536, torch.zeros(128, dtype=torch.int32), rank, torch.bfloat16)
options = {name: shared.pop(name) for name in ("num_warps", "num_stages")}
types = {"order_ptr": "*i64", "offsets_ptr": "*i32", "weights_ptr": "*fp32", "grad_weights_ptr": "*fp32"}
for kernel, own in (
    (rows_triton._gather_kernel, {"BK": rows_triton.gather_columns(rank), "WEIGHTED": True}),
    (rows_triton._silu_mul_kernel, {"BK": rows_triton.GATE_COLUMNS}),
    (rows_triton._silu_mul_backward_kernel, {"BK": rows_triton.GATE_COLUMNS, "KEEP_ACT": True}),
):
    constants = {n: v for n, v in {**shared, **own}.items() if n in kernel.arg_names}
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "*bf16") if name.endswith("_ptr") else "i32"
        aligned[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(kernel, signature, values, aligned), target=target, options=options)
    print(kernel.fn.__name__, made.metadata.shared)
"""


@pytest.mark.parametrize("rank", [16, 64, 128, 256, 512])
def test_any_rank_fits_the_smallest_card(rank: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(rank), "86"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    sizes = dict(line.split() for line in run.stdout.strip().splitlines())
    assert len(sizes) == 3
    assert all(int(size) <= SMALLEST for size in sizes.values()), sizes
