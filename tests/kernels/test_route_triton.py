"""Rows sorted by counting against torch's stable sort: equal numbers (through Triton's interpreter)."""

import os
import subprocess
import sys

import pytest
import torch

import needs
from fourfold.kernels.routing import route_sorted

triton = needs.triton()
NAMES = ("order_S", "position_Tk", "expert_S", "offsets_E")
WAYS = {"one launch": True, "tiles": False}
# T, k, E: one row; odd; several tiles; experts past a power of two; more experts than rows; many experts
CASES = [(1, 1, 1), (37, 3, 6), (300, 4, 8), (1366, 3, 60), (2, 4, 257), (130, 8, 1024)]


def random_index(T: int, k: int, E: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Skewed, like a router's; the last expert of several gets no row."""
    scores = torch.randn(T, E) + 2 * torch.randn(E)
    if k < E:
        scores[:, -1] = -1e4
    return scores.topk(k).indices.to(dtype)


def compared(index: torch.Tensor, E: int, one_launch: bool) -> None:
    from fourfold.kernels.route_triton import route_triton

    wanted = route_sorted(index, E)
    for name, found in zip(NAMES, route_triton(index, E, one_launch=one_launch), strict=True):
        expected = getattr(wanted, name)
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("one_launch", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_stable_sort(case: tuple[int, int, int], one_launch: bool) -> None:
    compared(random_index(*case), case[2], one_launch)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("one_launch", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_any_integers_in_any_order(dtype: torch.dtype, one_launch: bool) -> None:
    """All rows of one expert; columns that lie apart in memory; tiles that are full to the last row."""
    compared(torch.full((512, 2), 3, dtype=dtype), 5, one_launch)
    compared(random_index(64, 8, 16, dtype)[:, ::2], 16, one_launch)


@pytest.mark.parametrize("one_launch", WAYS.values(), ids=WAYS.keys())
def test_what_is_no_expert_goes_last_and_moves_nobody(one_launch: bool) -> None:
    from fourfold.kernels.route_triton import route_triton

    E, index = 6, random_index(200, 2, 6)
    index[::7, 0], index[::11, 1] = E + 3, -1
    order, position, _, offsets = route_triton(index, E, one_launch=one_launch)
    real = (index >= 0) & (index < E)
    rows = int(real.sum())
    assert torch.equal(offsets, torch.bincount(index[real], minlength=E).cumsum(0).int())
    flat = index.flatten()[order[:rows]]
    assert torch.equal(flat, flat.sort().values)
    assert not real.flatten()[order[rows:]].any()
    assert torch.equal(order.sort().values, torch.arange(400))
    assert torch.equal(order[position.flatten()], torch.arange(400))


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourfold.kernels import route_triton as made

capability, experts = (int(a) for a in sys.argv[1:])
sizes = {"EP": triton.next_power_of_2(experts + 2), "OTHERS": made.PART}
for kernel, rows, warps in (
    (made._by_expert_kernel, 1024, 4),
    (made._by_expert_kernel, 4096, 8),
    (made._count_kernel, made.TILE, 4),
    (made._place_kernel, made.TILE, 4),
):
    constants = {n: v for n, v in (sizes | {"ROWS": rows}).items() if n in kernel.arg_names}
    wide = ("index_ptr", "order_ptr", "position_ptr")
    signature, values = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name in wide else "*i32"
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, values, {})
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps})
    print(kernel.fn.__name__, binary.metadata.shared, "atom.global" in binary.asm["ptx"])
"""


@pytest.mark.parametrize("experts", [6, 128, 1024])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_every_card(capability: int, experts: int) -> None:
    """Without a GPU; and nothing in memory that other programs see is written atomically."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability), str(experts)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.strip().splitlines()]
    assert len(lines) == 4
    assert all(int(shared) <= 48 * 1024 and atomic == "False" for _, shared, atomic in lines), lines
