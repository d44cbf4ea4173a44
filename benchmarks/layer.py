"""One experts layer with LoRA: Fourfold against the unquantized layer, stock PEFT, bitsandbytes and peers.

    python benchmarks/layer.py --out benchmarks/results/layer.json
    python benchmarks/layer.py --shapes qwen3-30b-a3b glm-4.5-air --seconds 300
    python benchmarks/layer.py --report                 tables and plot of what was measured, without a GPU
    python benchmarks/layer.py --smoke --out /tmp/x.json    tiny shapes on a CPU

Variants, all on one GPU in one invocation, with LoRA of rank 16 on both projections unless said otherwise:

- ``bf16``                  unquantized, `grouped_mm` + low-rank LoRA in plain torch: the baseline of all
  ratios
- ``bf16-no-lora``          unquantized, transformers' own `grouped_mm` forward
- ``bf16-fourfold``         unquantized, Fourfold's low-rank path
- ``bf16-paramwrapper``     unquantized, stock PEFT `target_parameters`
- ``parametrization``       bitsandbytes' `replace_parameter_4bit` (NF4) and stock PEFT: the starting system
- ``fourfold-FORMAT:WAY``   packed; ``--ways`` adds rows for the ways to compute (`fourfold.kernels.ways`)
- ``grouped-nf4-gemm``, ``scattermoe``  where importable

Routing is skewed (logits plus a fixed normal bias per expert), frozen bf16 or packed experts, bf16 factors.
"fwd" runs under `no_grad`, "step" is forward and backward with gradients of input and factors; medians, with
the caches flushed before every call. ``--graphs`` times both as CUDA graphs too, without the host's launches,
which are most of a call at few tokens. Peak is what a call allocates beyond what lay there before.

Every variant is checked before it is timed: output and all gradients against fp32 on the weights that the
variant multiplies by. A bf16 `grouped_mm` on the same weights, rounded once, says what error is to be
expected (at most 0.02); a variant that errs more than twice that is not timed. Few tokens make few numbers,
whose errors chance may halve or double: up to 8 inputs are drawn then, errors added in quadrature (the first
input is the one that is timed). Results are saved as they
come; a later invocation with the same ``--out`` skips pairs of shape and tokens that are complete (on the
same device and versions), and ratios never mix invocations. Exit status: 0 all asked for is measured, or the
time limit was reached; 1 a variant of Fourfold gave wrong numbers; 2 wrong arguments, or no GPU; 3 one broke.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import layer_report
import torch
from layer_case import (
    SHAPES,
    SMOKE_SHAPES,
    Inputs,
    Layer,
    Results,
    build_layer,
    exact,
    in_quadrature,
    make_inputs,
    relative_errors,
)
from layer_measure import captured, peak_bytes, synchronisations, time_call
from layer_variants import BASELINE, FORMATS, WAYS, Variant, builders, grouped_bf16, weight_set

ALLOWED = 2.0  # times the error of a bf16 product on the same weights
# What such a product itself may err in bf16, several roundings of 2^-9 in a row (0.004 to 0.008 measured).
# Without it a wrong baseline would excuse everything.
ALLOWED_BF16 = 0.02
# Inputs are drawn until they have so many tokens together. (On tiny shapes stock PEFT's error was up to 1.7
# times that of such a product in 24 draws of one token, 1.07 in as many of 33.)
CHECKED_TOKENS = 64
MOST_DRAWS = 8

Record = dict[str, Any]


class Session:
    """Measures pairs of shape and tokens and keeps the file of results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.out: Path = arguments.out
        self.content = {"invocations": {}, "records": []}
        if self.out.is_file():
            self.content = json.loads(self.out.read_text())
        self.id = uuid.uuid4().hex[:8]
        self.content["invocations"][self.id] = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": _versions(self.device),
            "rank": arguments.rank,
        }
        self.start = time.monotonic()
        self.builders = builders(arguments.ways, arguments.formats)
        wanted = {BASELINE, *(arguments.variants or self.builders)} - set(arguments.skip)
        self.builders = {name: build for name, build in self.builders.items() if name in wanted}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1))
        part.replace(self.out)

    def done(self, shape: str, tokens: int) -> bool:
        """Whether one earlier invocation, on the same device and versions, has all variants asked for."""
        by_invocation: dict[str, set[str]] = {}
        for record in self.content["records"]:
            if (record["shape"], record["tokens"]) == (shape, tokens):
                by_invocation.setdefault(record["invocation"], set()).add(record["variant"])
        mine = self.content["invocations"][self.id]
        return any(
            self.builders.keys() <= names
            and all(self.content["invocations"][earlier][key] == mine[key] for key in ("versions", "rank"))
            for earlier, names in by_invocation.items()
        )

    def run(self) -> bool:
        """Measure what is missing; False where the time limit stopped it."""
        longest = 0.0
        shapes = SMOKE_SHAPES if self.arguments.smoke else SHAPES
        for name in self.arguments.shapes or shapes:
            left = [t for t in self.arguments.tokens or shapes[name].tokens if not self.done(name, t)]
            if not left:
                continue
            layer: Layer | None = None
            for tokens in left:
                if self.elapsed + 2 * longest > self.arguments.seconds:  # (more tokens take longer)
                    print(f"time limit: stopped before {name}, {tokens} tokens", flush=True)
                    return False
                begin = self.elapsed
                if layer is None:
                    layer = build_layer(name, shapes[name], self.arguments.rank, self.device)
                    variants = self.make_variants(layer)
                for record in self.measure(layer, variants, tokens):
                    self.content["records"].append(record)
                    self.save()
                    print(f"  {_line(record)}", flush=True)
                longest = max(longest, self.elapsed - begin)
                print(f"{name}, {tokens} tokens: {self.elapsed - begin:.1f} s", flush=True)
            layer = None
            variants = {}
            gc.collect()  # modules and their wrappers refer to each other
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def make_variants(self, layer: Layer) -> dict[str, Variant | Record]:
        """Each variant ready to run, or the record of why there is none."""
        made: dict[str, Variant | Record] = {}
        for name, build in self.builders.items():
            try:
                made[name] = build(layer)
            except ImportError as error:
                made[name] = {"status": "not installed", "reason": str(error)}
            except Exception as error:  # of the systems compared with too: that is a result
                made[name] = _broken(error)
        return made

    def measure(self, layer: Layer, variants: dict[str, Variant | Record], tokens: int) -> Iterator[Record]:
        """Records of one pair; variants on the same weights share the fp32 computation."""
        draws = [make_inputs(layer, tokens, seed) for seed in range(1, 1 + number_of_draws(tokens))]
        head = {"invocation": self.id, "shape": layer.name, "tokens": tokens}
        by_weights: dict[str, list[str]] = {}
        for name, variant in variants.items():
            if isinstance(variant, Variant):
                by_weights.setdefault(variant.weights, []).append(name)
            else:
                yield head | {"variant": name} | variant
        for weights, names in by_weights.items():
            try:
                weighed = weight_set(layer, weights)
                truths = [exact(layer, inputs, weighed.exact, weighed.with_lora) for inputs in draws]
                expected = self.expected(layer, draws, truths, weights)
            except Exception as error:
                for name in names:
                    yield head | {"variant": name} | _broken(error)
                continue
            finally:
                weighed = None
            for name in names:
                variant = variants[name]
                assert isinstance(variant, Variant)
                record = head | {"variant": name, "weights": weights, "expected_error": expected}
                try:
                    yield record | self.measure_one(layer, draws, variant, truths, expected)
                except Exception as error:
                    yield record | _broken(error)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def expected(
        self, layer: Layer, draws: Sequence[Inputs], truths: Sequence[Results], weights: str
    ) -> dict[str, float]:
        """Errors of a bf16 `grouped_mm` on the same weights, rounded once."""
        weighed = weight_set(layer, weights)
        rounded = {p.name: weighed.rounded(p) for p in layer.layout.projections}
        variant = Variant(
            weights,
            lambda given, x: grouped_bf16(layer, lambda p: rounded[p.name], given, x, weighed.with_lora),
            layer.leaves if weighed.with_lora else [],
        )
        errors = in_quadrature(
            relative_errors(variant.results(layer, inputs), truth)
            for inputs, truth in zip(draws, truths, strict=True)
        )
        return errors | {"forward": errors["output"]}

    def measure_one(
        self,
        layer: Layer,
        draws: Sequence[Inputs],
        variant: Variant,
        truths: Sequence[Results],
        expected: dict[str, float],
    ) -> Record:
        """Check one variant on every input, then time it on the first."""

        def checked(inputs: Inputs, truth: Results) -> dict[str, float]:
            errors = relative_errors(variant.results(layer, inputs), truth)
            # What is timed without gradients may be computed another way.
            plain = relative_errors(Results(variant.without_gradients(inputs)), truth)
            return errors | {"forward": plain["output"]}

        errors = in_quadrature(map(checked, draws, truths))
        inputs = draws[0]
        ratios = {name: errors[name] / max(expected[name], 1e-12) for name in expected}
        record: Record = {"error": errors, "error_ratio": ratios}
        off = [name for name, value in expected.items() if not value <= ALLOWED_BF16]
        if off:
            reason = f"a bf16 product on the same weights has errors of {expected}"
            return record | {"status": "wrong", "reason": reason}
        if not all(ratio <= ALLOWED for ratio in ratios.values()):
            return record | {"status": "wrong"}
        x_TH = inputs.x_TH.clone().requires_grad_()

        def forward() -> torch.Tensor:
            return variant.without_gradients(inputs)

        def step() -> Any:
            return variant.step(inputs, x_TH)

        budget = self.arguments.budget
        record["forward_ms"], record["forward_repeats"] = time_call(forward, self.device, budget / 2)
        record["step_ms"], record["step_repeats"] = time_call(step, self.device, budget / 2)
        record["forward_peak_bytes"] = peak_bytes(forward, self.device)
        record["step_peak_bytes"] = peak_bytes(step, self.device)
        record["synchronisations"] = synchronisations(step, self.device)
        if self.arguments.graphs:
            for name, call in (("forward", forward), ("step", step)):
                waits = record["synchronisations"] > 0
                replay = "it waits for the device" if waits else captured(call, self.device)
                if isinstance(replay, str):
                    record[f"{name}_graph"] = replay
                else:
                    record[f"{name}_graph_ms"], _ = time_call(replay, self.device, budget / 4)
        return record | {"status": "ok"}


def number_of_draws(tokens: int) -> int:
    """Of inputs that a variant is checked on."""
    return max(1, min(MOST_DRAWS, math.ceil(CHECKED_TOKENS / tokens)))


def _broken(error: Exception) -> Record:
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    traceback.print_exception(error)
    lines = str(error).splitlines() or [""]
    return {"status": "failed", "reason": f"{type(error).__name__}: {lines[0]}"}


def _line(record: Record) -> str:
    if record["status"] != "ok":
        why = record.get("reason") or ", ".join(
            f"{name} {ratio:.1f} x" for name, ratio in record.get("error_ratio", {}).items()
        )
        return f"{record['variant']:24} {record['status']} {why}"
    graphs = [
        f"  {name} graph {record[f'{name}_graph_ms']:.3f} ms" if f"{name}_graph_ms" in record else ""
        for name in ("forward", "step")
    ]
    return (
        f"{record['variant']:24} fwd {record['forward_ms']:9.3f} ms  step {record['step_ms']:9.3f} ms  "
        f"peak {record['step_peak_bytes'] / 2**20:8.0f} MiB  syncs {record['synchronisations']:3}  "
        f"error {record['error']['output']:.2e} ({max(record['error_ratio'].values()):.2f} x)"
        + "".join(graphs)
    )


def _versions(device: torch.device) -> dict[str, str]:
    from importlib import metadata

    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes", "grouped-nf4-gemm", "axolotl")
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"torch": torch.__version__}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}; default all")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: those of each shape")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["default"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--variants", nargs="+", help="only these, and the baseline")
    parser.add_argument("--skip", nargs="+", default=[], help="all variants but these")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of timing for a variant")
    parser.add_argument("--graphs", action="store_true", help="time CUDA graphs of the calls as well")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit of the whole run")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu with --smoke, else cuda")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what is in --out")
    parser.add_argument("--json", action="store_true", help="print targets as JSON instead of tables")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layer.json"))
    found = parser.parse_args(arguments)
    found.device = found.device or ("cpu" if found.smoke else "cuda")
    known = SMOKE_SHAPES if found.smoke else SHAPES
    for name in found.shapes or ():
        if name not in known:
            parser.error(f"--shapes: unknown shape {name!r}; there are {', '.join(known)}")
    there = builders(found.ways, found.formats)
    for name in [*(found.variants or ()), *found.skip]:
        if name not in there:
            parser.error(f"unknown variant {name!r}; there are {', '.join(there)}")
    if BASELINE in found.skip:
        parser.error(f"--skip: {BASELINE} is what all ratios are against")
    if found.report and not found.out.is_file():
        parser.error(f"--report: there is no {found.out}; measure first")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    status = 0
    if given.report:
        content = json.loads(given.out.read_text())
    else:
        if given.device == "cuda" and not torch.cuda.is_available():
            print("no CUDA device, which is what is measured (--smoke runs on a CPU)", file=sys.stderr)
            return 2
        session = Session(given)
        session.run()
        content = session.content
        ours = [
            r["status"]
            for r in content["records"]
            if r["invocation"] == session.id and "fourfold" in r["variant"]
        ]
        status = 1 if "wrong" in ours else 3 if {"failed", "out of memory"} & set(ours) else 0
    found = layer_report.targets(content["records"])
    if given.json:
        print(json.dumps({"invocations": content["invocations"], "targets": layer_report.as_json(found)}))
    else:
        print(json.dumps(content["invocations"], indent=1))
        print(layer_report.table(content["records"]))
        print()
        print(layer_report.target_table(found))
    picture = given.out.with_suffix(".png")
    if not layer_report.plot(content["records"], picture):
        print(f"no {picture}: nothing measured, or no matplotlib (--report draws it later)", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
