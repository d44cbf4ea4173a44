"""One experts layer of a published model's shape, its inputs, and what an fp32 computation says about it.

The module is transformers' own, made from a configuration and filled with random numbers on the device; no
checkpoint is read or written. T tokens, k experts a token, S = T*k routed rows, E experts, H hidden, I
intermediate, N out, K in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from fourfold.experts import find_experts
from fourfold.experts.shapes import ExpertsLayout, Projection

ALL_TOKENS = (1, 16, 64, 512, 2048, 8192, 32768)
SOME_TOKENS = (16, 2048, 8192)
SMOKE_TOKENS = (1, 5, 33)
HOPELESS = 1e9  # (JSON knows no infinity)
WEIGHT_SCALE = 0.02  # what models are initialised with, and about what trained ones have


@dataclass(frozen=True)
class Shape:
    """A configuration class of transformers, what concerns experts in it, and the tokens to measure at."""

    config_class: str
    sizes: dict[str, int]
    tokens: tuple[int, ...]

    def config(self) -> transformers.PretrainedConfig:
        """One layer of it; what does not concern experts is as small as it can be."""
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
        rest = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
        return getattr(transformers, self.config_class)(**tokens, **rest, **self.sizes)


def qwen3(hidden: int, intermediate: int, experts: int, k: int) -> dict[str, int]:
    """Sizes as Qwen3's configurations name them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "moe_intermediate_size": intermediate,
        "num_experts": experts,
        "num_experts_per_tok": k,
    }


def mixtral(hidden: int, intermediate: int, experts: int, k: int) -> dict[str, int]:
    """Sizes as Mixtral's configuration and gpt-oss's name them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_local_experts": experts,
        "num_experts_per_tok": k,
    }


SHAPES: dict[str, Shape] = {
    "qwen3-30b-a3b": Shape("Qwen3MoeConfig", qwen3(2048, 768, 128, 8), ALL_TOKENS),
    "glm-4.5-air": Shape(
        "Glm4MoeConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 1408,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 0,
        },
        ALL_TOKENS,
    ),
    "qwen3-next-80b-a3b": Shape("Qwen3NextConfig", qwen3(2048, 512, 512, 10), SOME_TOKENS),
    "gpt-oss-20b": Shape("GptOssConfig", mixtral(2880, 2880, 32, 4), SOME_TOKENS),
    "mixtral-8x7b": Shape("MixtralConfig", mixtral(4096, 14336, 8, 2), SOME_TOKENS),
    "olmoe-1b-7b": Shape(
        "OlmoeConfig",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
        SOME_TOKENS,
    ),
}
SMOKE_SHAPES: dict[str, Shape] = {
    "smoke-qwen3": Shape("Qwen3MoeConfig", qwen3(128, 64, 6, 2), SMOKE_TOKENS),
    "smoke-gpt-oss": Shape("GptOssConfig", mixtral(128, 64, 4, 2), SMOKE_TOKENS),
}


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one projection, leaves that want gradients: ``a_ERK`` and ``b_ENR``; scaling 1."""

    a_ERK: torch.Tensor
    b_ENR: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """An unquantized experts module and LoRA factors for it."""

    name: str
    module: nn.Module
    layout: ExpertsLayout
    top_k: int
    factors: dict[str, Factors]
    cache: dict[str, Any] = field(default_factory=dict)  # packed copies, made once

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def leaves(self) -> list[torch.Tensor]:
        """All factors: A and B of the first projection, then of the second."""
        return [t for p in self.layout.projections for t in vars(self.factors[p.name]).values()]


@dataclass(frozen=True)
class Inputs:
    """What goes in: ``x_TH``, ``index_Tk``, ``weights_Tk``, and the gradient ``grad_TH`` of the output."""

    x_TH: torch.Tensor
    index_Tk: torch.Tensor
    weights_Tk: torch.Tensor
    grad_TH: torch.Tensor


@dataclass
class Results:
    """The output ``[T, H]``, and gradients by name: of the input (``x``) and of each factor."""

    output: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def build_layer(name: str, shape: Shape, rank: int, device: torch.device, seed: int = 0) -> Layer:
    """The experts module of the shape's model in bf16, frozen, and factors that change its output by a
    tenth."""
    config = shape.config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found = next(find_experts(model))
    module, layout = found.module, found.layout
    assert isinstance(layout, ExpertsLayout), found.reason
    module.config._experts_implementation = "grouped_mm"
    module.to_empty(device=device)
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, WEIGHT_SCALE)
        parameter.requires_grad_(False)
    factors = {}
    for projection in layout.projections:
        E, N, K = projection.shape.experts, projection.shape.rows, projection.shape.columns
        a_ERK = torch.randn(E, rank, K, device=device) * K**-0.5
        b_ENR = torch.randn(E, N, rank, device=device) * WEIGHT_SCALE
        factors[projection.name] = Factors(
            a_ERK.bfloat16().requires_grad_(), b_ENR.bfloat16().requires_grad_()
        )
    return Layer(name, module, layout, shape.sizes["num_experts_per_tok"], factors)


def make_inputs(layer: Layer, tokens: int, seed: int = 1) -> Inputs:
    """Normal hidden states; router logits plus a fixed normal bias for each expert, so that some experts get
    several times the rows of others."""
    generator = torch.Generator(layer.device).manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=layer.device, generator=generator)

    E, H = layer.layout.num_experts, layer.layout.up.shape.columns
    bias_E = normal(E)
    weights_Tk, index_Tk = torch.softmax(normal(tokens, E) + bias_E, -1).topk(layer.top_k)
    weights_Tk = (weights_Tk / weights_Tk.sum(-1, keepdim=True)).bfloat16()
    return Inputs(normal(tokens, H).bfloat16(), index_Tk, weights_Tk, normal(tokens, H).bfloat16())


def gradient_names(layer: Layer) -> list[str]:
    """Names of ``layer.leaves`` in `Results.gradients`."""
    return [f"{p.name} {factor}" for p in layer.layout.projections for factor in ("A", "B")]


def exact(
    layer: Layer,
    inputs: Inputs,
    weight: Callable[[Projection, int], torch.Tensor],
    with_lora: bool = True,
) -> Results:
    """Output and gradients in fp32, expert by expert, on ``weight(projection, expert)`` ``[N, K]`` in fp32.

    Written without anything of the library's: rows are picked with a comparison, products are plain ones, and
    autograd differentiates one expert at a time, so that it fits beside what is measured.
    """
    layout, module = layer.layout, layer.module
    up, down = layout.projections
    x_TH = inputs.x_TH.float()
    result = Results(torch.zeros_like(x_TH), {"x": torch.zeros_like(x_TH)})
    leaves = layer.leaves if with_lora else []
    sums = [torch.zeros(leaf.shape, dtype=torch.float32, device=leaf.device) for leaf in leaves]
    result.gradients.update(zip(gradient_names(layer), sums, strict=False))

    def project(rows: torch.Tensor, projection: Projection, expert: int, pair: Sequence[torch.Tensor]) -> Any:
        y = rows @ weight(projection, expert).T
        if pair:
            y = y + rows @ pair[0].T @ pair[1].T
        if projection.bias is not None:
            y = y + getattr(module, projection.bias)[expert].float()
        return y

    for expert in range(layout.num_experts):
        token, slot = torch.where(inputs.index_Tk == expert)
        if not token.numel():
            continue
        rows = x_TH[token].requires_grad_()
        mine = [leaf[expert].detach().float().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            y = project(rows, up, expert, mine[:2])
            y = module._apply_gate(y) if layout.has_gate else module.act_fn(y)
            y = project(y, down, expert, mine[2:])
            y = y * inputs.weights_Tk[token, slot].float().unsqueeze(-1)
        gradients = torch.autograd.grad(y, [rows, *mine], inputs.grad_TH[token].float())
        result.output.index_add_(0, token, y.detach())
        result.gradients["x"].index_add_(0, token, gradients[0])
        for total, gradient in zip(sums, gradients[1:], strict=True):
            total[expert] = gradient
    return result


def relative_errors(found: Results, truth: Results) -> dict[str, float]:
    """Norm of the difference over the norm, of the output and of each gradient the truth has; `HOPELESS` for
    what is missing, has another shape or is not finite."""

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        if a.shape != b.shape:
            return HOPELESS
        value = ((a.float() - b).norm() / b.norm()).item()
        return value if value < HOPELESS else HOPELESS

    errors = {"output": error(found.output, truth.output)}
    for name, gradient in truth.gradients.items():
        errors[name] = error(found.gradients[name], gradient) if name in found.gradients else HOPELESS
    return errors


def in_quadrature(errors: Iterable[dict[str, float]]) -> dict[str, float]:
    """Root of the mean square of each error, over several inputs."""
    every = list(errors)
    return {
        name: min(HOPELESS, math.sqrt(sum(one[name] ** 2 for one in every) / len(every))) for name in every[0]
    }
