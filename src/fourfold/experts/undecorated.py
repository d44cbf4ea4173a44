"""Undecorated experts modules: found by what they hold, laid out as their use shows (`observe`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fourfold.experts.observe import Observed, observe
from fourfold.experts.shapes import OwnForwardLayout, Projection
from fourfold.formats import StackShape

# Built-in layers own 3-D weights that have nothing to do with experts (a convolution over time, for one).
_BUILTIN = "torch.nn."


# Numbers that speak of experts and count none: how many a token gets, how large they are, where they stand.
_NO_COUNT = re.compile(
    r"per_tok|top_?k|selected|activated|active|capacity|group|size|dim|hidden|intermediate|ffn|channels"
    r"|layers$|expert_layer|period|interval|freq|step|offset|start|rank|idx|index|_ids?$"
)
_HEADS = re.compile(r"heads?$|num_head")


def _numbers(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers above one, by name; those in a list too."""
    for key, value in settings.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and number > 1:
                yield str(key).lower(), number


def _counts_in(settings: dict[str, Any]) -> set[int]:
    """Values that count experts (``num_experts``, ``n_routed_experts``, ``expert_num``, ...)."""
    return {n for key, n in _numbers(settings) if "expert" in key and not _NO_COUNT.search(key)}


def _expert_counts(module: nn.Module) -> set[int]:
    return _counts_in(vars(module))


def configured_expert_counts(config: Any, but_heads: bool = False) -> set[int]:
    """How many experts a configuration, or one inside it, speaks of.

    ``but_heads``: without numbers that are those of heads as well, which say nothing about a stack.
    """
    counts: set[int] = set()
    heads: set[int] = set()
    seen: set[int] = set()
    left = [config]
    while left:
        found = left.pop()
        settings = found if isinstance(found, dict) else getattr(found, "__dict__", {})
        if id(found) in seen:
            continue
        seen.add(id(found))
        counts |= _counts_in(settings)
        heads |= {n for key, n in _numbers(settings) if _HEADS.search(key)}
        nested = [v for k, v in settings.items() if isinstance(v, dict) or str(k).endswith("config")]
        left += [v for v in nested if v is not None]
    return counts - heads if but_heads else counts


@dataclass(frozen=True)
class _Stacks:
    """Parameters that are, or may be, stacks over experts.

    Attributes:
        parameters: 3-D, or flattened to 2-D.
        counts: numbers of experts that there can be.
        certain: a stack is one by its shape or the class's name; else only its use can tell.
    """

    parameters: dict[str, nn.Parameter]
    counts: set[int]
    certain: bool = True


def _stacks(module: nn.Module, model: nn.Module | None, name: str) -> _Stacks | None:
    """Parameters of an undecorated module that are stacks over experts, 3-D or flattened to 2-D.

    Either an attribute or the configuration counts experts and stacks have as many entries, or the class
    calls itself experts (of a single stack the configuration must say how many then). Block-wise
    recurrences, relative attention and some Mamba mixers hold stacks of matrices too and are none. None for
    everything else.
    """
    if type(module).__module__.startswith(_BUILTIN):
        return None
    parameters = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    if not parameters:
        return None
    own = _expert_counts(module)
    matrices = {n: p for n, p in parameters.items() if p.ndim == 3 and min(p.shape[1:]) > 1}
    stacks = {n: p for n, p in matrices.items() if p.shape[0] > 1}
    if any(p.shape[0] in own for p in stacks.values()):
        return _Stacks(stacks, own)
    called_experts = "expert" in type(module).__name__.lower()
    if called_experts and len(matrices) >= 2:
        return _Stacks(matrices, own)
    if called_experts and stacks:  # one projection a module, whose count is under a name of its own
        configured = configured_expert_counts(getattr(model, "config", None))
        if all(p.shape[0] in configured for p in stacks.values()):
            return _Stacks(stacks, configured)
    if len(parameters) < 2:
        return None
    configured = configured_expert_counts(getattr(model, "config", None), but_heads=True)
    counted = {n: p for n, p in stacks.items() if p.shape[0] in configured}
    if len(counted) >= 2:
        return _Stacks(counted, configured)
    # The configuration alone says too little about 2-D parameters, which every layer has.
    called = re.search(r"expert|moe|mixture", f"{name}.{type(module).__name__}".lower())
    counts = own | (configured if called else set())
    flattened = {n: p for n, p in parameters.items() if _may_be_flattened(p, counts)}
    return _Stacks(flattened, counts, certain=False) if len(flattened) >= 2 else None


def _may_be_flattened(parameter: nn.Parameter, counts: set[int]) -> bool:
    """Whether a matrix can be ``[E * rows, columns]``; one with an edge of E is a router."""
    if parameter.ndim != 2 or any(size in counts for size in parameter.shape):
        return False
    return any(parameter.shape[0] > c and parameter.shape[0] % c == 0 for c in counts)


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
        if found is None or found.uses.keys() != stacks.keys():
            return found
        _OBSERVED[key] = found
    return _OBSERVED[key]


def _are_in_counts(observed: Observed, stacks: _Stacks) -> bool:
    """Whether every matrix is taken apart into as many pieces as there are experts (a router's is whole)."""
    return all(
        stacks.parameters[name].numel() / (use.rows * use.columns) in stacks.counts
        for name, use in observed.uses.items()
    )


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
    found = _stacks(module, model, name)
    if found is None:
        return None
    stacks = found.parameters
    observed = _observe_cached(model, name, module, stacks) if model is not None else None
    if observed is not None and not found.certain and not _are_in_counts(observed, found):
        return None
    if observed is None or observed.uses.keys() != stacks.keys():
        return None, "its fused experts cannot be packed, for how its forward uses them could not be observed"
    layout = _from_observed(stacks, observed)
    return (None, f"it cannot be packed: {layout}") if isinstance(layout, str) else (layout, "")
