"""A tensor over ranks made of this rank's shard, which stays where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def from_shard(
    local: torch.Tensor, mesh: Any, placements: Sequence[Any], shape: torch.Size, stride: tuple[int, ...]
) -> DTensor:
    """The `DTensor` of shape ``shape`` whose part on this rank is ``local``.

    ``DTensor.from_local`` moves the shard to the mesh's device, so one in CPU memory would lie on the GPU
    again, and FSDP2's CPU offloading refuses it. FSDP2 makes its own the way that is done here.
    """
    meta = TensorMeta(shape, stride, local.dtype)
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)
