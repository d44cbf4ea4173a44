"""Defining an operator, and a packed stack as its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import torch

from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.formats.remote import RemoteStack

Stack: TypeAlias = PackedStack | PlainStack

LIBRARY = torch.library.Library("fourfold", "DEF")

# The kernels take rows as they lie in eager mode: contiguous, or with strides of whole 16 bytes.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

STACK = "Tensor {0}data, Tensor? {0}absmax, Tensor? {0}scale, Tensor? {0}offset, str {0}fmt, int[] {0}shape"
PLAIN = "plain"


class Context:
    """What a function's forward and backward see of autograd."""

    def __init__(self, needs: Sequence[bool], saved: Sequence[torch.Tensor | None] = ()) -> None:
        self.needs_input_grad = tuple(needs)
        self.saved_tensors = tuple(saved)

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def _refuse_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(
        "a second derivative of packed experts is not computed (the functions say once_differentiable)"
    )


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Any:
    """Define ``fourfold::name``; ``gradient`` is what saves for backward, and backward."""
    LIBRARY.define(name + schema, tags=_TAGS)
    full = f"fourfold::{name}"
    torch.library.register_fake(full, fake, lib=LIBRARY)
    LIBRARY.impl(name, torch.no_grad()(run), "CompositeExplicitAutograd")
    if gradient is None:
        torch.library.register_autograd(full, _refuse_second_derivative, lib=LIBRARY)
    else:
        setup, backward = gradient
        torch.library.register_autograd(full, backward, setup_context=setup, lib=LIBRARY)
    return getattr(torch.ops.fourfold, name).default


def stack_arguments(stack: Stack | RemoteStack) -> tuple[Any, ...]:
    """A stack as operators take it: data, absmax, its scale and offset, format, ``[E, N, K, P]``."""
    assert not isinstance(stack, RemoteStack), "modules with experts elsewhere run outside of the compiler"
    shape = [stack.shape.experts, stack.shape.rows, stack.shape.columns, stack.shape.parts]
    if isinstance(stack, PlainStack):
        return stack.data, None, None, None, PLAIN, shape
    fmt = f"{stack.fmt.quant_type} {stack.fmt.blocksize} {int(stack.fmt.double_quant)}"
    return stack.data, stack.absmax, stack.absmax_scale, stack.absmax_offset, fmt, shape


@functools.cache
def _format(text: str) -> PackFormat:
    quant_type, blocksize, double_quant = text.split()
    return PackFormat(quant_type, int(blocksize), bool(int(double_quant)))


def stack_of(
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    fmt: str,
    shape: Sequence[int],
) -> Stack:
    if absmax is None:
        return PlainStack(StackShape(*shape), data)
    return PackedStack(_format(fmt), StackShape(*shape), data, absmax, scale, offset)


def or_none(tensor: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    return tensor if wanted else None


def or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if tensor is None else tensor


def needs(*tensors: torch.Tensor | None) -> list[bool]:
    """Which of the inputs will be asked for a gradient."""
    recording = torch.is_grad_enabled()
    return [recording and t is not None and t.requires_grad for t in tensors]
