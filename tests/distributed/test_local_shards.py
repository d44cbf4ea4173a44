"""A shard stays where it lies, also where that is not the device of the ranks' mesh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from fourfold.distributed.local_shards import from_shard


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_shard_in_cpu_memory_of_a_mesh_of_gpus_stays_there() -> None:
    mesh = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    local = torch.arange(6).view(3, 2)
    made = from_shard(local, mesh, [Shard(0)], torch.Size((3, 2)), (2, 1))
    assert (made.device.type, made.to_local().data_ptr()) == ("cpu", local.data_ptr())
    assert (made.shape, made.dtype, made.placements) == (local.shape, local.dtype, (Shard(0),))
    assert not made.requires_grad
