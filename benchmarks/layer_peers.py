"""Other projects' experts layers, called through what they publish; absent ones raise ImportError.

- ``grouped-nf4-gemm`` (PyPI, top-level modules): `nf4_qlora.fused_grouped_lora`, with the route it chooses
  itself and with its fused kernels. It takes the rows of each expert from the host and packed weights in
  bitsandbytes' order; sorting and summing are Fourfold's here, which spares it two passes over memory.
- axolotl's ScatterMoE, `scattermoe_experts_forward`, on bf16 weights and on bitsandbytes' parametrization.
  The package is looked for inside axolotl and, because importing axolotl pulls in its trainer, by itself as
  `scattermoe_lora`.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from layer_case import Inputs, Layer
from layer_variants import Variant, packed, share
from layer_variants import parametrized as parametrized_module

from fourfold.kernels import combine, dispatch, route

_SCATTERMOE = ("axolotl.integrations.kernels.libs.scattermoe_lora.experts", "scattermoe_lora.experts")


def _grouped_nf4_gemm(train_route: str) -> Callable[[Layer], Variant]:
    def build(layer: Layer) -> Variant:
        fused_grouped_lora = importlib.import_module("nf4_qlora").fused_grouped_lora
        module, layout = packed(layer, "nf4"), layer.layout
        stored = {}
        for projection in layout.projections:
            stack = module.stack(projection)
            stored[projection.name] = stack.data, stack.absmax.view(torch.float32)

        def forward(inputs: Inputs, x_TH: torch.Tensor) -> torch.Tensor:
            os.environ["GNF4_TRAIN_GEMM"] = train_route  # how that package is told
            routing = route(inputs.index_Tk, layout.num_experts)
            ends = [0, *routing.offsets_E.tolist()]
            counts = [stop - start for start, stop in itertools.pairwise(ends)]
            present = [expert for expert, count in enumerate(counts) if count]
            sizes = [counts[expert] for expert in present]
            rows = dispatch(x_TH, routing)
            for projection in layout.projections:
                pair = layer.factors[projection.name]
                data, absmax = stored[projection.name]
                rows = fused_grouped_lora(rows, data, absmax, sizes, present, pair.a_ERK, pair.b_ENR)
                if projection.bias is not None:
                    rows = rows + getattr(layer.module, projection.bias)[routing.expert_S]
                if projection is layout.up:
                    rows = layer.module._apply_gate(rows)
            return combine(rows, inputs.weights_Tk, routing, x_TH.dtype)

        return Variant("nf4", forward, layer.leaves)

    return build


def _scattermoe_forward() -> Any:
    errors = []
    for name in _SCATTERMOE:
        try:
            return importlib.import_module(name).scattermoe_experts_forward
        except ImportError as error:
            errors.append(str(error))
    raise ImportError("; ".join(errors))


def _scattermoe(parametrized: bool) -> Callable[[Layer], Variant]:
    def build(layer: Layer) -> Variant:
        function = _scattermoe_forward()
        module = parametrized_module(layer) if parametrized else layer.module
        module = share(module)
        E, leaves = layer.layout.num_experts, []
        factors = {}
        for projection in layer.layout.projections:  # expert slowest in both: [E*R, K] and [N, E*R]
            pair = layer.factors[projection.name]
            a = pair.a_ERK.detach().flatten(0, 1).clone().requires_grad_()
            b = pair.b_ENR.detach().permute(1, 0, 2).flatten(1).clone().requires_grad_()
            factors[projection.name] = (a, b, 1.0)
            leaves += [a, b]
        module._scattermoe_lora = factors

        def canonical(gradients: Any) -> list[torch.Tensor]:
            found = []
            for a, b in zip(gradients[::2], gradients[1::2], strict=True):
                found += [a.view(E, -1, a.shape[1]), b.view(b.shape[0], E, -1).permute(1, 0, 2)]
            return found

        def forward(inputs: Inputs, x_TH: torch.Tensor) -> torch.Tensor:
            return function(module, x_TH, inputs.index_Tk, inputs.weights_Tk)

        return Variant("parametrized" if parametrized else "bf16", forward, leaves, canonical)

    return build


BUILDERS: dict[str, Callable[[Layer], Variant]] = {
    "grouped-nf4-gemm": _grouped_nf4_gemm("auto"),
    "grouped-nf4-gemm-fused": _grouped_nf4_gemm("fused"),
    "scattermoe": _scattermoe(parametrized=False),
    "scattermoe-nf4": _scattermoe(parametrized=True),
}
