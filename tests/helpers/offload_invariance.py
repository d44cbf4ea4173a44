"""docs/offloading-invariance.md: offloaded experts against resident ones, for each layout and format.

``PYTHONPATH=src:tests/helpers python -m offload_invariance > docs/offloading-invariance.md`` writes it;
tests/offloading/test_invariance.py makes each cell again and compares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from unittest import mock

import torch
from torch import nn

import offloading
import own_forward
import tiny
from fourfold.formats import PackFormat
from fourfold.offloading import streamer
from fourfold.offloading.api import offload, units_of
from offloading import steps

FORMATS = {
    "NF4": PackFormat("nf4"),
    "NF4, double-quantized": PackFormat("nf4", 64, True),
    "FP4, blocks of 32": PackFormat("fp4", 32),
    "INT8": PackFormat("int8"),
}
SHARES = (5 / 6, None)  # of six modules three stay beside two buffers
LAYERS = 6
LAYOUTS = [*tiny.KINDS, *own_forward.TYPES]

HEAD = """\
# Offloaded experts: the same bits

Made by `PYTHONPATH=src:tests/helpers python -m offload_invariance > docs/offloading-invariance.md`;
`tests/offloading/test_invariance.py` makes each cell again.

Each cell is a tiny model with LoRA on its experts, trained for two steps of AdamW three times: with all
experts on the device, with half of the modules in host memory, and with all of them there. Copies are made
as late, and buffers spoilt as early, as the order of events allows. Compared are the output, the gradient
of each factor and each factor after each step. The number is how many tensors were equal to the bit, of
half and of all; anything else would be written out. gpt_oss's experts are transposed and interleaved with
biases, nemotron_h's have no gate. From llama4_text on, models keep their own forward; they have few
modules: all are away, and brought to one buffer.

"""


def packed(layout: str, fmt: PackFormat) -> nn.Module:
    """A tiny model of a layout, packed."""
    if layout in tiny.KINDS:
        return offloading.packed_model(layout, fmt, layers=LAYERS)
    return own_forward.pair(layout, fmt)[0].requires_grad_(False)


def trained(model: nn.Module, share: float | None, *, away: bool) -> list[torch.Tensor]:
    """What `steps` finds, with experts on the device or away."""
    model = own_forward.lora(model)
    if not away:
        return steps(model)
    sizes = [unit.nbytes for unit in units_of(model)]
    buffers = 2 if len(sizes) == LAYERS else 1
    budget = None if share is None else math.ceil(share * sum(sizes))
    report = offload(model, budget, buffers=buffers)
    assert report.streamed
    assert bool(report.resident) == (share is not None)
    before = report.counts()["fills"]
    found = steps(model)
    assert report.counts()["fills"] > before
    return found


def cell(layout: str, name: str) -> str:
    """How many tensors are equal, with half of the modules away and with all of them."""
    said = []
    model = packed(layout, FORMATS[name])
    wanted = trained(copy.deepcopy(model), None, away=False)
    shares = SHARES if layout in tiny.KINDS else SHARES[1:]
    for share in shares:
        with mock.patch.object(streamer, "engine_for", return_value=offloading.LateEngine()):
            ours = trained(copy.deepcopy(model), share, away=True)
        equal = sum(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
        said.append(str(equal) if equal == len(wanted) else f"**{equal} of {len(wanted)}**")
    return ", ".join(said)


def render(cells: Callable[[str, str], str] = cell, layouts: Iterable[str] = LAYOUTS) -> str:
    """The page."""
    lines = [f"| layout | {' | '.join(FORMATS)} |", f"|---|{'---|' * len(FORMATS)}"]
    for layout in layouts:
        lines.append(f"| {layout} | {' | '.join(cells(layout, name) for name in FORMATS)} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
