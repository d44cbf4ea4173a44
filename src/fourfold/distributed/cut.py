"""Reading no more of a checkpoint than the part of one rank (`experts.part`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fourfold.experts import PackedExperts
from fourfold.experts.part import Part, cut_layout
from fourfold.experts.shapes import Layout


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
