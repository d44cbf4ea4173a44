"""Clipping gradients where experts lie on several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from fourfold.experts import PackedExperts
from fourfold.experts.part import alike_parameters, spread_parameters


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` over the experts of all ranks; every rank calls it.

    A rank by itself knows the norm of its own experts' factors, and would scale what all have in common
    by another number than its neighbours.

    Args:
        model: with adapters, spread or not.
        max_norm: what the norm of all gradients together may be.

    Returns:
        The norm before, the same on every rank.
    """
    group = next(
        (
            m.fourfold_spread.group
            for m in model.modules()
            if isinstance(m, PackedExperts) and m.fourfold_spread
        ),
        None,
    )
    gradients = [
        [p.grad for p in parameters if p.grad is not None]
        for parameters in (alike_parameters(model).values(), spread_parameters(model).values())
    ]
    alike, own = (torch.nn.utils.get_total_norm(found) ** 2 for found in gradients)
    if group is not None:
        device = next(model.parameters()).device
        own = own.to(device)
        dist.all_reduce(own, group=group)
        alike = alike.to(device)
    norm = (alike + own).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # (as torch does it)
    for gradient in (g for found in gradients for g in found):
        gradient.mul_(factor.to(gradient.device))
    return norm


__all__ = ["clip_grad_norm_"]
