"""LoRA on unquantized experts in low-rank form: stock's wrapper with another forward."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import nn

from fourfold.adapters import wrapper
from fourfold.experts.plain import PlainExperts, give_back_
from fourfold.kernels import LowRank


# (the name is what PEFT compares)
class ParamWrapper(StockParamWrapper):
    """Adapts one unquantized parameter; merging, saving and shapes are stock's."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Called for each adapter that is added, the first one included."""
        config, experts = kwargs.get("config"), self.get_base_layer()
        if config is not None and isinstance(experts, PlainExperts):
            wrapper.refuse_what_would_be_ignored(config, experts.fourfold_name)
        super().update_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Called when all adapters are taken off; what is left is the model's own module."""
        return give_back_(super().unload_and_optionally_merge_module(*args, **kwargs))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In low-rank form where the weights are frozen and nothing is merged; else stock's."""
        experts = self.get_base_layer()
        nest: list[Any] = []
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            nest.append(layer)
            layer = layer.base_layer
        whole = layer is experts and isinstance(experts, PlainExperts) and experts.can_take_low_rank()
        if not whole or kwargs.get("adapter_names") or any(w.merged or w.disable_adapters for w in nest):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        low_rank: dict[str, LowRank] = {}
        for each in nest:
            factors = wrapper.ParamWrapper._low_rank(each)
            if factors is not None:
                low_rank[each.parameter_name] = factors
        return experts(x, *args, low_rank=low_rank, **kwargs)
