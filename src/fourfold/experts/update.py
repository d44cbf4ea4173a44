"""What an adapter adds to the weights that a module's own forward reads.

An own forward multiplies whole weights, in ways that only it knows, so the sum ``W + left @ right`` is formed
where it reads them: of one expert where it takes one at a time, of a projection where it multiplies the
stack. The sum is no more kept for backward than the decoded weight is: it is formed again there.

It is taken in fp32 and rounded once, and so are the gradients of the factors, some experts at a time: with
factors in bf16 their gradients' error grew up to 1.8 times (jetmoe under autocast). Stock does the same where
a parameter is flattened, and rounds the factors to the weight's dtype elsewhere.

E experts, P and Q the two axes of an expert's matrix as the model stores it, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK = 2**24
"""Elements of the sum in fp32 at a time (64 MiB), at least one expert."""


class _Added(torch.autograd.Function):
    """``w + left @ right`` taken in fp32; ``w`` is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        w_EPQ: torch.Tensor,
        left_EPR: torch.Tensor,
        right_ERQ: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(left_EPR, right_ERQ)
        sum_EPQ = torch.empty(w_EPQ.shape, dtype=dtype, device=w_EPQ.device)
        with torch.autocast(w_EPQ.device.type, enabled=False):
            for e in _chunks(sum_EPQ):
                torch.add(w_EPQ[e], left_EPR[e].float() @ right_ERQ[e].float(), out=sum_EPQ[e])
        return sum_EPQ

    @staticmethod
    @once_differentiable  # a second derivative is an error, not a wrong number
    def backward(ctx: Any, grad_EPQ: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left_EPR, right_ERQ = ctx.saved_tensors
        _, needs_left, needs_right, _ = ctx.needs_input_grad
        grad_left = torch.empty_like(left_EPR) if needs_left else None
        grad_right = torch.empty_like(right_ERQ) if needs_right else None
        with torch.autocast(grad_EPQ.device.type, enabled=False):
            for e in _chunks(grad_EPQ):
                grad = grad_EPQ[e].float()
                if grad_left is not None:
                    grad_left[e] = (grad @ right_ERQ[e].float().mT).to(grad_left.dtype)
                if grad_right is not None:
                    grad_right[e] = (left_EPR[e].float().mT @ grad).to(grad_right.dtype)
        return None, grad_left, grad_right, None


def _chunks(w_EPQ: torch.Tensor) -> Iterator[slice]:
    E, P, Q = w_EPQ.shape
    step = max(1, CHUNK // (P * Q))
    for start in range(0, E, step):
        yield slice(start, start + step)


@dataclass(frozen=True)
class Update:
    """A low-rank sum on the matrices of a projection, in the model's own orientation.

    Attributes:
        left_EPR: ``[E, P, R]``; the scaling is in it.
        right_ERQ: ``[E, R, Q]``; a view of one matrix where all experts share it.
        weight_dtype: of the weight that the sum is formed with, before it is rounded to that of the products;
            None is the latter.
    """

    left_EPR: torch.Tensor
    right_ERQ: torch.Tensor
    weight_dtype: torch.dtype | None = None

    def experts(self, first: int, stop: int) -> Update:
        """Of experts ``first`` to ``stop``."""
        return replace(self, left_EPR=self.left_EPR[first:stop], right_ERQ=self.right_ERQ[first:stop])

    def detach(self) -> Update:
        return replace(self, left_EPR=self.left_EPR.detach(), right_ERQ=self.right_ERQ.detach())

    def added_to(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``weight + left @ right`` in its shape and in ``dtype``, contiguous; differentiable in both."""
        left_EPR, right_ERQ = self.left_EPR, self.right_ERQ
        w_EPQ = weight.view(left_EPR.shape[0], left_EPR.shape[1], right_ERQ.shape[2])
        return _Added.apply(w_EPQ, left_EPR, right_ERQ, dtype).view(weight.shape)
