"""What an adapter adds to the weights that a module's own forward reads.

An own forward multiplies whole weights, in ways that only it knows, so the sum ``W + left @ right`` is formed
where it reads them: of one expert where it takes one at a time, of a projection where it multiplies the
stack. The sum is no more kept for backward than the decoded weight is: it is formed again there.

E experts, P and Q the two axes of an expert's matrix as the model stores it, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Update:
    """A low-rank sum on the matrices of a projection, in the model's own orientation.

    Attributes:
        left_EPR: ``[E, P, R]``; the scaling is in it.
        right_ERQ: ``[E, R, Q]``; a view of one matrix where all experts share it.
    """

    left_EPR: torch.Tensor
    right_ERQ: torch.Tensor

    def experts(self, first: int, stop: int) -> Update:
        """Of experts ``first`` to ``stop``."""
        return Update(self.left_EPR[first:stop], self.right_ERQ[first:stop])

    def detach(self) -> Update:
        return Update(self.left_EPR.detach(), self.right_ERQ.detach())

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight + left @ right`` in its shape and dtype, contiguous; differentiable in both factors."""
        left_EPR, right_ERQ = self.left_EPR.to(weight.dtype), self.right_ERQ.to(weight.dtype)
        w_EPQ = weight.view(left_EPR.shape[0], left_EPR.shape[1], right_ERQ.shape[2])
        # (autocast would give another dtype than the forward asked for)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(w_EPQ, left_EPR, right_ERQ).contiguous().view(weight.shape)
