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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fourfold.errors import NoExpertsError
from fourfold.experts.shapes import ExpertsLayout, Layout, Projection
from fourfold.experts.undecorated import read_undecorated, rows_of_embeddings
from fourfold.formats import StackShape

_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


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
    return read_undecorated(module, model, name)


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
        for child in [n for n, _ in module.named_children() if rows_of_embeddings(module, n)]:
            where = f"{name}.{child}" if name else child
            reason = "each expert is a row of an embedding, and embeddings are not packed"
            yield FoundExperts(clean_name(where), getattr(module, child), None, reason)


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
        if experts.layout is not None
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
