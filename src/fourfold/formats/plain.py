"""Weights that are not packed, where a product asks for a stack."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fourfold.formats.packed import StackShape


@dataclass(frozen=True)
class PlainStack:
    """Matrices ``[E, N, K]`` in floating point.

    Attributes:
        shape: E matrices of N by K.
        data: ``[E, N, K]``, a view of the model's parameter.
    """

    shape: StackShape
    data: torch.Tensor

    def experts(self, start: int, stop: int) -> PlainStack:
        """Matrices ``start`` to ``stop``."""
        shape = StackShape(stop - start, self.shape.rows, self.shape.columns, self.shape.parts)
        return PlainStack(shape, self.data[start:stop])
