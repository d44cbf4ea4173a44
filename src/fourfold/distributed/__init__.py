"""Several GPUs, by PyTorch's own engines: FSDP2 (`fully_shard`) and DDP over packed experts.

Names are resolved on first use: importing this imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourfold.distributed.checkpoint import load_checkpoint, save_checkpoint
    from fourfold.distributed.clip import clip_grad_norm_
    from fourfold.distributed.load import load_sharded
    from fourfold.distributed.replicas import replicate
    from fourfold.distributed.save import save_packed
    from fourfold.distributed.sharding import is_sharded, shard

__all__ = [
    "clip_grad_norm_",
    "is_sharded",
    "load_checkpoint",
    "load_sharded",
    "replicate",
    "save_checkpoint",
    "save_packed",
    "shard",
]

_WHERE = {
    "clip_grad_norm_": "clip",
    "is_sharded": "sharding",
    "load_checkpoint": "checkpoint",
    "load_sharded": "load",
    "replicate": "replicas",
    "save_checkpoint": "checkpoint",
    "save_packed": "save",
    "shard": "sharding",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(
            f"module 'fourfold.distributed' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(f"fourfold.distributed.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
