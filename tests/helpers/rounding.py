"""Measures what one experts module rounds, ours and stock PEFT's, against stock's in fp64 on the same inputs.

A whole model's gradients say little about its experts: most of their error is that of everything around,
which both sides share, and chance decides whose is larger. So experts are called by themselves, with inputs
caught in the model, and each result is compared apart: the output, the gradient of each input (hidden states,
routing weights) and of each factor. Errors are relative norms, mean of `SEEDS` inputs and adapters.

Inputs and the output's gradient are numbers of bf16, and weights those of both sides, so that only the
computation is measured.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import fourfold
import own_forward
import parity
from fourfold.experts import find_experts
from fourfold.experts.plain import PlainExperts
from fourfold.formats import PackFormat

SEEDS, TOKENS = 6, (8, 32)
SPREAD = 1.02
"""Our error over stock's at most. Two roundings of the same size differ by that by chance."""
FP32 = 2e-6
"""An error below it holds no rounding to bf16; such errors are equal."""
FORMATS = {"nf4": PackFormat("nf4", 64, True), "int8": PackFormat("int8"), "unquantized": None}
WAYS = ("bf16", "autocast")
CASES = [
    *((kind, form) for kind in parity.KINDS for form in ("nf4", "int8")),
    *((kind, "unquantized") for kind in parity.KINDS if kind not in parity.OWN_FORWARD),
]


@dataclass
class Errors:
    """Of one result, an entry for each seed; ``stock`` stays empty where stock cannot run."""

    ours: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of the means."""
        ours, stock = (max(statistics.fmean(side), FP32) for side in (self.ours, self.stock))
        return ours / stock

    @property
    def spread(self) -> float:
        """Standard error of `ratio`, from those of the single seeds."""
        ratios = [max(a, FP32) / max(b, FP32) for a, b in zip(self.ours, self.stock, strict=True)]
        return statistics.stdev(ratios) / len(ratios) ** 0.5


def models(kind: str, form: str, dtype: torch.dtype) -> tuple[PeftModel, PeftModel, PeftModel]:
    """Ours, stock's on the same numbers, and that in fp64; with one LoRA each, on a CPU."""
    model = parity.build(kind).bfloat16().to(dtype)
    fmt = FORMATS[form]
    implementation = getattr(model.config, "_experts_implementation", None)
    if fmt is None:
        stock, ours = copy.deepcopy(model), fourfold.prepare(model, gradient_checkpointing=False)
        assert any(isinstance(module, PlainExperts) for module in ours.modules())
    else:
        ours, stock = own_forward.pair_of(model, fmt, dtype)
    exact = copy.deepcopy(stock).double()
    if implementation is not None:
        exact.config._experts_implementation = "eager"  # (grouped products know no fp64)
        stock.config._experts_implementation = implementation  # (its own choice, not the loop)
    lora = [own_forward.lora(each, r=5, lora_alpha=7) for each in (ours, stock, exact)]
    return lora[0].train(), lora[1].train(), lora[2].double().train()


def fill_(lora: tuple[PeftModel, ...], seed: int) -> None:
    """The same random factors, as large as PEFT makes them, into every model."""
    torch.manual_seed(seed)
    for name, parameter in lora[0].named_parameters():
        if "lora_" not in name:
            continue
        values = torch.empty(parameter.shape).uniform_(-1, 1) / parameter.shape[1] ** 0.5
        for each in lora:
            each.get_parameter(name).data.copy_(values)
            each.get_parameter(name).grad = None


def readers(model: nn.Module) -> Iterator[str]:
    """Names of the modules to call, one of each kind."""
    seen = set()
    for found in find_experts(model):
        what = (type(found.module), tuple(p.shape for p in found.layout.projections))
        if what not in seen:
            seen.add(what)
            yield found.reader


def caught(model: PeftModel, names: list[str], seed: int, autocast: bool) -> dict[str, Any]:
    """Arguments of each of the modules in a forward of the model, numbers of bf16."""
    calls: dict[str, Any] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = (args, kwargs)

        return hook

    base = model.get_base_model()
    handles = [
        base.get_submodule(n).register_forward_pre_hook(catch(n), with_kwargs=True) for n in names
    ]
    torch.manual_seed(seed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=torch.randint(1, 64, TOKENS), use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def results(model: PeftModel, name: str, call: Any, seed: int, autocast: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of one module, in fp64 on the CPU."""
    module = model.get_base_model().get_submodule(name)
    own = next(p for n, p in module.named_parameters() if "lora_" in n)
    exact, device = own.dtype == torch.float64, own.device
    leaves, spec = tree_flatten(call)
    floats: dict[int, torch.Tensor] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[i] = leaf.detach().clone().to(device)
            if leaf.is_floating_point():
                leaf = leaves[i].bfloat16().to(torch.float64 if exact else leaf.dtype)
                leaves[i] = floats[i] = leaf.requires_grad_()
    args, kwargs = tree_unflatten(leaves, spec)
    with parity.stock_reads(model), torch.autocast(device.type, torch.bfloat16, enabled=autocast and not exact):
        y = module(*args, **kwargs)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape).bfloat16().to(y))
    found = {"output": y.detach()}
    found |= {f"input {i}": t.grad for i, t in enumerate(floats.values()) if t.grad is not None}
    found |= {n: p.grad for n, p in module.named_parameters() if "lora_" in n}
    return {n: t.double().cpu() for n, t in found.items()}


def measure(kind: str, form: str, way: str, device: str = "cpu") -> dict[str, Errors]:
    """Errors of every result of every experts module of a kind."""
    autocast = way == "autocast"
    ours, stock, exact = lora = models(kind, form, torch.float32 if autocast else torch.bfloat16)
    names = list(readers(ours.get_base_model()))
    errors: dict[str, Errors] = {}
    runs = [("ours", ours), ("stock", stock)]
    calls = [caught(ours, names, seed, autocast) for seed in range(SEEDS)]
    for model in (ours, stock):
        model.to(device)
    for seed in range(SEEDS):
        fill_(lora, seed)
        for name in names:
            wanted = results(exact, name, calls[seed][name], seed, False)
            for side, model in list(runs):
                found = results(model, name, calls[seed][name], seed, autocast)
                assert found.keys() == wanted.keys()
                for what, value in wanted.items():
                    assert value.any(), what
                    error = float((found[what] - value).norm() / value.norm())
                    getattr(errors.setdefault(f"{name}: {what}", Errors()), side).append(error)
    return errors


if __name__ == "__main__":
    import sys

    for kind, form in CASES:
        if len(sys.argv) > 1 and kind not in sys.argv[1].split(",") :
            continue
        if len(sys.argv) > 2 and form not in sys.argv[2].split(","):
            continue
        for way in WAYS:
            try:
                errors = measure(kind, form, way)
            except Exception as e:
                import traceback; traceback.print_exc()
                print(kind, form, way, "FAILED", type(e), str(e)[:200]); continue
            worst = max(errors, key=lambda n: errors[n].ratio)
            print(kind, form, way, f"{errors[worst].ratio:.3f} +- {errors[worst].spread:.3f}", worst, flush=True)
            for n, e in errors.items():
                if e.ratio > 1.0 or len(sys.argv) > 3:
                    print("    ", n, f"{e.ratio:.3f} +- {e.spread:.3f} {statistics.fmean(e.ours):.6f} {statistics.fmean(e.stock):.6f}")
