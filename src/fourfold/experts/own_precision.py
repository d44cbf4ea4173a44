"""Whether a decorated module's own forward multiplies in fp32, whatever its weights are in.

A few models ask for that (a privacy filter "is very sensitive to accumulation orders"), and say so nowhere
but in the loop over experts that they run by default. So the loop is tried once for each class: on one token
and weights that hold a single number, its products are watched.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fourfold.experts.shapes import ExpertsLayout

if TYPE_CHECKING:
    from fourfold.experts.packed import PackedExperts
    from fourfold.experts.plain import PlainExperts

_OPERATORS = ("__matmul__", "__rmatmul__")
_FUNCTIONS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "grouped_mm")
PRODUCTS = frozenset((*_OPERATORS, *_FUNCTIONS, "_grouped_mm"))
"""Names of the functions that multiply matrices."""

_TRIED: dict[type[nn.Module], bool] = {}


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in PRODUCTS:
            self.dtypes |= {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        return func(*args, **kwargs)


def multiplies_in_fp32(module: PackedExperts | PlainExperts, layout: ExpertsLayout) -> bool:
    """Whether the forward that the model's configuration chooses asks for that."""
    if getattr(getattr(module, "config", None), "_experts_implementation", None) != "eager":
        return False  # (grouped products are in the weights' dtype)
    own, *_ = type(module).fourfold_made_of
    if own not in _TRIED:
        try:
            _TRIED[own] = _watched(module, own, layout) == {torch.float32}
        except Exception:  # a forward that wants something else
            _TRIED[own] = False
    return _TRIED[own]


def _watched(module: PackedExperts | PlainExperts, own: Any, layout: ExpertsLayout) -> set[torch.dtype]:
    one = torch.full((), 0.01, dtype=torch.bfloat16, device="cpu")
    probe: Any = own.__new__(own)
    probe.__dict__.update(copy.copy(module.__dict__))
    names: dict[str, tuple[int, ...]] = {p.name: layout.model_shape(p) for p in layout.projections}
    names |= {p.bias: (p.shape.experts, p.shape.rows) for p in layout.projections if p.bias}
    probe.__dict__["_parameters"] = {name: one.expand(shape) for name, shape in names.items()}
    hidden = layout.down.shape.rows
    index = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _Watch() as watch:
        own.forward(probe, one.expand(1, hidden), index, one.expand(1, 1))
    return watch.dtypes
