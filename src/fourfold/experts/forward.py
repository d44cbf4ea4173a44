"""The one routed forward of packed experts.

    sort routed rows by expert on the device                 rows [S], offsets [E]
    first product over packed weights + low-rank product     [S, 2I]
    bias, the module's own gate                              [S, I]
    second product, bias, norm after the expert              [S, H]
    routing weight, sum over a token's experts               [T, H]

The same for every layout and format; what differs is read off `ExpertsLayout`. T tokens, k experts a token, S
= T*k, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from fourfold.errors import ConfigurationError, UnsupportedExpertsError
from fourfold.experts.own_precision import multiplies_in_fp32
from fourfold.experts.shapes import ExpertsLayout, Projection
from fourfold.experts.subclass import Dynamic
from fourfold.formats import PackedStack
from fourfold.formats.codebooks import absmax_codes, four_bit_codes
from fourfold.formats.plain import PlainStack
from fourfold.kernels import LowRank, Routing, combine, dispatch, layer, packed_linear, route, ways

if TYPE_CHECKING:
    from fourfold.experts.packed import PackedExperts
    from fourfold.experts.plain import PlainExperts


def compute_dtype(
    module: PackedExperts | PlainExperts, hidden_states: torch.Tensor, *, grouped: bool = False
) -> torch.dtype:
    """The configured dtype, else autocast's, else that of the unquantized weights.

    (`routed_forward` takes fp32 instead of the last two where the module's own forward asks for that. In its
    own loop autocast reaches products alone; here biases and gate would follow: 1.4 times stock's error.)

    Autocast reaches no grouped products in stock, on any device: those stay in the weights' dtype, fp32 in a
    model in fp32. On a CPU the same is done here. On CUDA whoever asks for autocast asks for its speed.
    """
    if module.compute_dtype is not None:
        return module.compute_dtype
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind) and not (grouped and kind == "cpu"):
        return torch.get_autocast_dtype(kind)
    return module.fourfold_dtype


class RoutedExperts(Dynamic):
    """Base of what runs through `routed_forward`: questions about the module that are answered by trying it.

    No compiler can trace them (they compare numbers, or watch products). It takes the answers as constants.
    """

    fourfold_name: str
    fourfold_layout: Any
    fourfold_format: Any
    way: str | None
    _fourfold_gate_tried: tuple[tuple[Any, ...] | None, bool] = (None, False)

    @torch.compiler.assume_constant_result
    def has_silu_gate(self) -> bool:
        """Whether the gate is ``silu(gate) * up``: on numbers of every size (some models clamp them) it must
        give what that formula gives. Tried again where the activation or the gate was replaced.
        """
        gate = getattr(self, "_apply_gate", None)  # (the class's, or one that somebody gave this module)
        parts = (getattr(self, "act_fn", None), getattr(gate, "__func__", gate))
        tried, answer = self._fourfold_gate_tried
        if tried is None or any(a is not b for a, b in zip(tried, parts, strict=True)):
            answer = _gives_silu(self)
            self._fourfold_gate_tried = (parts, answer)
        return answer

    @torch.compiler.assume_constant_result
    def has_tables(self) -> bool:
        """Make the tables of codes where the weights are. They are made once and kept, so the first use must
        not be while a CUDA graph is recorded: what is made then lies in the graph's own memory.
        """
        fmt, device = self.fourfold_format, next(iter(self._parameters.values())).device
        if fmt.is_4bit and device.type != "meta":
            four_bit_codes(fmt.quant_type, device)
            absmax_codes(device)
        return True

    @torch.compiler.assume_constant_result
    def takes_wide_rows(self, dtype: torch.dtype) -> bool:
        """Whether the products with these weights take low-rank columns behind the rows."""
        stacks = [cast(Any, self).stack(projection) for projection in self.fourfold_layout.projections]
        return all(
            isinstance(stack, PackedStack)
            or ways.WAYS[
                ways.choose(
                    ways.problem(stack.data.new_empty(1, 0, dtype=dtype), stack), self.way, self.fourfold_name
                )
            ].takes_plain
            for stack in stacks
        )

    @torch.compiler.assume_constant_result
    def can_go_its_way(self, dtype: torch.dtype) -> bool:
        """True.

        Raises:
            ConfigurationError: there is no such way, or it cannot do a product of the module; that is named.
        """
        for projection in self.fourfold_layout.projections:
            stack = cast(Any, self).stack(projection)
            device = getattr(self, "computing_device", stack.data.device)
            problem = ways.problem(torch.empty(1, 0, dtype=dtype, device=device), stack)
            ways.choose(problem, self.way, self.fourfold_name)
        return True

    @torch.compiler.assume_constant_result
    def multiplies_in_fp32(self) -> bool:
        """See `own_precision.multiplies_in_fp32`."""
        return multiplies_in_fp32(cast(Any, self), self.fourfold_layout)


def _gives_silu(module: Any) -> bool:
    # (models are made and loaded under other default dtypes)
    sizes = torch.logspace(-4, 4, 33, dtype=torch.float32, device="cpu")
    gate, up = torch.cartesian_prod(torch.cat([-sizes, sizes]), torch.cat([-sizes, sizes])).unbind(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = module._apply_gate(torch.cat([t.unsqueeze(1) for t in (gate, gate, up, up)], dim=1))
            wanted = (torch.nn.functional.silu(gate) * up).unsqueeze(1).expand(-1, 2)
            return torch.allclose(found, wanted, rtol=1e-5, atol=1e-20)
    except Exception:  # a gate that wants something else
        return False


def is_plain_silu(module: RoutedExperts, layout: ExpertsLayout) -> bool:
    """Whether the experts are ``down(silu(gate(x)) * up(x))``, nothing added: a layer in one step."""
    if (
        not (layout.has_gate and layout.is_concatenated)
        or layout.has_post_expert_norm
        or layout.up.bias is not None
        or layout.down.bias is not None
    ):
        return False
    answer = module.has_silu_gate()
    if torch.compiler.is_compiling():
        # What a compiler has read, it asks for again before it runs what it made: that this module (of
        # several that share the code) was tried with this answer, and has an activation of this type.
        isinstance(getattr(module, "act_fn", None), torch.nn.Module)
        return module._fourfold_gate_tried[1]
    return answer


def _project(
    module: PackedExperts | PlainExperts,
    projection: Projection,
    x_SK: torch.Tensor,
    routing: Routing,
    low_rank: LowRank | None,
) -> torch.Tensor:
    y_SN = packed_linear(
        x_SK,
        module.weights(projection),
        routing.offsets_E,
        low_rank,
        workspace_bytes=module.workspace_bytes,
        way=module.way,
    )
    if projection.bias is not None:
        bias_EN = module.own_parameter(projection.bias)
        assert bias_EN is not None
        y_SN += bias_EN[routing.expert_S].to(y_SN.dtype)  # (in place: S x N numbers are a lot)
    return y_SN


def routed_forward(
    module: PackedExperts | PlainExperts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    low_rank: Mapping[str, LowRank],
) -> torch.Tensor:
    """See `PackedExperts.forward`."""
    if getattr(module, "_is_expert_parallel", False) and getattr(module, "fourfold_spread", None) is None:
        raise UnsupportedExpertsError(
            f"{module.fourfold_name}: its experts were spread over processes (expert parallelism) by "
            "something else than loading them packed. Load the model without an `ep_size` in its "
            "`distributed_config`, or with fourfold.MoeBitsAndBytesConfig(...) that packs these experts"
        )
    layout = module.fourfold_layout
    assert isinstance(layout, ExpertsLayout)
    if hidden_states.shape[0] == 0:
        return torch.zeros_like(hidden_states)
    up, down = module.weights(layout.up), module.weights(layout.down)
    if isinstance(up, PackedStack) and up.data.device != hidden_states.device:
        raise ConfigurationError(
            f"{module.fourfold_name}: its experts are on {up.data.device}, and the hidden states on "
            f"{hidden_states.device}. Move the model to one device; a copy of a model whose experts "
            "fourfold.offload sent to host memory is to be given to fourfold.offload itself"
        )
    dtype = compute_dtype(module, hidden_states, grouped=True)
    if torch.compiler.is_compiling():  # read here, so that a compiler notices when it changes
        str(getattr(getattr(module, "config", None), "_experts_implementation", None))
    if dtype != torch.float32 and module.compute_dtype is None and module.multiplies_in_fp32():
        dtype = torch.float32
    routing = route(top_k_index, layout.num_experts)
    if torch.compiler.is_compiling() and isinstance(up, PackedStack):
        module.has_tables()
    if module.way is not None:
        module.can_go_its_way(dtype)
    if (
        layer.runs_on(hidden_states.device, dtype)
        and (not isinstance(up, PlainStack) or module.takes_wide_rows(dtype))
        and is_plain_silu(module, layout)
    ):
        return layer.silu_experts(
            hidden_states,
            top_k_weights,
            routing,
            up,
            down,
            low_rank.get(layout.up.name),
            low_rank.get(layout.down.name),
            compute_dtype=dtype,
            workspace_bytes=module.workspace_bytes,
            way=module.way,
        )
    x_SH = dispatch(hidden_states.to(dtype), routing)
    up_SN = _project(module, layout.up, x_SH, routing, low_rank.get(layout.up.name))
    act_SI = module._apply_gate(up_SN) if layout.has_gate else module.act_fn(up_SN)
    down_SH = _project(module, layout.down, act_SI.to(dtype), routing, low_rank.get(layout.down.name))
    if layout.has_post_expert_norm:
        down_SH = module.post_expert_norm(down_SH)
    return combine(down_SH, top_k_weights, routing, hidden_states.dtype)
