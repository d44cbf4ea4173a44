"""How often bitsandbytes' quantizers for CPUs and for CUDA disagree about a byte.

    python benchmarks/devices.py --out benchmarks/results/devices.json

Packed bytes are those that bitsandbytes makes of each matrix on the device that loads it. Its code for CPUs
is not its code for CUDA, so a model that was packed on the one need not be byte for byte the one packed on
the other. This counts the bytes that differ, and what that does to the decoded weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import versions

from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.quantize import pack_stack

FORMATS = (
    PackFormat("nf4"),
    PackFormat("nf4", 64, True),
    PackFormat("fp4"),
    PackFormat("fp4", 64, True),
    PackFormat("int8"),
)


def compare(fmt: PackFormat, w_ENK: torch.Tensor) -> dict[str, Any]:
    """Bytes that differ, by stored tensor, and the largest difference of a decoded weight."""
    shape = StackShape(*w_ENK.shape, parts=2)
    stacks = [pack_stack(PackedStack.empty(fmt, shape, d), w_ENK.to(d), "w") for d in ("cpu", "cuda")]
    here, there = (dict(stack.tensors()) for stack in stacks)
    result: dict[str, Any] = {}
    for suffix, tensor in here.items():
        ours, theirs = tensor.view(torch.uint8), there[suffix].cpu().view(torch.uint8)
        result[suffix or "data"] = {"bytes": ours.numel(), "differ": int((ours != theirs).sum())}
    decoded = [decode_stack(stack, torch.float32).cpu() for stack in stacks]
    result["largest_difference"] = float((decoded[0] - decoded[1]).abs().max() / w_ENK.float().std())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/devices.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "results": {},
    }
    for dtype in (torch.bfloat16, torch.float32):
        w_ENK = (torch.randn(4, 1536, 2048) * 0.02).to(dtype)
        for fmt in FORMATS:
            result = compare(fmt, w_ENK)
            record["results"][f"{fmt}, from {str(dtype).removeprefix('torch.')}"] = result
            differ = sum(part["differ"] for part in result.values() if isinstance(part, dict))
            total = sum(part["bytes"] for part in result.values() if isinstance(part, dict))
            print(
                f"{fmt}, {dtype}: {differ:,} of {total:,} bytes, largest difference "
                f"{result['largest_difference']:.4f} standard deviations",
                flush=True,
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
