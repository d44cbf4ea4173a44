"""Training a Qwen3-30B-A3B-shaped model, its packed experts on the GPU, in host memory, half and half, on
disk.

    python benchmarks/offload.py --layers 48 --out benchmarks/results/offload.json
    python benchmarks/offload.py --layers 2 --smoke --device cpu --out /tmp/offload.json     (seconds, no GPU)

One model in one process: experts NF4 with double quantization, attention in bitsandbytes' NF4, random weights
made layer by layer (one layer's experts are packed, the others hold the same matrices in another order, so
that no two layers are alike and bf16 weights of one layer at most exist at a time). LoRA on attention and
experts, 8-bit AdamW, non-reentrant checkpointing, autocast bf16, loss on the last 256 positions.

For each of ``resident``, ``half``, ``streamed``, ``cached`` and ``disk``: the same factors from the same
seed; one step with deterministic algorithms, whose loss and gradients are compared with the first variant's
bit by bit (the first repeats it: gradients that differ from themselves, as those of some attention kernels
do, tell nothing); timed steps; one more step in which the time that computing waited for copies is measured.
The floor of a streamed step is the bytes that it copied over the measured bandwidth of the link. What is
measured is written to ``--out`` after each variant.

For the last two the experts are written to ``--folder`` as a packed checkpoint, layer by layer, and mapped
from there: ``cached`` reads what the system keeps in memory of those files, and ``disk`` has the system drop
each piece as soon as it was read, as it would where memory is short. Their floor is the bytes read over the
speed at which the same threads read the same files.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic step

import torch
from checkpoint import qwen3_30b_config
from common import GIB, versions
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import fourfold
from fourfold.experts import PackedExperts, prepare_module_
from fourfold.experts.packed import set_stack_
from fourfold.formats import PackedStack, PackFormat
from fourfold.formats.quantize import pack_stack
from fourfold.loading.shards import ShardWriter
from fourfold.offloading.disk import DiskStreamer
from fourfold.offloading.link import measure_link
from fourfold.offloading.mapped import MappedFile
from fourfold.offloading.read_ahead import PIECE_BYTES, THREADS

VARIANTS = ("resident", "half", "streamed", "cached", "disk")
ON_DISK = ("cached", "disk")
SHARD_BYTES = 2 * 10**9
NF4 = PackFormat("nf4", 64, True)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
COUNTED = 256


def smoke_config(layers: int) -> Qwen3MoeConfig:
    config = qwen3_30b_config(layers)
    small = {"vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 6}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
    for name, value in small.items():
        setattr(config, name, value)
    return config


def random_stacks(module: PackedExperts, device: torch.device) -> list[PackedStack]:
    """Packed random weights of every projection; expert by expert, so that little more than those exists."""
    stacks = []
    for projection in module.fourfold_layout.projections:
        shape = projection.shape
        stack = PackedStack.empty(NF4, shape, device)
        for e in range(shape.experts):
            w_1NK = torch.randn(1, shape.rows, shape.columns, device=device, dtype=torch.bfloat16) * 0.02
            pack_stack(stack.experts(e, e + 1), w_1NK, "experts")
        stacks.append(stack)
    return stacks


def rolled(stack: PackedStack, by: int) -> PackedStack:
    """The same matrices as other experts."""
    tensors = {suffix: tensor.roll(by, 0) for suffix, tensor in stack.tensors()}
    return PackedStack.from_tensors(stack.fmt, stack.shape, tensors)


def quantize_attention_(model: nn.Module, device: torch.device) -> None:
    """Attention's Linears in bitsandbytes' NF4, in place."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for name in ATTENTION:
            linear = getattr(layer.self_attn, name)
            made = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4"
            )
            made.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            setattr(layer.self_attn, name, made.to(device))


def build(config: Qwen3MoeConfig, device: torch.device) -> nn.Module:
    """The model with LoRA on it, all of it on ``device``."""
    thin = copy.deepcopy(config)
    thin.moe_intermediate_size = 8  # (its experts are replaced below)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(thin, dtype=torch.bfloat16)
    model.config.moe_intermediate_size = config.moe_intermediate_size
    stacks: list[PackedStack] = []
    for number, layer in enumerate(model.model.layers):
        with torch.device("meta"):
            module = type(layer.mlp.experts)(config)
        name = f"model.layers.{number}.mlp.experts"
        packed = prepare_module_(module, NF4, name=name, dtype=torch.bfloat16, packed_on_disk=True)
        stacks = stacks or random_stacks(packed, device)
        for projection, stack in zip(packed.fourfold_layout.projections, stacks, strict=True):
            set_stack_(packed, projection, rolled(stack, number))
        layer.mlp.experts = packed
    quantize_attention_(model, device)
    model.is_loaded_in_4bit = True  # (PEFT's LoRA on 4-bit Linears)
    return model


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    fourfold.prepare(model)
    targets = {"target_modules": list(ATTENTION), "target_parameters": fourfold.expert_targets(model)}
    config = LoraConfig(r=rank, lora_alpha=rank, task_type="CAUSAL_LM", **targets)
    return get_peft_model(model, config).train()


class Run:
    """Steps of one variant.

    Args:
        model: with adapters; their factors are set here.
        batch: sequences in a step.
        length: of a sequence.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, device: torch.device) -> None:
        self.model, self.device, self.size = model, device, (batch, length)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.factors = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            torch.manual_seed(1)
            for factor in self.factors:
                factor.grad = None
                factor.normal_(0, 0.01)
        self.ids = torch.randint(0, model.config.vocab_size, self.size, device=device)
        if device.type == "cuda":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer: torch.optim.Optimizer = AdamW8bit(self.factors, lr=1e-4)
        else:
            self.optimizer = torch.optim.AdamW(self.factors, lr=1e-4)

    def backward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            kept = min(COUNTED, self.size[1] - 1)
            logits = self.model(input_ids=self.ids, logits_to_keep=kept + 1, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), self.ids[:, -kept:].flatten()
        )
        loss.backward()
        return loss.detach()

    def step(self) -> torch.Tensor:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def compared(self) -> dict[str, Any]:
        """Loss and sums over the bits of every gradient, of one deterministic step."""
        # (with warn_only flash attention's backward stays as it is, and adds in any order)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        strict = True
        try:
            try:
                loss = self.backward()
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                strict = False
                self.optimizer.zero_grad(set_to_none=True)
                torch.use_deterministic_algorithms(True, warn_only=True)
                loss = self.backward()
            gradients = [f.grad for f in self.factors]
            sums = [0 if g is None else int(g.view(torch.int32).sum(dtype=torch.int64)) for g in gradients]
        finally:
            torch.use_deterministic_algorithms(False)
        touched = sum(g is not None for g in gradients)
        self.optimizer.zero_grad(set_to_none=True)
        found = {"loss": loss.item(), "bits": sums, "factors_with_gradient": touched}
        return found | {"deterministic": strict}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Run, steps: int) -> dict[str, Any]:
    device = run.device
    milliseconds, losses = [], []
    for _ in range(steps + 2):
        synchronize(device)
        start = time.perf_counter()
        loss = run.step()
        synchronize(device)
        milliseconds.append((time.perf_counter() - start) * 1e3)
        losses.append(loss.item())
    found = milliseconds[2:]
    return {"step_ms": statistics.median(found), "step_ms_all": found, "losses": losses}


def waiting(run: Run, report: fourfold.OffloadReport) -> dict[str, Any]:
    """Bytes copied in a step, and how long computing waited for them."""
    before, read = report.counts(), read_bytes(report)
    report.time_waits(True)
    run.step()
    report.time_waits(False)
    waited = report.waited_ms() or 0.0
    after = report.counts()
    per_step = {name: after[name] - before[name] for name in after}
    return {"waited_ms": waited, "per_step": per_step | {"read": read_bytes(report) - read}}


def read_bytes(report: fourfold.OffloadReport) -> int:
    return sum(s.read_bytes for s in report.streamers if isinstance(s, DiskStreamer))


def write_checkpoint(experts: Iterable[PackedExperts], folder: Path) -> None:
    """The packed tensors as the files of a checkpoint, one shard in memory at a time."""
    writer = ShardWriter(folder, SHARD_BYTES)
    for module in experts:
        for leaf in module.packed_names():
            writer.add(f"{module.fourfold_name}.{leaf}", module._parameters[leaf].data)
    writer.finish()
    os.sync()  # (pages that are not written yet cannot be forgotten)


def forget(file: MappedFile, offset: int = 0, nbytes: int = 0) -> None:
    """Have the system drop what it keeps of a file in memory."""
    os.posix_fadvise(file._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


class Forgetting:
    """While it lasts, what is read from files is dropped from the system's memory at once."""

    def __enter__(self) -> None:
        self.original = original = MappedFile.read_into

        def read_into(file: MappedFile, place: memoryview, offset: int) -> None:
            original(file, place, offset)
            forget(file, offset, len(place))

        MappedFile.read_into = read_into  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        MappedFile.read_into = self.original  # type: ignore[method-assign]


def read_speed(folder: Path, most: int = 8 * 10**9) -> float:
    """Bytes a second from the files of a folder into memory, as the reading thread does it."""
    pieces = []
    for path in sorted(folder.glob("*.safetensors")):
        file = MappedFile(path)
        size = path.stat().st_size
        pieces += [(file, at, min(PIECE_BYTES, size - at)) for at in range(0, size, PIECE_BYTES)]
    pieces = pieces[: max(1, most // PIECE_BYTES)]
    places = [memoryview(torch.empty(PIECE_BYTES, dtype=torch.uint8).numpy()) for _ in range(THREADS)]

    def read(number: int) -> None:
        for file, at, nbytes in pieces[number::THREADS]:
            file.read_into(places[number][:nbytes], at)

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(THREADS)))
    return sum(nbytes for *_, nbytes in pieces) / (time.perf_counter() - start)


def measure(variant: str, model: nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    start, report = time.perf_counter(), None
    total = sum(p.nbytes for m in experts for p in m.parameters(recurse=False))
    if variant in ON_DISK:
        if not list(arguments.folder.glob("*.safetensors")):
            write_checkpoint(experts, arguments.folder)
        from_there = {"device": "disk", "checkpoint": arguments.folder}
        report = fourfold.offload(model, buffers=arguments.buffers, **from_there)
    elif variant != "resident":
        report = fourfold.offload(model, total // 2 if variant == "half" else None, buffers=arguments.buffers)
    with Forgetting() if variant == "disk" else contextlib.nullcontext():
        return measured(variant, model, report, time.perf_counter() - start, arguments)


def measured(
    variant: str,
    model: nn.Module,
    report: fourfold.OffloadReport | None,
    offload_seconds: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    device = torch.device(arguments.device)
    synchronize(device)
    result: dict[str, Any] = {"variant": variant, "offload_seconds": offload_seconds}
    if variant in ON_DISK:
        for path in arguments.folder.glob("*.safetensors") if variant == "disk" else ():
            forget(MappedFile(path))
        result["read_bytes_per_second"] = read_speed(arguments.folder)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Run(model, arguments.batch, arguments.length, device)
    result |= run.compared() | {"names": run.names}
    if variant == arguments.variants[0]:
        result["again"] = run.compared()["bits"]
    result |= timed(run, arguments.steps)
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    result["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if report is not None:
        result["offload"] = report.to_dict()
        result |= waiting(run, report)
    return result


def summarize(results: list[dict[str, Any]], bytes_per_second: float | None) -> None:
    """Floors and comparisons with the first variant, in place."""
    first = results[0]
    for result in results:
        result["equal_to"] = first["variant"]
        result["loss_is_equal"] = result["loss"] == first["loss"]
        repeated = [a == b for a, b in zip(first["again"], first["bits"], strict=True)]
        equal = [a == b for a, b in zip(result["bits"], first["bits"], strict=True)]
        result["gradients_equal"] = sum(a and b for a, b in zip(equal, repeated, strict=True))
        result["factors"] = sum(repeated)
        checked = zip(first["names"], equal, repeated, strict=True)
        result["unequal"] = [name for name, a, b in checked if b and not a]
        result["times_first"] = result["step_ms"] / first["step_ms"]
        if "per_step" in result:
            reading = result.get("read_bytes_per_second")
            floors = [result["per_step"]["bytes"] / bytes_per_second] if bytes_per_second else []
            floors += [result["per_step"]["read"] / reading] if reading else []
            result["floor_ms"] = 1e3 * max(floors, default=0.0)


def table(results: Iterable[dict[str, Any]]) -> str:
    lines = [
        "| experts | peak GPU GiB | peak host GiB | step ms | x resident | waited ms | copied GiB a step | "
        "read GiB a step | floor ms | misses | loss equal | gradients equal |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for r in results:
        per_step = r.get("per_step", {"bytes": 0, "misses": 0, "read": 0})
        lines.append(
            f"| {r['variant']} | {r.get('peak_bytes', 0) / GIB:.2f} | {r['peak_host_bytes'] / GIB:.1f} | "
            f"{r['step_ms']:.0f} | {r['times_first']:.2f} | {r.get('waited_ms', 0):.0f} | "
            f"{per_step['bytes'] / GIB:.2f} | {per_step['read'] / GIB:.2f} | {r.get('floor_ms', 0):.0f} | "
            f"{per_step['misses']} | "
            f"{r['loss_is_equal']} | {r['gradients_equal']} of {r['factors']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--buffers", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, help="for the checkpoint; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/offload.json"))
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        return compared(arguments)
    arguments.folder = Path(tempfile.mkdtemp(prefix="offload-"))
    try:
        return compared(arguments)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def compared(arguments: argparse.Namespace) -> int:
    """Every variant; 0 where all have the numbers of the first."""
    device = torch.device(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    config = smoke_config(arguments.layers) if arguments.smoke else qwen3_30b_config(arguments.layers)
    model = with_adapters(build(config, device), arguments.rank)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions() if device.type == "cuda" else {"torch": torch.__version__},
        "layers": arguments.layers,
        "batch": arguments.batch,
        "length": arguments.length,
        "rank": arguments.rank,
        "buffers": arguments.buffers,
        "build_seconds": time.perf_counter() - start,
    }
    print(f"built in {record['build_seconds']:.1f} s", flush=True)
    speed = None
    if device.type == "cuda":
        record["host_to_device_bytes_per_second"] = speed = measure_link(device)
        torch.cuda.empty_cache()
        print(f"host to device: {speed / 1e9:.1f} GB/s", flush=True)
    results: list[dict[str, Any]] = []
    for variant in arguments.variants:
        results.append(measure(variant, model, arguments))
        summarize(results, speed)
        record["results"] = results
        arguments.out.write_text(json.dumps(record, indent=1))
        print(table(results[-1:]), flush=True)
    for result in results:  # (thousands of sums, compared by now)
        del result["bits"], result["names"]
        result.pop("again", None)
    record["seconds"] = time.perf_counter() - start
    arguments.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record["versions"]))
    print(table(results))
    equal = all(r["loss_is_equal"] and r["gradients_equal"] == r["factors"] > 0 for r in results)
    print("every variant has the loss and the gradients of the first" if equal else "RESULTS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
