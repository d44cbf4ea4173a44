"""What of a card can be allocated."""

from __future__ import annotations

# What a process takes on a card beside what torch allocates (the CUDA context, kernels' code), and the share
# of the rest that the allocator loses to fragments.
CONTEXT_BYTES = 640 * 2**20
FRAGMENTS = 0.03


def room(card: int) -> int:
    """What torch can allocate on a card of so many bytes."""
    return max(0, int((card - CONTEXT_BYTES) * (1 - FRAGMENTS)))


def spare(card: int) -> int:
    """What is to stay free of it, when the context is there already: for fragments, and for code that is
    loaded when it is first needed.
    """
    return max(CONTEXT_BYTES, card - CONTEXT_BYTES - room(card))
