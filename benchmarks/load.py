"""Loading a Qwen3-30B-A3B-shaped model onto a GPU: seconds and peak memory, against what else there is.

    python benchmarks/load.py --layers 12 --out benchmarks/results/load.json

Variants, each in a process of its own on the same GPU, the page cache warmed before each, the whole list
``--repeats`` times over (those named by ``--once`` in the first turn only; medians are shown, raw numbers
kept, what was measured is on disk after each run), in one invocation:

- ``bf16``               stock transformers, nothing quantized
- ``bnb-4bit``           stock `load_in_4bit` (experts stay bf16)
- ``parametrization``    stock `load_in_4bit`, then bitsandbytes' `replace_parameter_4bit` on every expert
  parameter: quantizing after loading
- ``fourfold``           experts and Linears in NF4 with double quantization, packed while loading
- ``fourfold-int8``      experts and Linears in INT8, packed while loading
- ``fourfold-quantize``  `fourfold quantize` of the checkpoint to a packed one on disk (memory: of the GPU)
- ``fourfold-reload``    loading that packed checkpoint; how many bytes came through the reader of packed
  tensors (pinned memory, threads of its own) is shown and kept as ``read_ahead_bytes``

Every packed model is checked after it was timed: `fourfold.verify`, and the first and the last expert of
the first and the last layer against the matrices in the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import GIB, fourfold_config, import_everything, load_model, run_in_process, versions, warm_cache

VARIANTS = (
    "bf16",
    "bnb-4bit",
    "parametrization",
    "fourfold",
    "fourfold-int8",
    "fourfold-quantize",
    "fourfold-reload",
)
# Relative error of a normal matrix after quantization: about 0.092 for NF4, 0.008 for INT8.
ALLOWED_ERROR = {"nf4": 0.11, "int8": 0.015}


def packed_folder(checkpoint: str) -> str:
    """Where ``fourfold-quantize`` writes."""
    return f"{checkpoint.rstrip('/')}-packed"


def check(model: Any, checkpoint: str) -> float:
    """The largest relative error of some experts against the checkpoint in bf16; stops where it is too
    large.
    """
    from safetensors import safe_open

    import fourfold
    from fourfold.formats import decode_stack

    fourfold.verify(model)
    weight_map = json.loads((Path(checkpoint) / "model.safetensors.index.json").read_text())["weight_map"]

    def stored(key: str) -> torch.Tensor:
        with safe_open(Path(checkpoint) / weight_map[key], framework="pt", device="cuda") as reader:
            return reader.get_tensor(key).float()

    worst = 0.0
    layers = len(model.model.layers)
    for layer in {0, layers - 1}:
        experts = model.model.layers[layer].mlp.experts
        up, down = (
            decode_stack(experts.stack(p), torch.float32) for p in experts.fourfold_layout.projections
        )
        for expert in (0, len(up) - 1):
            key = f"model.layers.{layer}.mlp.experts.{expert}"
            gate_up = torch.cat([stored(f"{key}.{name}.weight") for name in ("gate_proj", "up_proj")])
            for ours, theirs in ((up[expert], gate_up), (down[expert], stored(f"{key}.down_proj.weight"))):
                worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
        quant_type = experts.fourfold_format.quant_type
    if not worst <= ALLOWED_ERROR[quant_type]:
        raise SystemExit(f"wrong weights: relative error {worst:.3f} after {quant_type}")
    return worst


def run_variant(variant: str, checkpoint: str) -> dict[str, Any]:
    """Load once; errors of the systems compared with are results."""
    import_everything()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    if variant == "fourfold-quantize":
        from fourfold.loading.quantize import quantize_checkpoint

        config = fourfold_config("fourfold")
        quantize_checkpoint(checkpoint, packed_folder(checkpoint), config, device="cuda", force=True)
        model = None
    else:
        folder = packed_folder(checkpoint) if variant == "fourfold-reload" else checkpoint
        model = load_model(variant, folder)
    torch.cuda.synchronize()
    result: dict[str, Any] = {
        "variant": variant,
        "seconds": time.perf_counter() - start,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "resident_bytes": torch.cuda.memory_allocated(),
    }
    if model is not None and variant.startswith("fourfold"):
        result["largest_weight_error"] = check(model, checkpoint)
    if variant == "fourfold-reload":
        result["read_ahead_bytes"] = model.hf_quantizer.read_ahead_bytes
    return result


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a variant: medians of its runs, and every measured second."""
    names = list(dict.fromkeys(run["variant"] for run in runs))
    summary = []
    for name in names:
        own = [run for run in runs if run["variant"] == name]
        record = {"variant": name, "seconds_all": [run["seconds"] for run in own]}
        for key in ("seconds", "peak_bytes", "peak_reserved_bytes", "resident_bytes"):
            record[key] = statistics.median(run[key] for run in own)
        errors = [run["largest_weight_error"] for run in own if "largest_weight_error" in run]
        if errors:
            record["largest_weight_error"] = max(errors)
        ahead = [run["read_ahead_bytes"] for run in own if "read_ahead_bytes" in run]
        if ahead:
            record["read_ahead_bytes"] = ahead
        summary.append(record)
    return summary


def table(summary: list[dict[str, Any]]) -> str:
    """Markdown; time relative to stock bf16 where that was measured."""
    baseline = next((r["seconds"] for r in summary if r["variant"] == "bf16"), None)
    lines = [
        "| system | seconds (median) | all | x bf16 | resident GiB | peak GiB | peak above resident MiB |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for r in summary:
        relative = f"{r['seconds'] / baseline:.2f}" if baseline else ""
        every = ", ".join(f"{seconds:.2f}" for seconds in r["seconds_all"])
        above = (r["peak_bytes"] - r["resident_bytes"]) / 2**20
        lines.append(
            f"| {r['variant']} | {r['seconds']:.2f} | {every} | {relative} | "
            f"{r['resident_bytes'] / GIB:.2f} | {r['peak_bytes'] / GIB:.2f} | {above:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", default="/tmp/fourfold-benchmark")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/load.json"))
    parser.add_argument("--once", nargs="*", choices=VARIANTS, default=[], help="not repeated")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arguments.out.write_text(json.dumps(run_variant(arguments.one, arguments.checkpoint)))
        return 0
    from checkpoint import write_checkpoint

    size = write_checkpoint(Path(arguments.checkpoint), arguments.layers, "cuda")
    print(f"checkpoint: {size / GIB:.2f} GiB in bf16", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    failed: list[str] = []
    record = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    record |= {"layers": arguments.layers, "checkpoint_bytes": size, "failed": failed}
    record |= {"results": [], "runs": runs}
    for turn in range(arguments.repeats):
        for variant in arguments.variants:
            if turn and variant in arguments.once:
                continue
            reload = variant == "fourfold-reload"
            warm_cache(packed_folder(arguments.checkpoint) if reload else arguments.checkpoint)
            run = run_in_process(__file__, variant, arguments.out, ["--checkpoint", arguments.checkpoint])
            if run is None:
                failed.append(variant)
            else:
                runs.append(run)
                peak = run["peak_bytes"] / GIB
                ahead = f", {run['read_ahead_bytes'] / GIB:.2f} GiB read ahead" if reload else ""
                print(f"{variant}: {run['seconds']:.2f} s, peak {peak:.2f} GiB{ahead}", flush=True)
            record["results"] = summarise(runs)
            arguments.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record["versions"]))
    print(table(record["results"]))
    return int(any(variant.startswith("fourfold") for variant in failed))


if __name__ == "__main__":
    raise SystemExit(main())
