"""What an optimizer holds for its parameters, and what it allocates during a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# bitsandbytes: parameters of fewer elements keep fp32 states; states of fewer lie on the GPU, paged or not.
SMALLEST_IN_8BIT = 4096
SMALLEST_PAGED = 100_000
BNB_BLOCK, TORCHAO_8BIT_BLOCK, TORCHAO_4BIT_BLOCK = 256, 256, 128


@dataclass(frozen=True)
class OptimizerBytes:
    """Of one optimizer.

    Attributes:
        states: on the device.
        paged: in memory that the driver moves between device and host.
        step: allocated while it takes a step, beside states and gradients.
    """

    states: int
    paged: int
    step: int


Shape = tuple[int, ...]


def _fp32(count: int) -> Callable[[Shape], int]:
    return lambda shape: 4 * count * math.prod(shape)


def _bnb_8bit(count: int) -> Callable[[Shape], int]:
    def states(shape: Shape) -> int:
        n = math.prod(shape)
        if n < SMALLEST_IN_8BIT:
            return 4 * count * n
        return count * (n + 4 * -(-n // BNB_BLOCK))

    return states


def _torchao(bits: int, block: int) -> Callable[[Shape], int]:
    def states(shape: Shape) -> int:
        n = math.prod(shape)
        if n < SMALLEST_IN_8BIT or n % block:
            return 8 * n
        return 2 * (n * bits // 8 + 4 * (n // block))

    return states


def _adafactor(shape: Shape) -> int:
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


# States of one parameter, by the trainer's name of the optimizer.
STATES: dict[str, Callable[[Shape], int]] = {
    "adamw_torch": _fp32(2),
    "adamw_torch_fused": _fp32(2),
    "adamw_8bit": _bnb_8bit(2),
    "adamw_bnb_8bit": _bnb_8bit(2),
    "paged_adamw_8bit": _bnb_8bit(2),
    "paged_adamw_32bit": _fp32(2),
    "lion_8bit": _bnb_8bit(1),
    "lion_32bit": _fp32(1),
    "paged_lion_8bit": _bnb_8bit(1),
    "paged_lion_32bit": _fp32(1),
    "adafactor": _adafactor,
    "sgd": _fp32(0),
    "adagrad": _fp32(1),
    "stable_adamw": _fp32(2),
    "grokadamw": _fp32(3),
    "adamw_anyprecision": _fp32(2),
    "rmsprop": _fp32(1),
    "rmsprop_bnb": _fp32(1),
    "rmsprop_bnb_8bit": _bnb_8bit(1),
    "rmsprop_bnb_32bit": _fp32(1),
    "ademamix": _fp32(3),
    "ademamix_8bit": _bnb_8bit(3),
    "paged_ademamix_32bit": _fp32(3),
    "paged_ademamix_8bit": _bnb_8bit(3),
    "adamw_torch_4bit": _torchao(4, TORCHAO_4BIT_BLOCK),
    "adamw_torch_8bit": _torchao(8, TORCHAO_8BIT_BLOCK),
}


def optimizer_bytes(name: str, shapes: Iterable[Shape], *, on_gpu: bool) -> OptimizerBytes:
    """States and temporary memory of an optimizer.

    Args:
        name: one of `STATES`.
        shapes: of the trained parameters, which are fp32.
        on_gpu: on a CPU nothing is paged, and parameters are stepped one by one.
    """
    shapes = list(shapes)
    states = paged = 0
    for shape in shapes:
        count = STATES[name](shape)
        if on_gpu and name.startswith("paged_") and math.prod(shape) >= SMALLEST_PAGED:
            paged += count
        else:
            states += count
    largest = 4 * max((math.prod(shape) for shape in shapes), default=0)
    step = 0
    if name in ("adagrad", "rmsprop", "adamw_torch", "adamw_torch_4bit", "adamw_torch_8bit", "adafactor"):
        step = largest
        if (
            name in ("adagrad", "rmsprop", "adamw_torch") and on_gpu
        ):  # all parameters at once: the root of the second moments
            step = 4 * sum(math.prod(shape) for shape in shapes)
    return OptimizerBytes(states, paged, step)
