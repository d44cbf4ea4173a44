"""Unquantized experts with LoRA in low-rank form; without adapters they run as they always did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fourfold.experts.forward import RoutedExperts, routed_forward
from fourfold.experts.layout import find_experts
from fourfold.experts.packed import PackedExperts, give_class_back_, rebind_hooked_forward
from fourfold.experts.shapes import ExpertsLayout, Projection
from fourfold.experts.subclass import subclass
from fourfold.formats.plain import PlainStack
from fourfold.kernels import LowRank

# Weights that are their own numbers. (FP8 experts are decorated too, with scales beside the weights.)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PlainExperts(RoutedExperts):
    """Mixin of unquantized, decorated experts modules that take LoRA factors."""

    fourfold_name: str
    fourfold_layout: ExpertsLayout
    compute_dtype: torch.dtype | None = None
    workspace_bytes: int | None = None
    way: str | None = None

    @property
    def fourfold_dtype(self) -> torch.dtype:
        return self._weight(self.fourfold_layout.up).dtype

    def _weight(self, projection: Projection) -> torch.Tensor:
        weight = self._parameters[projection.name]
        assert weight is not None
        return weight

    def stack(self, projection: Projection) -> PlainStack:
        """The weights of one projection, out-by-in."""
        weight = self._weight(projection).detach()
        return PlainStack(projection.shape, self.fourfold_layout.to_stack(weight, projection))

    def weights(self, projection: Projection) -> PlainStack:
        """The same; packed experts may lie elsewhere."""
        return self.stack(projection)

    def own_parameter(self, name: str) -> torch.Tensor | None:
        """A parameter; packed experts may have those of other processes beside."""
        return self._parameters[name]

    def can_take_low_rank(self) -> bool:
        """Whether the weights are frozen and nobody has parametrized them."""
        weights = [self._parameters.get(p.name) for p in self.fourfold_layout.projections]
        return all(w is not None and not w.requires_grad for w in weights)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> Any:
        """The module's own forward; with factors, the one routed forward (arguments are the same)."""
        if not low_rank:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        return routed_forward(self, hidden_states, top_k_index, top_k_weights, low_rank)


def take_low_rank_(model: nn.Module) -> None:
    """Let every unquantized, decorated experts module of a model take LoRA factors, in place."""
    for found in list(find_experts(model)):
        if isinstance(found.module, PackedExperts | PlainExperts):
            continue
        if isinstance(found.layout, ExpertsLayout) and _are_numbers(found.module, found.layout):
            own: Any = type(found.module)
            found.module.__class__ = subclass(own, PlainExperts, "LowRank")
            found.module.fourfold_name, found.module.fourfold_layout = found.name, found.layout
            if found.layout.has_gate:
                found.module.has_silu_gate()  # (now: see `packed.prepare_module_`)
            rebind_hooked_forward(found.module)


def give_back_(module: nn.Module) -> nn.Module:
    """Undo `take_low_rank_` for one module, in place; returns it. Others are left as they are."""
    if isinstance(module, PlainExperts):
        del module.fourfold_name, module.fourfold_layout
        for choice in (
            "compute_dtype",
            "workspace_bytes",
            "way",
            "_fourfold_gate_tried",
        ):  # where there is one
            module.__dict__.pop(choice, None)
        give_class_back_(module)
    return module


def _are_numbers(module: nn.Module, layout: ExpertsLayout) -> bool:
    weights = [module._parameters.get(p.name) for p in layout.projections]
    return all(w is not None and w.dtype in _DTYPES for w in weights)
