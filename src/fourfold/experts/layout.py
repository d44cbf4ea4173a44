"""What an experts module is, read off the module itself.

Transformers v5 keeps the routed experts of a layer as fused 3-D parameters of one module, and its decorator
`use_experts_implementation` says on the module how they are laid out: `has_gate`, `has_bias`,
`is_transposed`, `is_concatenated`, `has_post_expert_norm` (from 5.20 on), and an `_apply_gate` method. These
attributes and the shapes are all that is used here, so a model published tomorrow is recognised as well.

Modules that look like fused experts but are not decorated (llama4, dbrx, jetmoe and others) keep their own
forward; how it uses each parameter is observed (`observe`). What can be neither read nor observed is found
all the same, so that it is refused by name instead of staying in high precision in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
from torch import nn

from fourfold.errors import NoExpertsError
from fourfold.experts.observe import Observed, observe
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

    routed: ClassVar[bool] = True  # runs through the one routed forward

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

    def is_out_by_in(self, projection: Projection) -> bool:
        """Whether the model stores this parameter as ``[E, N, K]``, as per-expert files hold matrices."""
        return not self.is_transposed

    def to_stack(self, weight: torch.Tensor, projection: Projection) -> torch.Tensor:
        """A fused parameter in the model's orientation -> out-by-in ``[E, N, K]`` (a view)."""
        return weight.transpose(1, 2) if self.is_transposed else weight

    def from_stack(self, w_ENK: torch.Tensor, projection: Projection) -> torch.Tensor:
        """Out-by-in matrices -> the model's own orientation, contiguous."""
        return (w_ENK.transpose(1, 2) if self.is_transposed else w_ENK).contiguous()

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
class OwnForwardLayout:
    """How the experts of an undecorated module are laid out; it keeps its own forward.

    Attributes:
        num_experts: E, the largest of the projections'.
        projections: in registration order.
        transposed: names of the projections stored in-by-out.
        flattened: names of those stored as ``[E * rows, columns]``.
        reader: who reads the parameters: 0 the module's own forward, 1 its parent's, ...
    """

    routed: ClassVar[bool] = False

    num_experts: int
    projections: tuple[Projection, ...]
    transposed: frozenset[str] = frozenset()
    flattened: frozenset[str] = frozenset()
    reader: int = 0
    _by_name: dict[str, Projection] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._by_name.update({p.name: p for p in self.projections})

    def projection(self, name: str) -> Projection | None:
        return self._by_name.get(name)

    def model_shape(self, projection: Projection) -> tuple[int, ...]:
        """Shape of the unquantized parameter as the model stores it."""
        shape = projection.shape
        rows, columns = shape.rows, shape.columns
        if projection.name in self.transposed:
            rows, columns = columns, rows
        if projection.name in self.flattened:
            return shape.experts * rows, columns
        return shape.experts, rows, columns

    def is_out_by_in(self, projection: Projection) -> bool:
        """Whether the model stores this parameter as ``[E, N, K]``, as per-expert files hold matrices."""
        return projection.name not in self.transposed | self.flattened

    def to_stack(self, weight: torch.Tensor, projection: Projection) -> torch.Tensor:
        """A parameter as the model stores it -> out-by-in ``[E, N, K]`` (a view)."""
        if projection.name in self.flattened:
            weight = weight.view(projection.shape.experts, -1, weight.shape[-1])
        return weight.transpose(1, 2) if projection.name in self.transposed else weight

    def from_stack(self, w_ENK: torch.Tensor, projection: Projection) -> torch.Tensor:
        """Out-by-in matrices -> as the model stores them, contiguous."""
        weight = w_ENK.transpose(1, 2) if projection.name in self.transposed else w_ENK
        weight = weight.contiguous()
        return weight.flatten(0, 1) if projection.name in self.flattened else weight

    @property
    def kind(self) -> str:
        """Short description, e.g. ``own forward, transposed``."""
        words = ["own forward"] + ["flattened"] * bool(self.flattened)
        if self.transposed:
            whole = len(self.transposed) == len(self.projections)
            words.append("transposed" if whole else f"{', '.join(sorted(self.transposed))} transposed")
        return ", ".join(words)


Layout: TypeAlias = "ExpertsLayout | OwnForwardLayout"


def stored_name(name: str, suffix: str) -> str:
    """Name of a stored tensor: the parameter's for the data, with a suffix for its companions.

    bitsandbytes' patterns for the Linears of a packed checkpoint match ``weight_absmax``, so a parameter that
    is called ``weight`` gets companions of another name.
    """
    if not suffix:
        return name
    path, dot, leaf = name.rpartition(".")
    return f"{path}{dot}{leaf.replace('weight', 'packed')}{suffix}"


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
    layout: Layout | None
    reason: str = ""

    @property
    def reader(self) -> str:
        """Name of the module whose forward reads the parameters: itself, or one around it."""
        return _ancestor(self.name, getattr(self.layout, "reader", 0))

    @property
    def block(self) -> str:
        """Name of the module that holds the experts and, beside them, their router."""
        return _ancestor(self.reader, 1)

    def tensors(self) -> list[str]:
        """Full names of the fused parameters."""
        if self.layout is not None:
            return [f"{self.name}.{p.name}" for p in self.layout.projections]
        return [f"{self.name}.{n}" for n, p in self.module.named_parameters(recurse=False) if p.ndim >= 2]


def _ancestor(name: str, levels: int) -> str:
    parts = name.split(".")
    return ".".join(parts[: len(parts) - levels])


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


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of an undecorated module that are stacks over experts, 3-D or flattened to 2-D.

    Either an attribute counts experts and a stack has as many entries, or the class calls itself experts.
    (Block-wise recurrences, relative attention and some Mamba mixers hold stacks of matrices too and are
    none.) Empty for everything else.
    """
    if type(module).__module__.startswith(_BUILTIN):
        return {}
    parameters = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    counts = _expert_counts(module)
    stacks = {n: p for n, p in parameters.items() if p.ndim == 3 and min(p.shape[1:]) > 1 and p.shape[0] > 1}
    if any(p.shape[0] in counts for p in stacks.values()):
        return stacks
    if "expert" in type(module).__name__.lower():
        named = {n: p for n, p in parameters.items() if p.ndim == 3 and min(p.shape[1:]) > 1}
        if len(named) >= 2:
            return named
    flattened = {
        n: p
        for n, p in parameters.items()
        if p.ndim == 2 and any(p.shape[0] > c and p.shape[0] % c == 0 for c in counts)
    }
    return flattened if len(flattened) >= 2 else {}


def _rows_of_embeddings(module: nn.Module, name: str) -> bool:
    """Whether a child embedding holds one expert a row (retrieval: an expert is two vectors)."""
    child = getattr(module, name)
    return isinstance(child, nn.Embedding) and child.num_embeddings in _expert_counts(module)


# How a class uses its stacks does not depend on where it stands: observed once.
_OBSERVED: dict[tuple[type[nn.Module], tuple[tuple[str, tuple[int, ...]], ...]], Observed] = {}


def _observe_cached(model: nn.Module, name: str, module: nn.Module) -> Observed | None:
    stacks = _stacks(module)
    key = (type(module), tuple((n, tuple(p.shape)) for n, p in stacks.items()))
    if key not in _OBSERVED:
        found = observe(model, name, stacks)
        if found is None:
            return None
        _OBSERVED[key] = found
    return _OBSERVED[key]


def _from_observed(stacks: dict[str, nn.Parameter], observed: Observed) -> OwnForwardLayout | str:
    projections: list[Projection] = []
    transposed, flattened = set(), set()
    for name, parameter in stacks.items():
        use = observed.uses[name]
        experts, odd = divmod(parameter.numel(), use.rows * use.columns)
        if (
            odd
            or parameter.shape[-1] != use.columns
            or (parameter.ndim == 3 and parameter.shape[0] != experts)
        ):
            return f"{name} {tuple(parameter.shape)} is multiplied in pieces of {use.rows} x {use.columns}"
        rows, columns = (use.rows, use.columns) if use.sums_columns else (use.columns, use.rows)
        projections.append(Projection(name, StackShape(experts, rows, columns)))
        transposed |= set() if use.sums_columns else {name}
        flattened |= {name} if parameter.ndim == 2 else set()
    # Gate and up in one: two matrices a row, as in per-expert files.
    if len(projections) == 2 and projections[0].shape.rows == 2 * projections[1].shape.columns:
        up = projections[0]
        projections[0] = replace(up, shape=replace(up.shape, parts=2))
    return OwnForwardLayout(
        num_experts=max(p.shape.experts for p in projections),
        projections=tuple(projections),
        transposed=frozenset(transposed),
        flattened=frozenset(flattened),
        reader=observed.reader,
    )


def read_layout(
    module: nn.Module, model: nn.Module | None = None, name: str = ""
) -> tuple[Layout | None, str] | None:
    """``(layout, "")`` of an experts module, ``(None, reason)`` of one that cannot be packed, else None.

    An undecorated module has to be observed in its ``model``, where it is called ``name``.
    """
    packed = getattr(module, "fourfold_layout", None)
    if packed is not None:
        return packed, ""
    layout: Layout | str
    if all(hasattr(module, attribute) for attribute in _DECORATED):
        layout = _read_decorated(module)
        return (None, layout) if isinstance(layout, str) else (layout, "")
    stacks = _stacks(module)
    if not stacks:
        return None
    observed = _observe_cached(model, name, module) if model is not None else None
    if observed is None:
        return None, "its fused experts cannot be packed, for how its forward uses them could not be observed"
    layout = _from_observed(stacks, observed)
    return (None, f"it cannot be packed: {layout}") if isinstance(layout, str) else (layout, "")


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
        found = read_layout(module, model, name)
        if found is not None:
            yield FoundExperts(clean_name(name), module, *found)
            continue
        for child in [n for n, _ in module.named_children() if _rows_of_embeddings(module, n)]:
            where = f"{name}.{child}" if name else child
            reason = "each expert is a row of an embedding, and embeddings are not packed"
            yield FoundExperts(clean_name(where), getattr(module, child), None, reason)


def _suffix(name: str) -> str:
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
    layouts = [experts for experts in find_experts(model) if experts.layout is not None]
    found = [
        _suffix(tensor)
        for experts in layouts
        if experts.layout is not None and experts.layout.routed
        for tensor in _registered(experts)
    ]
    if not found:
        why = (
            "runs its experts through its own forward, where LoRA is not offered"
            if layouts
            else ("has no fused experts that LoRA could target")
        )
        raise NoExpertsError(
            f"{type(model).__name__} {why}; "
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
