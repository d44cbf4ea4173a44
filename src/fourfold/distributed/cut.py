"""Which part of a tensor a rank holds, and reading no more than that of a checkpoint.

Parts are those of `torch.chunk` along the first axis, as FSDP2 cuts: with 6 experts on 4 ranks 2, 2, 2 and
none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fourfold.experts import PackedExperts, Projection
from fourfold.experts.shapes import ExpertsLayout, Layout, OwnForwardLayout


@dataclass(frozen=True)
class Part:
    """The share of one rank.

    Attributes:
        rank: 0 to ``count - 1``.
        count: of the ranks that share a tensor.
    """

    rank: int
    count: int

    def of(self, length: int) -> tuple[int, int]:
        """Where this rank's part of an axis begins and ends."""
        size = -(-length // self.count)
        return min(self.rank * size, length), min((self.rank + 1) * size, length)


class CutSlice:
    """Some rows of a tensor in a file, as the loader reads such: lazily, by indexing with ``...``."""

    def __init__(self, source: Any, start: int, stop: int) -> None:
        self.source, self.start, self.stop = source, start, stop

    def get_shape(self) -> list[int]:
        return [self.stop - self.start, *list(self.source.get_shape())[1:]]

    def get_dtype(self) -> str:
        return str(self.source.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows: torch.Tensor = self.source[self.start : self.stop]
        return rows if index is Ellipsis else rows[index]


def _of_projection(projection: Projection, part: Part) -> Projection:
    start, stop = part.of(projection.shape.experts)
    return replace(projection, shape=replace(projection.shape, experts=stop - start))


def cut_layout(layout: Layout, part: Part) -> Layout:
    """The same module with this rank's experts only."""
    if isinstance(layout, ExpertsLayout):
        up, down = _of_projection(layout.up, part), _of_projection(layout.down, part)
        return replace(layout, num_experts=up.shape.experts, up=up, down=down)
    projections = tuple(_of_projection(projection, part) for projection in layout.projections)
    experts = max(projection.shape.experts for projection in projections)
    return OwnForwardLayout(experts, projections, layout.transposed, layout.flattened, layout.reader)


@contextlib.contextmanager
def as_part(module: PackedExperts, part: Part) -> Iterator[Layout]:
    """While open, an experts module on the meta device is one of this rank's experts alone."""
    layout = module.fourfold_layout
    module.fourfold_layout = cut = cut_layout(layout, part)
    for projection in cut.projections:
        packed = projection.shape.tensors(module.fourfold_format)
        for suffix, (shape, _) in packed.items():
            leaf = projection.name + suffix
            old = module._parameters[leaf]
            assert old is not None
            if not suffix and old.is_floating_point():
                shape = cut.model_shape(projection)
            new = torch.empty(shape, dtype=old.dtype, device="meta")
            module._parameters[leaf] = torch.nn.Parameter(new, requires_grad=False)
    try:
        yield cut
    finally:
        module.fourfold_layout = layout
