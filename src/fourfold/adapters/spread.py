"""LoRA factors of experts that are spread over ranks: each rank holds those of its own experts.

PEFT's shapes have the experts inside an axis (A ``[E*r, K]``, expert slowest; B ``[N, r*E]``, expert
fastest), so a rank's part of B is no run of columns. Adapters are made whole, drawn like those of one
process, and cut; they are put together to be saved, and cut when they are read.

E experts, e of this rank, r rank, K in, N out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fourfold.experts.part import FACTOR_OF, Part


@dataclass(frozen=True)
class SpreadFactor:
    """Which part of a factor a rank holds (an attribute of the Linear that PEFT keeps it in).

    Attributes:
        is_a: A, or B.
        part: of the experts.
        experts: E.
        group: the processes that share them.
    """

    is_a: bool
    part: Part
    experts: int
    group: Any

    def _by_expert(self, weight: torch.Tensor, experts: int) -> torch.Tensor:
        """``[E, r, K]`` of A, ``[E, N, r]`` of B: views."""
        if self.is_a:
            return weight.view(experts, -1, weight.shape[1])
        return weight.view(weight.shape[0], -1, experts).permute(2, 0, 1)

    def _flat(self, by_expert: torch.Tensor) -> torch.Tensor:
        return by_expert.flatten(0, 1) if self.is_a else by_expert.permute(1, 2, 0).flatten(1)

    def is_whole(self, weight: torch.Tensor, own: torch.Tensor) -> bool:
        """Whether ``weight`` has the shape of all experts, where ``own`` is this rank's."""
        axis = 0 if self.is_a else 1
        start, stop = self.part.of(self.experts)
        return weight.ndim == 2 and weight.shape[axis] * (stop - start) == own.shape[axis] * self.experts

    def cut(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole factor, in memory of its own."""
        start, stop = self.part.of(self.experts)
        return self._flat(self._by_expert(weight, self.experts)[start:stop]).contiguous().clone()

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """The factor of all experts, of which ``weight`` is this rank's part; every rank calls it."""
        start, stop = self.part.of(self.experts)
        own = self._by_expert(weight.detach(), stop - start).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.part.count)]
        dist.all_gather(parts, own, group=self.group)
        return self._flat(torch.cat(parts)).contiguous()


def cut_factors_(wrapper: Any, name: str, spread: Any) -> None:
    """Leave of adapter ``name``, as PEFT made it for all experts, what belongs to this rank."""
    for is_a, linears in ((True, wrapper.lora_A), (False, wrapper.lora_B)):
        linear = linears[name]
        factor = SpreadFactor(is_a, spread.part, spread.experts, spread.group)
        trained = linear.weight.requires_grad
        linear.weight = nn.Parameter(factor.cut(linear.weight.detach()), requires_grad=trained)
        linear.out_features, linear.in_features = linear.weight.shape
        setattr(linear, FACTOR_OF, factor)
        linear.register_load_state_dict_pre_hook(_read_own)


def _read_own(linear: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of a factor that holds all experts, read this rank's."""
    key, factor = f"{prefix}weight", getattr(linear, FACTOR_OF)
    if key in state and factor.is_whole(state[key], linear.weight):
        state[key] = factor.cut(state[key])


def spread_factors(model: nn.Module) -> dict[str, SpreadFactor]:
    """Name of the parameter -> how it is cut."""
    found = {f"{name}.weight": getattr(m, FACTOR_OF, None) for name, m in model.named_modules()}
    return {name: factor for name, factor in found.items() if factor is not None}
