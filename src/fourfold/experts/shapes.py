"""How the experts of a module are laid out: in the model, and out-by-in as they are packed.

`ExpertsLayout` is that of a decorated module, which runs through the one routed forward; `OwnForwardLayout`
that of an undecorated one, which keeps its own. Both answer the same questions about their projections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch

from fourfold.formats import StackShape


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

    @property
    def is_transposed(self) -> bool:
        """Whether any parameter is stored in-by-out."""
        return bool(self.transposed)

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
