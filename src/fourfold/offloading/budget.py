"""How much device memory experts may take, and which modules stay there for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourfold.errors import ConfigurationError

GIB = 2**30
# What ``budget="auto"`` leaves for activations, gradients and the optimizer, where the caller does not say.
AUTO_RESERVE = 4 * GIB


def free_bytes(device: torch.device) -> int:
    """Device memory that can still be had: free, or kept by torch and not in use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_device_room(device: torch.device, nbytes: int, given_back: int, what: str) -> None:
    """A CUDA device must have room for ``nbytes`` more, when ``given_back`` of what it holds are let go of.

    Raises:
        ConfigurationError: with both figures.
    """
    if device.type != "cuda":
        return
    free = free_bytes(device) + given_back
    if nbytes > free:
        raise ConfigurationError(
            f"{what} take {nbytes / GIB:.2f} GiB of {device}, which has room for {max(0, free) / GIB:.2f} "
            "GiB. Give fourfold.offload a smaller budget, which leaves more of them in host memory"
        )


def automatic(device: torch.device, held: int, reserve: int) -> int:
    """The budget ``"auto"``: what experts hold now and what is free, less ``reserve``.

    Raises:
        ConfigurationError: the device does not say how much memory it has.
    """
    if device.type != "cuda":
        raise ConfigurationError(
            f"budget='auto' asks {device} for its free memory, which only CUDA devices tell; give the budget "
            "in bytes, or None"
        )
    return max(0, held + free_bytes(device) - reserve)


@dataclass(frozen=True)
class Share:
    """Which modules stay on a device, and the buffers for the others.

    Attributes:
        sizes: bytes of each module.
        streamed: whether it is brought.
        buffers: of the size of the largest that is.
    """

    sizes: tuple[int, ...]
    streamed: tuple[bool, ...]
    buffers: int

    @property
    def away(self) -> list[int]:
        """Bytes of each module that is brought."""
        return [size for size, is_away in zip(self.sizes, self.streamed, strict=True) if is_away]

    @property
    def buffer_bytes(self) -> int:
        return self.buffers * max(self.away, default=0)


def share_out(sizes: Sequence[int], budget: int | None, buffers: int) -> Share:
    """Modules and buffers for a budget; `offload` and the plan both ask here.

    Args:
        sizes: bytes of each module, in order.
        budget: bytes that modules and buffers may take on the device together; None is the least.
        buffers: wanted.

    Raises:
        ConfigurationError: not even one buffer fits; with both figures.
    """
    streamed = choose_streamed(sizes, budget, buffers)
    fitting = fitting_buffers(sizes, streamed, budget, buffers) if any(streamed) else 0
    return Share(tuple(sizes), tuple(streamed), fitting)


def choose_streamed(sizes: Sequence[int], budget: int | None, buffers: int) -> list[bool]:
    """Which modules are brought from host memory; the others stay on the device.

    Those are spread evenly: while one that stays is computed, the next one that does not is copied.

    Args:
        sizes: bytes of each module, in order.
        budget: bytes that modules and buffers may take on the device together; None is the least.
        buffers: of the size of the largest module that is brought.

    Raises:
        ConfigurationError: not even one buffer fits; with both figures.
    """
    count = len(sizes)
    if budget is None:
        return [True] * count
    largest = max(sizes)
    if budget < largest:
        raise ConfigurationError(
            f"budget of {budget / GIB:.3f} GiB for experts on the device: one module's take "
            f"{largest / GIB:.3f} GiB, and at least one is computed there at a time "
            f"({buffers * largest / GIB:.3f} GiB for {buffers}, so that the next is copied meanwhile)"
        )
    for streamed in range(count + 1):
        chosen = [(i + 1) * streamed // count > i * streamed // count for i in range(count)]
        away = [size for size, is_away in zip(sizes, chosen, strict=True) if is_away]
        resident = sum(sizes) - sum(away)
        if resident + min(buffers, len(away)) * max(away, default=0) <= budget:
            return chosen
    return [True] * count  # (fewer buffers then: see `fitting_buffers`)


def fitting_buffers(sizes: Sequence[int], streamed: Sequence[bool], budget: int | None, buffers: int) -> int:
    """Number of buffers that the budget has room for beside what stays; at least one."""
    away = [size for size, is_away in zip(sizes, streamed, strict=True) if is_away]
    if not away or budget is None:
        return min(buffers, max(1, len(away)))
    resident = sum(sizes) - sum(away)
    return max(1, min(buffers, len(away), (budget - resident) // max(away)))
