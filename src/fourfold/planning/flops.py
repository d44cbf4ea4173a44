"""Floating-point operations of a step that is run on fake tensors.

Products of torch are seen as they are dispatched, recomputed and differentiated ones included. Stand-ins
(`standins`) compute nothing, and say with `count` what the real ones do. A multiplication with its addition
is two.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """Operations since it was entered.

    Attributes:
        total: of products; what is done element by element is bound by memory, and not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __enter__(self) -> FlopCount:
        _counting.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _counting.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


_counting: list[FlopCount] = []


def count(operations: int) -> None:
    """A stand-in's operations."""
    for each in _counting:
        each.total += operations


def product(rows: int, n: int, k: int, rank: int = 0, *, backward: bool = False) -> None:
    """Rows times an ``[n, k]`` matrix, in either direction, with low-rank factors beside it (in backward
    those have gradients of their own).
    """
    count(2 * rows * (n * k + (2 if backward else 1) * rank * (n + k)))
