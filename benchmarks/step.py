"""Loading and a whole training step of a Qwen3-30B-A3B-shaped model, against what else there is.

    python benchmarks/step.py --layers 12 --out benchmarks/results/step.json

Variants, each in a process of its own on the same GPU, in one invocation:

- ``fourfold``          experts and Linears in NF4 with double quantization, packed while loading
- ``fourfold-nf4``      the same without double quantization
- ``fourfold-attention``  as the first, LoRA on attention only
- ``bf16``              stock transformers in bf16, PEFT's `target_parameters`
- ``bnb-4bit``          stock `load_in_4bit` (experts stay bf16), PEFT's `target_parameters`
- ``parametrization``   loaded in bf16, then bitsandbytes' `replace_parameter_4bit` on every expert parameter,
  PEFT
                        on full parameter names
- ``parametrization-attention``  the same, LoRA on attention only (it trains less than the others)

A step: `model.train()`, non-reentrant checkpointing, autocast bf16, LoRA r=16 on q/k/v/o and both expert
projections, adapters in fp32, loss on the last 256 positions (no whole logits tensor); first with AdamW in
fp32, then with bitsandbytes' 8-bit AdamW. `fourfold` is checked against an fp32 computation on its own
decoded weights before it is timed, and every variant says how many of its factors got a gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from common import GIB, import_everything, load_model, run_in_process, versions, warm_cache

VARIANTS = (
    "fourfold",
    "fourfold-nf4",
    "fourfold-attention",
    "bf16",
    "bnb-4bit",
    "parametrization",
    "parametrization-attention",
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def expected_resident(model: Any, bits: float) -> dict[str, int]:
    """The target of resident memory: what is not packed, plus ``bits`` a packed weight."""
    from fourfold.planning.report import make_report

    rows = make_report(model).rows
    packed = sum(r.logical_params for r in rows if r.role in ("experts", "linears"))
    high = sum(r.bytes for r in rows if r.role not in ("experts", "linears"))
    return {
        "packed_weights": packed,
        "high_precision_bytes": high,
        "target_bytes": int(high + packed * bits / 8),
    }


def check_layer(model: Any) -> dict[str, float]:
    """One experts module, and plain bf16 products, against fp32 on the decoded weights."""
    from fourfold.kernels import dispatch, reference_linear, route

    experts = model.model.layers[0].mlp.experts
    layout = experts.fourfold_layout
    torch.manual_seed(1)
    x = torch.randn(512, layout.up.shape.columns, device="cuda").bfloat16()
    weights, index = torch.softmax(torch.randn(512, layout.num_experts, device="cuda"), -1).topk(8)
    with torch.no_grad():
        ours = experts(x, index, weights).float()
        routing = route(index, layout.num_experts)

        def whole(dtype: torch.dtype) -> torch.Tensor:
            rows = dispatch(x.to(dtype), routing)
            up = reference_linear(rows, experts.stack(layout.up), routing.offsets_E)
            down = reference_linear(
                experts._apply_gate(up), experts.stack(layout.down), routing.offsets_E
            ).float()
            return (down[routing.position_Tk] * weights.unsqueeze(-1)).sum(1)

        exact, plain = whole(torch.float32), whole(torch.bfloat16).bfloat16().float()
    error = ((ours - exact).norm() / exact.norm()).item()
    allowed = ((plain - exact).norm() / exact.norm()).item()
    if not error <= 1.05 * allowed:
        raise SystemExit(f"wrong result: relative error {error:.2e}, plain bf16 has {allowed:.2e}")
    return {"relative_error": error, "plain_bf16_relative_error": allowed}


def add_adapters(model: Any, variant: str, rank: int) -> Any:
    """LoRA on attention and experts as the variant does it, ready for training."""
    from peft import LoraConfig, get_peft_model

    suffixes = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    targets: list[str] | None = suffixes
    if variant == "parametrization":  # suffixes match nothing on parametrized modules
        layers = range(model.config.num_hidden_layers)
        targets = [f"model.layers.{i}.{suffix}" for i in layers for suffix in suffixes]
    elif variant == "parametrization-attention":
        targets = None
    if variant.startswith("fourfold"):
        import fourfold

        fourfold.prepare(model)
        targets = None if variant == "fourfold-attention" else fourfold.expert_targets(model)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=ATTENTION, target_parameters=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def train(model: Any, batch: int, length: int, steps: int, *, bits: int = 32) -> dict[str, Any]:
    """Time and peak memory of whole steps, with the optimizer's states in so many bits."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if bits == 8:
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.train()
    torch.manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")
    milliseconds, losses, touched = [], [], 0
    for step in range(steps + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, logits_to_keep=257, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, -256:].flatten()
        )
        loss.backward()
        if step == 0:
            touched = sum(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - start) * 1e3)
        losses.append(loss.item())
    timed = milliseconds[2:]
    return {
        "step_ms": statistics.median(timed),
        "step_ms_all": timed,
        "tokens_per_second": batch * length / statistics.median(timed) * 1e3,
        "losses": losses,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "factors": len(parameters),
        "factors_with_gradient": touched,
        "peak_training_bytes": torch.cuda.max_memory_allocated(),
    }


def profile(model: Any, batch: int, length: int) -> str:
    """A table of where the GPU spends a step."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as prof:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, logits_to_keep=257, use_cache=False).logits
        logits.float().square().mean().backward()
        torch.cuda.synchronize()
    return prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70)


def run_variant(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, check, train; errors of the systems compared with are results."""
    import_everything()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = load_model(variant, arguments.checkpoint)
    torch.cuda.synchronize()
    result: dict[str, Any] = {
        "variant": variant,
        "load_seconds": time.perf_counter() - start,
        "peak_loading_bytes": torch.cuda.max_memory_allocated(),
        "resident_bytes": torch.cuda.memory_allocated(),
    }
    if variant.startswith("fourfold"):
        import fourfold

        fourfold.verify(model)
        result |= check_layer(model)
        result |= expected_resident(model, 4.5 if variant == "fourfold-nf4" else 4.13)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = add_adapters(model, variant, arguments.rank)
        size = (arguments.batch, arguments.length, arguments.steps)
        result |= train(model, *size)
        eight = train(model, *size, bits=8)
        result["adam_8bit"] = {
            n: eight[n] for n in ("step_ms", "step_ms_all", "tokens_per_second", "peak_training_bytes")
        }
        if arguments.profile and variant in arguments.profile:
            result["profile"] = profile(model, arguments.batch, arguments.length)
    except Exception as error:
        if variant.startswith("fourfold"):
            raise
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return result


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| system | load s | resident GiB | peak loading GiB | step ms | tokens/s | peak training GiB | "
        "8-bit AdamW: step ms | peak GiB | factors with gradient |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        if "step_ms" in r:
            trained = f"{r['factors_with_gradient']} of {r['factors']}"
            eight = r.get("adam_8bit")
            second = r.get("error", "failed") + " | "
            if eight is not None:
                second = f"{eight['step_ms']:.0f} | {eight['peak_training_bytes'] / GIB:.2f}"
            peak = r["peak_training_bytes"] / GIB
            tail = f"{r['step_ms']:.0f} | {r['tokens_per_second']:,.0f} | {peak:.2f} | {second} | {trained}"
        else:
            tail = f"{r.get('error', 'failed')} | | | | | "
        lines.append(
            f"| {r['variant']} | {r['load_seconds']:.1f} | {r['resident_bytes'] / GIB:.2f} | "
            f"{r['peak_loading_bytes'] / GIB:.2f} | {tail} |"
        )
    return "\n".join(lines)


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached: a value and its bound for each target that the variants measured can tell."""
    by_name = {r["variant"]: r for r in results}
    found: list[dict[str, Any]] = []

    def expect(what: str, value: float, bound: float) -> None:
        found.append({"what": what, "value": value, "bound": bound, "reached": value <= bound})

    for name in ("fourfold", "fourfold-nf4"):
        if ours := by_name.get(name):
            expect(f"{name}: resident bytes", ours["resident_bytes"], 1.01 * ours["target_bytes"])
            expect(f"{name}: peak loading", ours["peak_loading_bytes"], ours["resident_bytes"] + 256 * 2**20)
    for ours, others in (
        ("fourfold", ("bf16", "bnb-4bit", "parametrization")),
        ("fourfold-attention", ("parametrization-attention",)),
    ):
        for other in others:
            if ours in by_name and "step_ms" in by_name.get(other, {}):
                for key in ("step_ms", "peak_training_bytes"):
                    expect(f"{ours}: {key} against {other}", by_name[ours][key], by_name[other][key])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checkpoint", default="/tmp/fourfold-benchmark")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--profile", nargs="*", choices=VARIANTS, help="variants to profile after timing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        result = run_variant(arguments.one, arguments)
        arguments.out.write_text(json.dumps(result))
        return 0
    from checkpoint import write_checkpoint

    size = write_checkpoint(Path(arguments.checkpoint), arguments.layers, "cuda")
    print(f"checkpoint: {size / GIB:.2f} GiB in bf16", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for variant in arguments.variants:
        warm_cache(arguments.checkpoint)
        passed_on = []
        for name in ("layers", "batch", "length", "rank", "steps", "checkpoint"):
            passed_on += [f"--{name}", str(getattr(arguments, name))]
        if arguments.profile:
            passed_on += ["--profile", *arguments.profile]
        result = run_in_process(__file__, variant, arguments.out, passed_on)
        if result is None:
            continue
        results.append(result)
        print(table(results[-1:]), flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    record |= {
        "layers": arguments.layers,
        "batch": arguments.batch,
        "length": arguments.length,
        "targets": targets(results),
        "results": results,
    }
    arguments.out.write_text(json.dumps(record, indent=1))
    for result in results:
        if "profile" in result:
            arguments.out.with_suffix(f".{result['variant']}.profile.txt").write_text(result.pop("profile"))
    arguments.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record["versions"]))
    print(table(results))
    for target in record["targets"]:
        word = "ok" if target["reached"] else "NO"
        print(f"{word}  {target['what']}: {target['value']:.0f} <= {target['bound']:.0f}")
    missing = set(arguments.variants) - {r["variant"] for r in results}
    return 0 if all(t["reached"] for t in record["targets"]) and not missing else 1


if __name__ == "__main__":
    raise SystemExit(main())
