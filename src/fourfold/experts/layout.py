"""What an experts module is, read off the module itself.

Transformers v5 keeps the routed experts of a layer as fused 3-D parameters of one module, and its decorator
`use_experts_implementation` says on the module how they are laid out: `has_gate`, `has_bias`,
`is_transposed`, `is_concatenated`, `has_post_expert_norm` (from 5.20 on), and an `_apply_gate` method. These
attributes and the shapes are all that is used here, so a model published tomorrow is recognised as well.

Modules that look like fused experts but are not decorated (llama4, dbrx, jetmoe and others) are found too, so
that they can be refused by name instead of staying in high precision in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fourfold.errors import NoExpertsError
from fourfold.formats import StackShape

_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Built-in layers own 3-D weights that have nothing to do with experts (a convolution over time, for one).
_BUILTIN = "torch.nn."


@dataclass(frozen=True)
class Projection:
    """One fused parameter of an experts module, in the canonical out-by-in orientation.

    Attributes:
        name: of the parameter, e.g. ``gate_up_proj``.
        shape: E matrices of N (out) by K (in); two parts where gate and up lie one after the other.
        bias: name of the per-expert bias ``[E, N]``, or None.
    """

    name: str
    shape: StackShape
    bias: str | None = None


@dataclass(frozen=True)
class ExpertsLayout:
    """How the experts of one module are laid out.

    Attributes:
        num_experts: E.
        up: ``gate_up_proj``, or ``up_proj`` where there is no gate.
        down: ``down_proj``.
        has_gate: the first product holds gate and up; `_apply_gate` joins them.
        is_transposed: the model stores in-by-out matrices (packed ones are always out-by-in).
        is_concatenated: gate and up lie one after the other (False: interleaved).
        has_post_expert_norm: a norm follows each expert, before the routing weight.
    """

    num_experts: int
    up: Projection
    down: Projection
    has_gate: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool

    @property
    def projections(self) -> tuple[Projection, Projection]:
        return self.up, self.down

    def projection(self, name: str) -> Projection | None:
        return next((p for p in self.projections if p.name == name), None)

    def model_shape(self, projection: Projection) -> tuple[int, int, int]:
        """Shape of the unquantized parameter in the model's own orientation."""
        shape = projection.shape
        if self.is_transposed:
            return shape.experts, shape.columns, shape.rows
        return shape.experts, shape.rows, shape.columns

    @property
    def kind(self) -> str:
        """Short description, e.g. ``gated`` or ``gated, transposed, interleaved, bias``."""
        words = ["gated" if self.has_gate else "no gate"]
        words += ["transposed"] * self.is_transposed
        words += ["interleaved"] * (not self.is_concatenated)
        words += ["bias"] * (self.up.bias is not None)
        words += ["norm after experts"] * self.has_post_expert_norm
        return ", ".join(words)


@dataclass(frozen=True)
class FoundExperts:
    """A module that holds fused experts.

    Attributes:
        name: full name in the model, without wrappers of adapters.
        module: the experts module itself.
        layout: None where the kind cannot be packed; `reason` then says why.
    """

    name: str
    module: nn.Module
    layout: ExpertsLayout | None
    reason: str = ""

    def tensors(self) -> list[str]:
        """Full names of the fused parameters."""
        if self.layout is not None:
            return [f"{self.name}.{p.name}" for p in self.layout.projections]
        return [f"{self.name}.{n}" for n, p in self.module.named_parameters(recurse=False) if p.ndim >= 2]


def _read_decorated(module: nn.Module) -> ExpertsLayout | str:
    """The layout, or why it cannot be read."""
    has_gate, transposed = bool(module.has_gate), bool(module.is_transposed)
    up_name, down_name = ("gate_up_proj" if has_gate else "up_proj"), "down_proj"
    parameters = dict(module.named_parameters(recurse=False))
    if up_name not in parameters or down_name not in parameters:
        return f"it is decorated as experts but has no parameters {up_name} and {down_name}"
    concatenated = bool(module.is_concatenated)

    def projection(name: str, parts: int) -> Projection | str:
        parameter = parameters[name]
        if parameter.ndim != 3:
            return f"{name} has {parameter.ndim} dimensions, not 3"
        E, rows, columns = parameter.shape
        if transposed:
            rows, columns = columns, rows
        bias = f"{name}_bias" if module.has_bias and f"{name}_bias" in parameters else None
        return Projection(name, StackShape(E, rows, columns, parts), bias)

    up = projection(up_name, 2 if has_gate and concatenated else 1)
    down = projection(down_name, 1)
    if isinstance(up, str):
        return up
    if isinstance(down, str):
        return down
    if has_gate and up.shape.rows != 2 * down.shape.columns:
        return (
            f"{up_name} has {up.shape.rows} rows where gate and up of {down.shape.columns} each are expected"
        )
    return ExpertsLayout(
        num_experts=up.shape.experts,
        up=up,
        down=down,
        has_gate=has_gate,
        is_transposed=transposed,
        is_concatenated=concatenated,
        has_post_expert_norm=bool(getattr(module, "has_post_expert_norm", False)),
    )


def _expert_counts(module: nn.Module) -> set[int]:
    """Values of the module's attributes that count experts (``num_experts``, ``moe_num_experts``, ...)."""
    return {
        value
        for key, value in vars(module).items()
        if re.search(r"num_(local_|routed_)?experts|n_routed_experts", key)
        and isinstance(value, int)
        and value > 1
    }


def _looks_like_experts(module: nn.Module) -> bool:
    """Undecorated modules whose parameters are stacks over experts, 3-D or flattened to 2-D.

    Either an attribute counts experts and a stack has as many entries, or the class calls itself experts.
    (Block-wise recurrences, relative attention and some Mamba mixers hold stacks of matrices too and are
    none.)
    """
    if type(module).__module__.startswith(_BUILTIN):
        return False
    parameters = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
    counts = _expert_counts(module)
    stacks = [p for p in parameters if p.ndim == 3 and min(p.shape[1:]) > 1 and p.shape[0] > 1]
    if any(p.shape[0] in counts for p in stacks):
        return True
    if len(stacks) >= 2 and "expert" in type(module).__name__.lower():
        return True
    flattened = [
        p for p in parameters if p.ndim == 2 and any(p.shape[0] > c and p.shape[0] % c == 0 for c in counts)
    ]
    return len(flattened) >= 2


def read_layout(module: nn.Module) -> tuple[ExpertsLayout | None, str] | None:
    """``(layout, "")`` of an experts module, ``(None, reason)`` of one that cannot be packed, else None."""
    packed = getattr(module, "fourfold_layout", None)
    if packed is not None:
        return packed, ""
    if all(hasattr(module, name) for name in _DECORATED):
        layout = _read_decorated(module)
        return (None, layout) if isinstance(layout, str) else (layout, "")
    if _looks_like_experts(module):
        return None, "its fused experts are of a kind that cannot be packed yet"
    return None


def clean_name(name: str) -> str:
    """A module's name without what PEFT's wrappers put into it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def find_experts(model: nn.Module) -> Iterator[FoundExperts]:
    """Every module of ``model`` that holds fused experts, in registration order.

    Works on quantized, unquantized and meta models, with or without adapters.
    """
    for name, module in model.named_modules():
        if getattr(module, "parameter_name", None) is not None and hasattr(module, "base_layer"):
            continue  # an adapter's wrapper passes on the attributes of what it wraps
        found = read_layout(module)
        if found is not None:
            yield FoundExperts(clean_name(name), module, *found)


def name_suffix(name: str) -> str:
    """What repeats in every layer: the name after the last numbered component."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[-1] + 1 :]) if numbered else name


def expert_targets(model: nn.Module) -> list[str]:
    """``target_parameters`` for PEFT's `LoraConfig`: the suffixes of all fused expert parameters.

    Args:
        model: quantized, unquantized or on the meta device, with or without adapters.

    Returns:
        For example ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``, in registration order, the
        order in which PEFT nests its wrappers.

    Raises:
        NoExpertsError: the model has no fused experts; target parameters that match nothing train nothing.
    """
    found = [
        name_suffix(tensor)
        for experts in find_experts(model)
        if experts.layout
        for tensor in _registered(experts)
    ]
    if not found:
        raise NoExpertsError(
            f"{type(model).__name__} has no fused experts that LoRA could target; "
            "leave target_parameters out, or use target_modules for its Linear layers"
        )
    return list(dict.fromkeys(found))


def _registered(experts: FoundExperts) -> list[str]:
    """Names of the fused parameters in the order in which the module registered them."""
    wanted = set(experts.tensors())
    names = (f"{experts.name}.{n}" for n, _ in experts.module.named_parameters(recurse=False))
    return [name for name in names if name in wanted]


def high_precision_tensors(experts: FoundExperts) -> list[str]:
    """Full names of this module's fused parameters that are floating point, i.e. not packed."""
    parameters = {f"{experts.name}.{n}": p for n, p in experts.module.named_parameters(recurse=False)}
    return [
        n
        for n in experts.tensors()
        if isinstance(parameters.get(n), torch.Tensor) and parameters[n].is_floating_point()
    ]
