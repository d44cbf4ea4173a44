"""What packing costs on real weights: the change in negative log-likelihood, per format.

    python benchmarks/fidelity.py --out benchmarks/results/fidelity.json

The model is SmolLM2-135M-Instruct as a Mixtral of 8 experts (``examples/quickstart/make_model.py``), without
and with noise between experts. The text is the held-out part of the docstring questions and answers
(``examples/quickstart/make_data.py``), made from the running Python's standard library. Everything is
computed in fp32; experts alone are packed, except in the row that says otherwise.

Two rows are damaged on purpose (scales of the neighbouring expert; gate and up swapped): they show what a
fault would look like. The sharp column is the largest difference of logits, relative to the largest logit,
from the same model with every expert matrix passed through bitsandbytes' own quantizer and back.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import fourfold
from fourfold.experts import PackedExperts, find_experts
from fourfold.formats import PackFormat

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "quickstart"), str(ROOT / "tests" / "helpers")]

ROWS: dict[str, dict[str, Any]] = {
    "INT8": {"experts_quant_type": "int8"},
    "NF4": {"experts_quant_type": "nf4"},
    "NF4, double-quantized": {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "FP4": {"experts_quant_type": "fp4"},
    "NF4, attention as well": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def held_out_ids(folder: Path, length: int = 256, limit: int | None = None) -> torch.Tensor:
    """The held-out questions and answers as token ids ``[chunks, length]``."""
    import make_data

    library = Path(sysconfig.get_path("stdlib"))
    _, held_out = make_data.split(make_data.collect(library, 40), 0.05)
    text = "\n\n".join(f"{make_data.QUESTION.format(call=r.call)}\n{r.answer}" for r in held_out)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0][:limit]
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every predicted token, nats."""
    losses = []
    for chunk in ids.split(4):
        logits = model(chunk, use_cache=False).logits[:, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="none")
        )
    return torch.cat(losses)


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    """The model in fp32, packed as ``settings`` say."""
    arguments = {"quantization_config": fourfold.MoeBitsAndBytesConfig(**settings)} if settings else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()


def weight_error(packed: PreTrainedModel, original: PreTrainedModel) -> float:
    """Relative root-mean-square error of all expert weights."""
    from fourfold.formats import decode_stack

    theirs = {f.name: f.module for f in find_experts(original)}
    error = total = 0.0
    for found in find_experts(packed):
        assert isinstance(found.module, PackedExperts)
        for projection in found.module.fourfold_layout.projections:
            w = getattr(theirs[found.name], projection.name)
            decoded = decode_stack(found.module.stack(projection), torch.float32)
            error += (decoded - w).square().sum(dtype=torch.float64).item()
            total += w.square().sum(dtype=torch.float64).item()
    return (error / total) ** 0.5


def roll_scales(module: PackedExperts) -> None:
    for projection in module.fourfold_layout.projections:
        scales = getattr(module, f"{projection.name}_absmax")
        scales.data = scales.data.roll(1, 0)


def swap_gate_and_up(module: PackedExperts) -> None:
    name = module.fourfold_layout.up.name
    for tensor in (getattr(module, name), getattr(module, f"{name}_absmax")):
        tensor.data = tensor.data.roll(tensor.shape[1] // 2, 1)


DAMAGES: dict[str, Callable[[PackedExperts], None]] = {
    "damaged: scales of the neighbour": roll_scales,
    "damaged: gate and up swapped": swap_gate_and_up,
}


def change(losses: torch.Tensor, baseline: torch.Tensor) -> dict[str, float]:
    """Mean difference and its standard error over tokens."""
    difference = (losses - baseline).double()
    return {
        "change": difference.mean().item(),
        "standard_error": (difference.std() / len(difference) ** 0.5).item(),
    }


def measure(folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """All rows for one model."""
    import tiny

    original = load(folder)
    baseline = token_losses(original, ids)
    rows: dict[str, dict[str, float]] = {}
    for name, settings in ROWS.items():
        packed = load(folder, **settings)
        rows[name] = change(token_losses(packed, ids), baseline)
        if "load_in_4bit" in settings:
            continue
        rows[name]["weight_error"] = weight_error(packed, original)
        quant_type = settings["experts_quant_type"]
        fmt = PackFormat(quant_type, 64, settings.get("bnb_4bit_use_double_quant", False))
        through = tiny.round_trip_(load(folder), fmt)
        with torch.no_grad():
            ours, theirs = packed(ids[:1]).logits, through(ids[:1]).logits
        rows[name]["largest_logit_difference"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        del through
        if name == "NF4":
            for damage_name, damage in DAMAGES.items():
                damaged = load(folder, **settings)
                for module in damaged.modules():
                    if isinstance(module, PackedExperts):
                        damage(module)
                rows[damage_name] = change(token_losses(damaged, ids), baseline)
                del damaged
    return {"baseline": baseline.mean().item(), "tokens": baseline.numel(), "rows": rows}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a column pair per model."""
    names = list(next(iter(results.values()))["rows"])
    head = " | ".join(f"{label} (baseline {r['baseline']:.3f})" for label, r in results.items())
    lines = [
        f"| packed | {head} | weight error | logits against bitsandbytes |",
        "|---|" + "---:|" * (len(results) + 2),
    ]
    for name in names:
        cells = [r["rows"][name] for r in results.values()]
        shown = " | ".join(f"{c['change']:+.3f} ± {c['standard_error']:.3f}" for c in cells)
        errors = f"{cells[0]['weight_error']:.4f}" if "weight_error" in cells[0] else ""
        sharp = [c["largest_logit_difference"] for c in cells if "largest_logit_difference" in c]
        lines.append(f"| {name} | {shown} | {errors} | {f'{max(sharp):.0e}' if sharp else ''} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="use only this many tokens of the text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import make_model

    results = {}
    start = time.perf_counter()
    for label, noise in (("without noise", 0.0), ("noise 0.1", 0.1)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            status = make_model.main(
                ["--out", str(folder), "--experts", str(arguments.experts), "--noise", str(noise)]
            )
            if status:
                return status
            results[label] = measure(folder, held_out_ids(folder, limit=arguments.tokens))
        print(table(results), flush=True)
    record = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.perf_counter() - start,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "fourfold": fourfold.__version__,
        },
        "experts": arguments.experts,
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
