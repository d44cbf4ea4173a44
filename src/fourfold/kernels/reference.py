"""The oracle: a plain loop over experts on decoded weights, differentiated by autograd.

Slow and memory hungry on purpose: nothing here is shared with the kernels that it judges, except the
plain-torch decoder, which is itself compared with bitsandbytes.
"""

from __future__ import annotations

import torch

from fourfold.formats import PackedStack, decode_stack


def reference_linear(
    x_SK: torch.Tensor,
    stack: PackedStack,
    offsets_E: torch.Tensor,
    a_ERK: torch.Tensor | None = None,
    b_ENR: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = x W_e^T + (x A_e^T) B_e^T`` for the rows of each expert, ``[S, N]``."""
    pieces, start = [], 0
    for expert, stop in enumerate(offsets_E.tolist()):
        rows = x_SK[start:stop]
        w_NK = decode_stack(stack.experts(expert, expert + 1), x_SK.dtype)[0]
        y = rows @ w_NK.T
        if a_ERK is not None and b_ENR is not None:
            y = y + rows @ a_ERK[expert].to(rows.dtype).T @ b_ENR[expert].to(rows.dtype).T
        pieces.append(y)
        start = stop
    return torch.cat(pieces)
