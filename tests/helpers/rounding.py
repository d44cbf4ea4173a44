"""Measures what one experts module rounds, ours and stock PEFT's, against stock's in fp64 on the same inputs.

A whole model's gradients say little about its experts: most of their error is that of everything around,
which both sides share, and chance decides whose is larger. So experts are called by themselves, with inputs
caught in the model, and each result is compared apart: the output, the gradient of each input (hidden states,
routing weights) and of each factor. Errors are relative norms, mean of six adapters and inputs or more.

Inputs and the output's gradient are numbers of bf16, and weights those of both sides, so that only the
computation is measured.

Autocast reaches no grouped products: stock's are in their weights' dtype, fp32 in a model in fp32. On a CPU
ours are as well. On CUDA ours are in autocast's dtype, so stock is measured as it computes in that: there its
grouped experts have their weights in bf16 (the rest of it and all factors stay in fp32).
"""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn

import fourfold
import own_forward
import parity
from fourfold.experts import find_experts
from fourfold.experts.plain import PlainExperts
from fourfold.formats import PackFormat

TOKENS = (8, 32)
SEEDS = 6
MORE_SEEDS = dict.fromkeys(("dbrx", "longcat_flash", "privacy_filter"), 32)
"""Where results are few numbers or nearly stock's, so that six seeds tell them apart too badly in bf16."""
SPREAD = 1.02
"""Our error over stock's at most: two errors of the same size differ by that by chance."""
FP32 = 2e-6
"""An error below it holds no rounding to bf16; such errors are equal."""
FORMATS = {"nf4": PackFormat("nf4", 64, True), "int8": PackFormat("int8"), "unquantized": None}
WAYS = ("bf16", "autocast")
DECORATED = [kind for kind in parity.KINDS if kind not in parity.OWN_FORWARD]
CASES = [
    *((kind, "nf4", way) for kind in parity.KINDS for way in WAYS),
    *((kind, "unquantized", way) for kind in DECORATED for way in WAYS),
    *((kind, "int8", "bf16") for kind in parity.OWN_FORWARD),
]
STOCK_FAILS = {("dbrx", "autocast"): "index_add_(): self (Float) and source (BFloat16)"}
"""What stock cannot even where a module around the experts is shown its sums: the beginning of its error."""


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


def models(
    kind: str, form: str, dtype: torch.dtype, grouped: torch.dtype | None = None
) -> tuple[PeftModel, PeftModel, PeftModel]:
    """Ours, stock's on the same numbers, and that in fp64; with one LoRA each, on a CPU.

    Args:
        grouped: dtype of the weights of stock's experts that multiply by groups, if another than ``dtype``.
    """
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
    if grouped is not None and implementation not in (None, "eager"):
        for found in find_experts(stock):
            if getattr(found.layout, "routed", False):
                for weight in found.module.parameters(recurse=False):
                    weight.data = weight.data.to(grouped)
    lora = [own_forward.lora(each, r=5, lora_alpha=7) for each in (ours, stock, exact)]
    return lora[0].train(), lora[1].train(), lora[2].double().train()


def is_known(kind: str) -> bool:
    """Whether this version of transformers has the kind, with decorated experts if we know it so."""
    if not parity.is_known(kind):
        return False
    routed = all(getattr(found.layout, "routed", False) for found in find_experts(parity.build(kind)))
    return routed or kind in parity.OWN_FORWARD


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
    handles = [base.get_submodule(n).register_forward_pre_hook(catch(n), with_kwargs=True) for n in names]
    torch.manual_seed(seed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=torch.randint(1, 64, TOKENS), use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def names_of(reader: nn.Module) -> list[str]:
    """Of the arguments of a module's own forward."""
    own = reader.get_base_layer() if hasattr(reader, "get_base_layer") else reader
    return list(inspect.signature(type(own).forward).parameters)[1:]


def results(
    model: PeftModel, name: str, call: Any, arguments: list[str], seed: int, autocast: bool = False
) -> dict[str, torch.Tensor]:
    """Output and gradients of one module, in fp64 on the CPU."""
    module = model.get_base_model().get_submodule(name)
    own = next(p for n, p in module.named_parameters() if "lora_" in n)
    floats: dict[str, torch.Tensor] = {}

    def given(argument: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().clone().to(own.device)
        if not value.is_floating_point():
            return value
        exact = own.dtype == torch.float64
        floats[argument] = value.bfloat16().to(torch.float64 if exact else value.dtype).requires_grad_()
        return floats[argument]

    args = [given(n, v) for n, v in zip(arguments, call[0], strict=False)]
    kwargs = {n: given(n, v) for n, v in call[1].items()}
    casting = torch.autocast(own.device.type, torch.bfloat16, enabled=autocast)
    with parity.stock_reads(model), casting:
        y = module(*args, **kwargs)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape).bfloat16().to(y))
    found = {"output": y.detach()} | {f"d {n}": t.grad for n, t in floats.items() if t.grad is not None}
    for wrapper in module.modules():
        if hasattr(wrapper, "lora_A") and hasattr(wrapper, "parameter_name"):
            for factor in ("A", "B"):
                weight = getattr(wrapper, f"lora_{factor}")["default"].weight
                found[f"{wrapper.parameter_name} {factor}"] = weight.grad
    return {n: t.double().cpu() for n, t in found.items()}


def measure(
    kind: str, form: str, way: str, device: str = "cpu", *, autocast_groups: bool | None = None
) -> dict[str, Errors]:
    """Errors of every result of every experts module of a kind, in the model's order.

    Args:
        kind: of `parity.KINDS`.
        form: of `FORMATS`.
        way: of `WAYS`; autocast is of a model in fp32.
        device: of what is measured; the reference is computed on the CPU.
        autocast_groups: whether grouped products are in autocast's dtype; unset: as ours on that device.
    """
    autocast = way == "autocast"
    if autocast_groups is None:
        autocast_groups = device != "cpu"
    ours, stock, exact = lora = models(
        kind,
        form,
        torch.float32 if autocast else torch.bfloat16,
        torch.bfloat16 if autocast and autocast_groups else None,
    )
    readers_ = list(readers(ours.get_base_model()))
    arguments = {n: names_of(exact.get_base_model().get_submodule(n)) for n in readers_}
    seeds = range(SEEDS if autocast else MORE_SEEDS.get(kind, SEEDS))
    calls = [caught(ours, readers_, seed, autocast) for seed in seeds]
    sides = {"ours": ours.to(device)} | ({} if (kind, way) in STOCK_FAILS else {"stock": stock.to(device)})
    errors: dict[str, Errors] = {}
    for seed in seeds:
        fill_(lora, seed)
        for name in readers_:
            run = (name, calls[seed][name], arguments[name], seed)
            wanted = results(exact, *run)
            where = "" if len(readers_) == 1 else f"{'.'.join(name.split('.')[-2:])} "
            for side, model in sides.items():
                found = results(model, *run, autocast)
                assert found.keys() == wanted.keys()
                for what, value in wanted.items():
                    assert value.any(), what
                    error = float((found[what] - value).norm() / value.norm())
                    getattr(errors.setdefault(where + what, Errors()), side).append(error)
    return errors


def worst(errors: dict[str, Errors]) -> str:
    """Name of the result whose error is largest by stock's."""
    return max(errors, key=lambda name: errors[name].ratio)


def check(
    kind: str, form: str, way: str, device: str = "cpu", *, autocast_groups: bool | None = None
) -> None:
    """See `measure`.

    Raises:
        AssertionError: a result is further off than stock's, or than bf16 explains.
    """
    errors = measure(kind, form, way, device, autocast_groups=autocast_groups)
    factors = 2 * sum(name.endswith(" A") for name in errors)
    assert len(errors) >= factors + 2  # an output and an input
    assert factors >= 2
    for name, error in errors.items():
        assert max(error.ours) < parity.BF16_NOISE, name
        if (kind, way) not in STOCK_FAILS:
            assert error.ratio <= SPREAD, f"{name}: {error.ratio:.3f} +- {error.spread:.3f}"
