"""Undecorated experts modules: found by what they hold, laid out as their use shows (`observe`)."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from fourfold.experts.observe import Observed, observe
from fourfold.experts.shapes import OwnForwardLayout, Projection
from fourfold.formats import StackShape

# Built-in layers own 3-D weights that have nothing to do with experts (a convolution over time, for one).
_BUILTIN = "torch.nn."


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


def rows_of_embeddings(module: nn.Module, name: str) -> bool:
    """Whether a child embedding holds one expert a row (retrieval: an expert is two vectors)."""
    child = getattr(module, name)
    return isinstance(child, nn.Embedding) and child.num_embeddings in _expert_counts(module)


# How a class uses its stacks does not depend on where it stands: observed once.
_OBSERVED: dict[tuple[type[nn.Module], tuple[tuple[str, tuple[int, ...]], ...]], Observed] = {}


def _observe_cached(
    model: nn.Module, name: str, module: nn.Module, stacks: dict[str, nn.Parameter]
) -> Observed | None:
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


def read_undecorated(
    module: nn.Module, model: nn.Module | None, name: str
) -> tuple[OwnForwardLayout | None, str] | None:
    """As `fourfold.experts.layout.read_layout`, for a module that does not say what it is."""
    stacks = _stacks(module)
    if not stacks:
        return None
    observed = _observe_cached(model, name, module, stacks) if model is not None else None
    if observed is None:
        return None, "its fused experts cannot be packed, for how its forward uses them could not be observed"
    layout = _from_observed(stacks, observed)
    return (None, f"it cannot be packed: {layout}") if isinstance(layout, str) else (layout, "")
