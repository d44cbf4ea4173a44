"""LoRA on packed experts, as PEFT's own parameter wrapper in low-rank form.

PEFT targets a parameter by wrapping its module in a `ParamWrapper`; two targets on one module nest (the
parameter registered first innermost). Stock forms ``W + BA`` of every expert at each forward, which cannot
work on packed bytes, costs a bf16 copy of the layer, and rounds small updates away. This subclass keeps
PEFT's parameters, shapes, names and configuration (so a saved adapter is what stock saves on the unquantized
model) and changes the computation: the outermost wrapper collects the factors of the whole nest and hands
them to the experts' routed forward.

PEFT's shapes of the factors: A ``[E*r, K]`` with the expert slowest, B ``[N, r*E]`` with the expert FASTEST.
E experts, r rank, K in, N out of the projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import nn

from fourfold.adapters.spread import cut_factors_
from fourfold.errors import AdapterError
from fourfold.experts import PackedExperts, Projection
from fourfold.experts.own_forward import OwnForwardExperts
from fourfold.experts.update import Update
from fourfold.kernels import LowRank


def refuse_merging() -> NoReturn:
    """The one answer to every way of merging."""
    raise AdapterError(
        "an adapter cannot be merged into packed weights: the sum would have to be quantized again. Load "
        "the base in high precision, or call `dequantize()` on it first, and merge there"
    )


def refuse_what_packed_cannot(config: Any) -> None:
    """Settings that need the weights' numbers.

    Raises:
        AdapterError: naming the setting.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init != "gaussian":
        raise AdapterError(
            f"init_lora_weights={init!r} starts from the base weight's numbers, which packed experts do not "
            "offer; use True, 'gaussian' or False, or leave the experts out of target_parameters"
        )


def refuse_what_would_be_ignored(config: Any, name: str) -> None:
    """Settings that PEFT applies to modules but not to parameters.

    Args:
        config: PEFT's `LoraConfig`.
        name: of the experts module whose parameter is targeted.

    Raises:
        AdapterError: naming the setting.
    """
    if getattr(config, "use_qalora", False):
        raise AdapterError(
            "use_qalora would be ignored for target_parameters; leave it out, or target modules only"
        )
    for setting in ("layers_to_transform", "layers_pattern"):
        if getattr(config, setting, None):
            raise AdapterError(
                f"{setting} would be ignored for target_parameters: LoRA would go on the experts of every "
                "layer. Name the layers in target_parameters, e.g. 'layers.0.mlp.experts.down_proj'"
            )
    excluded = getattr(config, "exclude_modules", None) or []
    if isinstance(excluded, str):
        hits = [excluded] if re.fullmatch(excluded, name) else []
    else:
        hits = [e for e in excluded if name == e or name.endswith(f".{e}")]
    if hits:
        raise AdapterError(
            f"exclude_modules={hits[0]!r} names {name}, but would be ignored for target_parameters; leave "
            "those experts out of target_parameters"
        )


# PEFT finds existing wrappers by comparing class NAMES, so this class must be called ParamWrapper too.
class ParamWrapper(StockParamWrapper):
    """Adapts one packed parameter of an experts module.

    Attributes:
        fourfold_inits: adapter -> how it began, where that has to be known (`provenance.set_init`).
    """

    fourfold_inits: dict[str, str]

    def _experts(self) -> PackedExperts:
        experts = self.get_base_layer()
        assert isinstance(experts, PackedExperts)
        return experts

    def _projection(self) -> Projection:
        projection = self._experts().fourfold_layout.projection(self.parameter_name)
        if projection is None:
            names = ", ".join(p.name for p in self._experts().fourfold_layout.projections)
            raise AdapterError(
                f"{self.parameter_name!r} is no projection of {type(self._experts()).__name__}; LoRA on "
                f"packed experts can target {names}"
            )
        return projection

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Sizes as stock reads them off the unquantized parameter (packed ones have other shapes)."""
        layout = self._experts().fourfold_layout
        shape = layout.model_shape(self._projection())
        self._param_ndim = len(shape)
        if len(shape) == 2:  # flattened: one A and one B for all experts, out-by-in
            self.num_experts = 1
            return shape[1], shape[0]
        self.num_experts = shape[0]
        return shape[1], shape[2]

    def get_param(self) -> torch.Tensor:
        """The unquantized parameter as far as PEFT looks at it: shape, dtype and device, no numbers."""
        experts = self._experts()
        shape = experts.fourfold_layout.model_shape(self._projection())
        return torch.empty(1, dtype=experts.fourfold_dtype, device=experts.computing_device).expand(shape)

    def _low_rank(self) -> LowRank | None:
        """Factors of all active adapters, joined along the rank (of several, B holds its scaling)."""
        parts = []
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            a_weight, b_weight = self.lora_A[name].weight, self.lora_B[name].weight
            a_ErK = a_weight.view(self.num_experts, -1, a_weight.shape[1])
            b_NrE = b_weight.view(b_weight.shape[0], -1, self.num_experts)
            b_ENr, scaling = b_NrE.permute(2, 0, 1), self.scaling[name]
            if isinstance(
                scaling, torch.Tensor
            ):  # it may be trained, or change; its number lies on the device
                parts.append(LowRank(a_ErK, b_ENr * scaling))
            else:
                parts.append(LowRank(a_ErK, b_ENr, scaling))
        if len(parts) < 2:
            return parts[0] if parts else None
        return LowRank(
            torch.cat([part.a_ERK for part in parts], dim=1),
            torch.cat([part.b_ENR * part.scaling for part in parts], dim=2),
        )

    def _update(self) -> Update | None:
        """What the active adapters add to the weight in the model's own shape (own forwards)."""
        factors = None if self.disable_adapters else self._low_rank()
        if factors is None:
            return None
        a_ERK, b_ENR = factors.a_ERK, factors.b_ENR * factors.scaling
        dtype = self._experts().fourfold_dtype
        if self._param_ndim == 2:
            experts = self._projection().shape.experts
            return Update(b_ENR[0].view(experts, -1, b_ENR.shape[2]), a_ERK.expand(experts, -1, -1), dtype)
        if self._did_swap_in_out_features:
            return Update(b_ENR, a_ERK, dtype)
        return Update(a_ERK.transpose(1, 2), b_ENR.transpose(1, 2), dtype)

    def _nest(self) -> Iterator[ParamWrapper]:
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            yield layer
            layer = layer.base_layer

    def __getattr__(self, name: str) -> Any:
        """Parameters that another module's forward reads off the experts (stock has no answer to that)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self._modules.get("base_layer") and self.get_base_layer()
            if not isinstance(experts, OwnForwardExperts) or not experts.is_showing():
                raise
            for layer in self._nest():
                experts.lend_update(layer.parameter_name, layer._update)
            return getattr(experts, name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Called on the outermost wrapper of a nest; the inner ones only lend their factors."""
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)  # None, or the check above would have refused it
        experts = self._experts()
        if isinstance(experts, OwnForwardExperts):
            updates = {layer.parameter_name: layer._update() for layer in self._nest()}
            found = {name: update for name, update in updates.items() if update is not None}
            return experts(x, *args, updates=found, **kwargs)
        low_rank: dict[str, LowRank] = {}
        for layer in self._nest():
            factors = None if layer.disable_adapters else layer._low_rank()
            if factors is not None:
                low_rank[layer.parameter_name] = factors
        return experts(x, *args, low_rank=low_rank, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Called for each adapter that is added, the first one included."""
        config = kwargs.get("config")
        if config is not None:
            refuse_what_packed_cannot(config)
            refuse_what_would_be_ignored(config, self._experts().fourfold_name)
        name = args[0] if args else kwargs["adapter_name"]
        self.__dict__.setdefault("fourfold_inits", {}).pop(name, None)  # (a deleted one may have had it)
        spread = self._experts().fourfold_spread
        if spread is None:
            super().update_layer(*args, **kwargs)
            return
        own, self.num_experts = self.num_experts, spread.experts
        super().update_layer(*args, **kwargs)
        self.num_experts = own
        cut_factors_(self, name, spread)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_merging()

    def unmerge(self) -> None:
        raise AdapterError("nothing is ever merged into packed weights, so there is nothing to unmerge")
