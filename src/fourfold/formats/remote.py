"""A packed stack that lies elsewhere, and is brought where products need it for as long as they use it.

What computes holds such a stack instead of tensors, also between forward and backward: the memory it is
brought to is used for other stacks in the meantime, so a tensor kept from an earlier use would hold the
numbers of another layer.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from fourfold.formats.packed import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack


class RemoteStack(ABC):
    """E packed matrices ``[N, K]`` that lie elsewhere.

    Attributes:
        fmt: how they are packed.
        shape: of the stack.
    """

    fmt: PackFormat
    shape: StackShape

    @abstractmethod
    def use(self) -> AbstractContextManager[PackedStack]:
        """The stack where it is computed with; its tensors are valid inside the context alone."""

    def experts(self, start: int, stop: int) -> RemoteStack:
        """Matrices ``start`` to ``stop``."""
        return _Part(self, start, stop)


class _Part(RemoteStack):
    def __init__(self, whole: RemoteStack, start: int, stop: int) -> None:
        self.whole, self.start, self.stop = whole, start, stop
        self.fmt, self.shape = whole.fmt, replace(whole.shape, experts=stop - start)

    @contextlib.contextmanager
    def use(self) -> Iterator[PackedStack]:
        with self.whole.use() as stack:
            yield stack.experts(self.start, self.stop)


def in_use(stack: PackedStack | PlainStack | RemoteStack) -> AbstractContextManager[PackedStack | PlainStack]:
    """The tensors of a stack for as long as the context lasts, wherever it lies."""
    if isinstance(stack, RemoteStack):
        return stack.use()
    return contextlib.nullcontext(stack)
