"""Products that decode inside compile for every card, and fit into its shared memory; without a GPU."""

import os
import subprocess
import sys

import pytest

import needs

needs.triton()

# Bytes a program may have, by capability; 8.6 and 8.9 are the smallest.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}

COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.kernels import grouped_triton, product_triton

if sys.argv[1].startswith("gfx"):
    target, torch.version.hip = GPUTarget("hip", sys.argv[1], 64), "6.4"
else:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
HALF, SHAPE = torch.float16, StackShape(128, 1536, 2048, 2)
NAMES = {torch.float16: "*fp16", torch.float32: "*fp32"}


def compiled(kernel, constants, types, options, ones=()):
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in ones:
            signature[name], values[(i,)] = "constexpr", constants.get(name, 1)
            continue
        signature[name] = types.get(name, "*fp32") if name.endswith("_ptr") else "i32"
        if name != "parts":
            aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, values, aligned), target=target, options=options)


def product(stack, tiles, dtype, transposed):
    constants = product_triton.constants(stack, 256, dtype, tiles, transposed=transposed)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    types = {name: NAMES[dtype] for name in ("x_ptr", "h_ptr", "factor_ptr", "y_ptr")}
    packed = not isinstance(stack, PlainStack)
    types["w_ptr"] = ("*i32" if stack.fmt.is_4bit else "*i8") if packed else NAMES[dtype]
    types["absmax_ptr"] = "*u8" if packed and stack.fmt.double_quant else "*fp32"
    types["offsets_ptr"] = "*i32"
    ones = ("stride_k", "factor_out" if transposed else "factor_r")
    return compiled(product_triton._product_kernel, constants, types, options, ones)


for fmt in (PackFormat("nf4", 64, True), PackFormat("int8"), None):
    for transposed in (False, True):
        tiles = product_triton.TILES[transposed, fmt is not None and fmt.is_4bit]
        cases = [(HALF, each) for each in tiles]
        if fmt is None or fmt.is_4bit:
            cases.append((torch.float32, product_triton.FP32_TILES[transposed]))
        for dtype, each in cases:
            if fmt is None:
                stack = PlainStack(SHAPE, torch.empty(0, dtype=dtype))
            else:
                stack = PackedStack.empty(fmt, SHAPE, "meta")
            print(product(stack, each, dtype, transposed).metadata.shared)
for BM in grouped_triton.COLUMNS:
    for BN in grouped_triton.COLUMNS:
        constants = {"BS": grouped_triton.ROWS, "BM": BM, "BN": BN, "PRECISION": "ieee"}
        types = {"x_ptr": "*fp16", "y_ptr": "*fp16", "out_ptr": "*fp16", "offsets_ptr": "*i32"}
        print(compiled(grouped_triton._outer_kernel, constants, types, {"num_warps": 4}).metadata.shared)
"""


@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_fits(capability: int) -> None:
    assert max(shared_memory(str(capability))) <= SHARED[capability]


@pytest.mark.parametrize("architecture", ["gfx90a", "gfx942"])
def test_every_configuration_compiles_for_rocm(architecture: str) -> None:
    """(None has been run there.)"""
    shared_memory(architecture)


def shared_memory(architecture: str) -> list[int]:
    """Of every configuration, in bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, architecture]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    sizes = [int(size) for size in run.stdout.split()]
    assert len(sizes) == 22
    return sizes
