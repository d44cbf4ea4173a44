"""The ways to compute one experts layer with LoRA that the layer benchmark compares.

A variant takes the same inputs and the same LoRA factors as every other and gives an output and gradients
that can be compared; in which form it wants the factors is its own affair. What it is compared with in fp32
are the weights that it really multiplies by (`WeightSet`), so a format's error is not counted as a kernel's.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from layer_case import Inputs, Layer, Results, gradient_names
from torch import nn
from torch.nn.utils import parametrize

from fourfold.experts.packed import PackedExperts, pack_module_
from fourfold.experts.plain import PlainExperts, take_low_rank_
from fourfold.experts.shapes import Projection
from fourfold.formats import PackFormat, decode_stack
from fourfold.kernels import LowRank
from fourfold.kernels.ways import WAYS as PRODUCT_WAYS

FORMATS = {
    "nf4": PackFormat("nf4"),
    "nf4-double": PackFormat("nf4", 64, True),
    "fp4": PackFormat("fp4"),
    "int8": PackFormat("int8"),
}


def _way(way: str | None, mebibytes: int | None = None) -> Callable[[PackedExperts | PlainExperts], None]:
    def choose(module: PackedExperts | PlainExperts) -> None:
        module.way = way
        module.workspace_bytes = None if mebibytes is None else mebibytes * 2**20

    return choose


# How a module is told to compute; "default" is what a user gets, the others are those of the kernels.
WAYS: dict[str, Callable[[PackedExperts | PlainExperts], None]] = {
    "default": _way(None),
    **{name: _way(name) for name in PRODUCT_WAYS},
    "workspace-64": _way(
        "workspace", 64
    ),  # chunks of experts: less memory, and the host waits for the offsets
    "workspace-256": _way("workspace", 256),
}


@dataclass
class WeightSet:
    """Weights that several variants share.

    Attributes:
        exact: ``[N, K]`` of one expert in fp32, as the format says.
        rounded: ``[E, N, K]`` in bf16, what a bf16 product can be given.
        with_lora: whether its variants have factors.
    """

    exact: Callable[[Projection, int], torch.Tensor]
    rounded: Callable[[Projection], torch.Tensor]
    with_lora: bool = True


@dataclass
class Variant:
    """``forward(inputs, x_TH)`` gives the output; ``leaves`` are what gradients are wanted for, and
    ``canonical`` brings those into the shapes of `Layer.leaves`."""

    weights: str
    forward: Callable[[Inputs, torch.Tensor], torch.Tensor]
    leaves: list[torch.Tensor]
    canonical: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = lambda gradients: gradients

    def step(self, inputs: Inputs, x_TH: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Forward and backward: output, and gradients of the input and the leaves."""
        output = self.forward(inputs, x_TH)
        return output, torch.autograd.grad(output, [x_TH, *self.leaves], inputs.grad_TH)

    @torch.no_grad()
    def without_gradients(self, inputs: Inputs) -> torch.Tensor:
        """The output alone."""
        return self.forward(inputs, inputs.x_TH)

    def results(self, layer: Layer, inputs: Inputs) -> Results:
        output, gradients = self.step(inputs, inputs.x_TH.clone().requires_grad_())
        named = dict(zip(gradient_names(layer), self.canonical(gradients[1:]), strict=False))
        return Results(output.detach(), {"x": gradients[0], **named})


def share(module: nn.Module) -> nn.Module:
    """A module of the same tensors that can be changed alone."""
    other = object.__new__(type(module))  # (`copy.copy` refuses parametrized modules)
    other.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()})
    return other


class _Holder(nn.Module):
    """A model of one experts module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def grouped_bf16(
    layer: Layer,
    weight: Callable[[Projection], torch.Tensor],
    inputs: Inputs,
    x_TH: torch.Tensor,
    with_lora: bool = True,
) -> torch.Tensor:
    """The baseline: transformers' `grouped_mm` experts with a low-rank addition, in plain torch operations.

    Sort, gather, grouped product + low-rank products, gate, the same again, times the routing weight, back
    into the tokens' order, sum over k. It is kept apart from the library's own path so that it stays what it
    is.
    """
    layout, module = layer.layout, layer.module
    T, k = inputs.index_Tk.shape
    expert_S, order_S = torch.sort(inputs.index_Tk.reshape(-1))
    bounds_E = torch.arange(layout.num_experts, device=x_TH.device)
    offsets_E = torch.searchsorted(expert_S, bounds_E, right=True).int()
    product = functools.partial(torch.nn.functional.grouped_mm, offs=offsets_E)
    rows = x_TH[order_S // k]
    for projection in layout.projections:
        y_SN = product(rows, weight(projection).transpose(1, 2))
        if with_lora:
            pair = layer.factors[projection.name]
            h_SR = product(rows, pair.a_ERK.transpose(1, 2))
            y_SN = y_SN + product(h_SR, pair.b_ENR.transpose(1, 2))
        if projection.bias is not None:
            y_SN = y_SN + getattr(module, projection.bias)[expert_S]
        if projection is layout.up:
            y_SN = module._apply_gate(y_SN) if layout.has_gate else module.act_fn(y_SN)
        rows = y_SN
    rows = rows * inputs.weights_Tk.reshape(-1)[order_S].unsqueeze(-1)
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    return rows[position_S].view(T, k, -1).sum(1).to(x_TH.dtype)


def _plain_weight(layer: Layer, projection: Projection) -> torch.Tensor:
    return layer.layout.to_stack(getattr(layer.module, projection.name), projection)


def packed(layer: Layer, fmt: str) -> PackedExperts:
    """The layer packed, in a module of its own; one for each format."""
    if fmt not in layer.cache:
        layer.cache[fmt] = pack_module_(share(layer.module), FORMATS[fmt], name=f"{layer.name}.{fmt}")
    return layer.cache[fmt]


def parametrized(layer: Layer) -> nn.Module:
    """Experts under bitsandbytes' parametrization, in NF4 (plain scales: with double quantization it is
    slower)."""
    if "parametrized" not in layer.cache:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        module = share(layer.module)
        for projection in layer.layout.projections:
            replace_parameter_4bit(module, projection.name, quant_type="nf4")
        layer.cache["parametrized"] = module
    return layer.cache["parametrized"]


def weight_set(layer: Layer, name: str) -> WeightSet:
    """The weights of that name, as a variant names them."""
    if name in FORMATS:
        module = packed(layer, name)

        def one(projection: Projection, expert: int) -> torch.Tensor:
            return decode_stack(module.stack(projection).experts(expert, expert + 1), torch.float32)[0]

        def every(projection: Projection) -> torch.Tensor:
            w_ENK = torch.empty(*sizes_of(projection), dtype=torch.bfloat16, device=layer.device)
            for expert in range(w_ENK.shape[0]):
                w_ENK[expert] = one(projection, expert)
            return w_ENK

        return WeightSet(one, every)
    if name == "parametrized":
        with torch.no_grad():
            decoded = {
                p.name: layer.layout.to_stack(getattr(parametrized(layer), p.name), p)
                for p in layer.layout.projections
            }
        return WeightSet(lambda p, expert: decoded[p.name][expert].float(), lambda p: decoded[p.name])
    return WeightSet(
        lambda p, expert: _plain_weight(layer, p)[expert].float(),
        functools.partial(_plain_weight, layer),
        with_lora=name != "bf16 without LoRA",
    )


def sizes_of(projection: Projection) -> tuple[int, int, int]:
    """E, N and K."""
    return projection.shape.experts, projection.shape.rows, projection.shape.columns


def _bf16(layer: Layer) -> Variant:
    weight = functools.partial(_plain_weight, layer)
    return Variant("bf16", functools.partial(grouped_bf16, layer, weight), layer.leaves)


def _bf16_no_lora(layer: Layer) -> Variant:
    def forward(inputs: Inputs, x_TH: torch.Tensor) -> torch.Tensor:
        return layer.module(x_TH, inputs.index_Tk, inputs.weights_Tk)

    return Variant("bf16 without LoRA", forward, [])


def low_rank(layer: Layer) -> dict[str, LowRank]:
    """The factors as packed modules take them, by projection."""
    return {name: LowRank(pair.a_ERK, pair.b_ENR) for name, pair in layer.factors.items()}


def _bf16_fourfold(way: str) -> Callable[[Layer], Variant]:
    def build(layer: Layer) -> Variant:
        holder = _Holder(share(layer.module))
        take_low_rank_(holder)
        WAYS[way](holder.experts)

        def forward(inputs: Inputs, x_TH: torch.Tensor) -> torch.Tensor:
            return holder.experts(x_TH, inputs.index_Tk, inputs.weights_Tk, low_rank=low_rank(layer))

        return Variant("bf16", forward, layer.leaves)

    return build


def _fourfold(fmt: str, way: str) -> Callable[[Layer], Variant]:
    def build(layer: Layer) -> Variant:
        module = share(packed(layer, fmt))
        WAYS[way](module)

        def forward(inputs: Inputs, x_TH: torch.Tensor) -> torch.Tensor:
            return module(x_TH, inputs.index_Tk, inputs.weights_Tk, low_rank=low_rank(layer))

        return Variant(fmt, forward, layer.leaves)

    return build


def _stock_wrapped(layer: Layer, experts: nn.Module, weights: str) -> Variant:
    """PEFT's `ParamWrapper`s around a module, with the layer's factors in PEFT's shapes."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    holder = _Holder(experts)
    rank = layer.leaves[0].shape[1]
    targets = [f"experts.{p.name}" for p in layer.layout.projections]
    LoraModel(holder, LoraConfig(r=rank, lora_alpha=rank, target_parameters=targets), "default")
    wrappers: dict[str, Any] = {}
    wrapper: Any = holder.experts
    while hasattr(wrapper, "parameter_name"):
        wrappers[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    leaves = []
    for projection in layer.layout.projections:
        pair, mine = layer.factors[projection.name], wrappers[projection.name]
        a_weight, b_weight = mine.lora_A["default"].weight, mine.lora_B["default"].weight
        a_weight.data = pair.a_ERK.detach().flatten(0, 1).clone()
        b_weight.data = pair.b_ENR.detach().permute(1, 2, 0).flatten(1).clone()
        leaves += [a_weight, b_weight]

    def canonical(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        E = layer.layout.num_experts
        found = []
        for a, b in zip(gradients[::2], gradients[1::2], strict=True):
            found += [a.view(E, rank, -1), b.view(b.shape[0], rank, E).permute(2, 0, 1)]
        return found

    def forward(inputs: Inputs, x_TH: torch.Tensor) -> torch.Tensor:
        with _only_for_this_call(experts):
            return holder.experts(x_TH, inputs.index_Tk, inputs.weights_Tk)

    return Variant(weights, forward, leaves, canonical)


@contextlib.contextmanager
def _only_for_this_call(experts: nn.Module) -> Iterator[None]:
    """Take off what PEFT leaves on a parametrized module.

    PEFT 0.21.2 does not find its own parametrization again beside another one, warns, and leaves one more on
    the module with every call: each call would add its product again, and fail where gradients are wanted.
    """
    lists = dict(getattr(experts, "parametrizations", {}).items())
    counts = {name: len(each) for name, each in lists.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find any LoRA parametrization")
        yield
    for name, each in lists.items():
        while len(each) > counts[name]:
            del each[-1]


def _peft(layer: Layer) -> Variant:
    return _stock_wrapped(layer, share(layer.module), "bf16")


def _parametrization(layer: Layer) -> Variant:
    """The starting system, with what makes it train both projections.

    The inner of PEFT's two wrappers looks at its weight while torch's cache of parametrizations is on, before
    it registers its own product: the forward would find the weight without it in the cache, and that
    projection's factors would get no gradient. So the cache is emptied when the forward begins.
    """
    experts = share(parametrized(layer))
    experts.register_forward_pre_hook(lambda *_: parametrize._cache.clear())
    return _stock_wrapped(layer, experts, "parametrized")


BASELINE = "bf16"
UNPACKED_WAYS = ("workspace", "in_product")  # of those asked for, what makes a difference without decoding
STARTING_SYSTEM = "parametrization"


def peers() -> dict[str, Callable[[Layer], Variant]]:
    """Builders of other projects' variants (they are built on this file)."""
    import layer_peers

    return layer_peers.BUILDERS


def builders(ways: Sequence[str], formats: Sequence[str]) -> dict[str, Callable[[Layer], Variant]]:
    """What makes each variant, by name, the baseline first. A builder raises ImportError where a package is
    missing."""
    found: dict[str, Callable[[Layer], Variant]] = {
        BASELINE: _bf16,
        "bf16-no-lora": _bf16_no_lora,
        "bf16-fourfold": _bf16_fourfold("default"),
        "bf16-paramwrapper": _peft,
        STARTING_SYSTEM: _parametrization,
    }
    for way in ways:
        if way in UNPACKED_WAYS:
            found[f"bf16-fourfold:{way}"] = _bf16_fourfold(way)
    for fmt in formats:
        # Ways other than the default one concern the products, not the format: NF4 stands for all.
        for way in ways if fmt == "nf4" else ways[:1]:
            found[f"fourfold-{fmt}:{way}"] = _fourfold(fmt, way)
    return found | peers()
