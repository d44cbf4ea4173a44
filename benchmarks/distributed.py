"""One GPU, DDP and FSDP2 over packed experts: memory per rank, tokens per second, bytes sent, losses.

    python benchmarks/distributed.py --out benchmarks/results/distributed.json      # two GPUs
    python benchmarks/distributed.py --smoke                                        # two processes on the CPU
    python benchmarks/distributed.py --write                                        # into docs/distributed.md

A model of Qwen3-30B-A3B's shape with ``--layers`` of its layers, NF4 with double quantization, LoRA r=16 on
q/k/v/o and both expert projections, adapters and AdamW in fp32, autocast bf16, non-reentrant checkpointing.
Each variant is a job of its own; what was measured is on disk after each:

- ``one``    one process
- ``ddp``    the packed model on every rank, adapters' gradients added up (`fourfold.distributed.replicate`)
- ``fsdp2``  each rank loads and keeps its shard (`load_sharded`, `shard`); packed layers are gathered

First 20 steps on the same global batch (the one process takes the ranks' rows one after the other), for
losses and adapters; noise is the same run in the one process with all rows at once. Then steps of the same
size per GPU are timed. Bytes sent are counted in one more step, at the calls of the collectives, as a ring
sends them. ``resident`` is weights, adapters and optimizer, between two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from distributed_report import project, table, targets

VARIANTS = ("one", "ddp", "fsdp2")


def checkpoint(folder: Path, arguments: argparse.Namespace) -> None:
    """The model's files, unless they lie there already."""
    if (folder / "config.json").is_file():
        return
    from checkpoint import qwen3_30b_config, write_checkpoint

    if not arguments.smoke:
        write_checkpoint(folder, arguments.layers, "cuda")
        return
    from transformers import AutoModelForCausalLM

    config = qwen3_30b_config(arguments.layers)
    config.update(
        {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
    )
    config.update({"num_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 4, "head_dim": 64})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2, help="rows per GPU")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--network", type=float, default=50.0, help="GB/s a GPU between machines, to project")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a variant may take")
    parser.add_argument("--checkpoint", default="/tmp/fourfold-distributed")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU (gloo)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distributed.json"))
    parser.add_argument("--write", action="store_true", help="the committed results into docs/distributed.md")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        from distributed_pages import write

        write()
        return 0
    if arguments.smoke:
        arguments.layers, arguments.length, arguments.steps = 4, 64, min(arguments.steps, 3)
        arguments.checkpoint = f"{arguments.checkpoint}-smoke"
    if arguments.one:
        from distributed_job import run

        run(arguments)
        return 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint(Path(arguments.checkpoint), arguments)
    record: dict[str, Any] = {
        "command": command_of(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(arguments),
        "settings": {
            n: getattr(arguments, n) for n in ("layers", "batch", "length", "rank", "steps", "ranks")
        },
        "results": [],
    }
    for variant in arguments.variants:
        result = job(variant, arguments)
        record["results"].append(result)
        record["targets"] = targets(record["results"])
        record["projection"] = project(record["results"], arguments.network)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(table([result]), flush=True)
    print(json.dumps(record["machine"]))
    print(table(record["results"]))
    print("\n".join(record["projection"]["text"]))
    for target in record["targets"]:
        word = "ok" if target["reached"] else "NO"
        print(f"{word}  {target['what']}: {target['value']:.4g} against {target['bound']:.4g}")
    failed = [r["variant"] for r in record["results"] if "failure" in r]
    return 0 if not failed and (arguments.smoke or all(t["reached"] for t in record["targets"])) else 1


def command_of(words: list[str]) -> str:
    """The command as someone else would give it: without where the checkpoint lay."""
    kept = [word for at, word in enumerate(words) if "--checkpoint" not in words[max(at - 1, 0) : at + 1]]
    return " ".join(["python", *kept])


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    gpus = (
        [] if arguments.smoke else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    )
    names = ("torch", "transformers", "peft", "bitsandbytes")
    cpu = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {"gpus": gpus} | cpu | {name: metadata.version(name) for name in names}


def job(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one variant in processes of its own; what it measured, or why it did not."""
    part = arguments.out.with_suffix(f".{variant}.tmp")
    part.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", variant, "--out", str(part)]
    for name in ("layers", "batch", "length", "rank", "steps", "ranks"):
        command += [f"--{name}", str(getattr(arguments, name))]
    folder = arguments.checkpoint.removesuffix("-smoke") if arguments.smoke else arguments.checkpoint
    command += ["--checkpoint", folder, *(["--smoke"] if arguments.smoke else [])]
    started = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(arguments.limit)
        failure = f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        failure = f"took more than {arguments.limit} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)  # (its ranks are of its group)
            process.wait()
    result: dict[str, Any] = {"variant": variant}
    if part.is_file():
        result |= json.loads(part.read_text())
        part.unlink()
    elif not failure:
        failure = "wrote nothing"
    if failure:
        result["failure"] = failure
        print(f"{variant}: {failure}", flush=True)
    return result | {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    raise SystemExit(main())
