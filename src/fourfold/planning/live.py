"""Counting the bytes that live storages hold, operation by operation.

`LiveBytes` is a dispatch mode: it sees every operation below autograd, in forward and in backward, and the
end of every storage that one of them returned. On real tensors it measures; on fake ones (shapes without
numbers) it foretells. Both go through this one file, so what is planned and what is measured count the same.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made since it was entered, while they are held.

    Args:
        parameters: whose gradients are told apart from the rest.
        grain: sizes are rounded up to a multiple of it (torch's allocator on a GPU: 512).

    Attributes:
        live: bytes at this moment.
        peak: the most that were live at a time.
        gradients: bytes of the gradients that have arrived.
        peak_beside_gradients: the most that were live beside gradients.
    """

    def __init__(self, parameters: list[nn.Parameter] | None = None, grain: int = 1) -> None:
        super().__init__()
        self.grain = grain
        self.live = self.peak = self.gradients = self.peak_beside_gradients = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters or ()]
        self._with_gradient: set[int] = set()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def ignore(self, tensors: Any) -> None:
        """Do not count the storages of these tensors, which lay there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.setdefault(storage._cdata, weakref.ref(storage, self._forget(storage._cdata)))

    def restart_peaks(self) -> None:
        """Look for the peaks from here on."""
        self.peak, self.peak_beside_gradients = self.live, self.live - self.gradients

    def _forget(self, key: int) -> Any:
        return lambda _: self._known.pop(key, None)

    def _see(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a wrapper without storage of its own
            return
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.grain) * self.grain

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.live - self.gradients)

    def _arrived(self, parameter: nn.Parameter) -> None:
        grad = parameter.grad
        if grad is not None and id(parameter) not in self._with_gradient:
            self._with_gradient.add(id(parameter))
            self.gradients += -(-grad.untyped_storage().nbytes() // self.grain) * self.grain
