"""What operations allocate, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Elements of every new storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._made: list[tuple[StorageWeakRef, int]] = []

    def alive(self) -> list[int]:
        """Elements of each of them that somebody still holds."""
        return [size for storage, size in self._made if not storage.expired()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.sizes.append(storage.nbytes() // tensor.element_size())
                self._made.append((StorageWeakRef(storage), self.sizes[-1]))
        return out
