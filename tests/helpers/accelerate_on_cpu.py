"""accelerate shards on accelerators only: on a CPU it makes DDP of FSDP. Here the CPU passes for one.

Import this before a trainer or an `Accelerator` is made.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

_stock = state.AcceleratorState.__init__


@functools.wraps(_stock)
def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    kind = state.PartialState(kwargs.get("cpu", False)).distributed_type
    if kind == DistributedType.MULTI_CPU:
        state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    _stock(self, *args, **kwargs)


state.AcceleratorState.__init__ = _init
