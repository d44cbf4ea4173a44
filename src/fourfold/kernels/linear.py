"""The product over packed experts with its low-rank addition, forward and backward.

For the rows of expert e:   ``y = x W_e^T + (x A_e^T) B_e^T``

W is frozen and packed. It is decoded for the product alone (into a workspace, or inside of it) and again in
backward, so no bf16 stack is kept for it (stock PEFT keeps ``W + BA`` of a whole layer: 1.2 GB in
Qwen3-30B). LoRA stays in low-rank form: nothing of the size of W or BA is formed for it, and a small update
is not rounded away by adding it to a large weight. What is saved for backward: x (only where A needs a
gradient), ``x A^T`` and the factors.

    dx = dy W + (dy B) A        dA = (dy B)^T x        dB = dy^T (x A^T)        per expert

The two terms of y, and of dx, are one product: ``[x, x A^T] [W, B]^T`` and ``[dy, dy B] [W; A]``. W is
decoded into a workspace with room for the factors, the rows have room for their low-rank columns. So the sum
is taken in the product's fp32 accumulators and rounded once, and no pass over ``[S, N]`` is made for it.
(In fp32 one more rounding is nothing: there the terms are added. Unquantized weights lie where they are: what
multiplies decoded workspaces copies some columns of them at a time into one. Adding the terms made up to 1.11
times the error of stock, which adds BA to the weights.)

How the product is computed, `kernels.ways` chooses. Its workspace is one projection of the whole layer on
CUDA, one launch and no host synchronisation; on a CPU one expert at a time. A smaller ``workspace_bytes`` on
CUDA works through the experts in chunks and reads the offsets on the host (one synchronisation a product);
decoding inside the product needs no workspace.

S rows sorted by expert, K in, N out, R rank, E experts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fourfold.formats import PackedStack
from fourfold.formats.plain import PlainStack
from fourfold.formats.remote import RemoteStack, in_use
from fourfold.kernels import ways
from fourfold.kernels.decode import ROW_MULTIPLE
from fourfold.kernels.grouped import (
    RANK_MULTIPLE,
    add_grouped_rows_,
    grouped_outer,
    grouped_rows,
    grouped_sums,
)
from fourfold.kernels.workspace import matrices


@dataclass(frozen=True)
class LowRank:
    """LoRA factors of one projection of all experts.

    Attributes:
        a_ERK: ``[E, R, K]``.
        b_ENR: ``[E, N, R]``, in any order in memory (PEFT's has the expert fastest).
        scaling: what B is multiplied by.
    """

    a_ERK: torch.Tensor
    b_ENR: torch.Tensor
    scaling: float = 1.0


@dataclass(frozen=True)
class How:
    """What the caller says on how to compute.

    Attributes:
        workspace_bytes: at most this much decoded weight at a time; None is a projection of the layer.
        way: a name of `ways.WAYS`; None leaves it to the rule.
    """

    workspace_bytes: int | None = None
    way: str | None = None

    def way_of(
        self,
        rows_SM: torch.Tensor,
        stack: PackedStack | PlainStack,
        factor: torch.Tensor | None,
        *,
        transposed: bool,
    ) -> ways.Way:
        """The way of one product."""
        rank = 0 if factor is None else factor.shape[1 if transposed else 2]
        return ways.WAYS[ways.choose(ways.problem(rows_SM, stack, rank, transposed=transposed), self.way)]


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Products in the dtype that was chosen, whatever surrounds them."""
    if torch.is_autocast_enabled(device):  # (the context takes 6 us to enter and leave)
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def empty_rows(like: torch.Tensor, rows: int, columns: int, extra: int) -> torch.Tensor:
    """Uninitialised rows with room for ``extra`` columns behind ``columns``."""
    return like.new_empty(rows, columns + extra + -(columns + extra) % ROW_MULTIPLE)


def product(
    rows_SM: torch.Tensor,
    stack: PackedStack | PlainStack,
    offsets_E: torch.Tensor,
    how: How,
    factor: torch.Tensor | None = None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """``x W^T`` (forward) or, transposed, ``dy W`` (gradient of the input).

    With a factor (B ``[E, N, R]``; transposed, A ``[E, R, K]``) the rows hold R low-rank columns as well.
    """
    way = how.way_of(rows_SM, stack, factor, transposed=transposed)
    return way.product(rows_SM, stack, offsets_E, factor, how.workspace_bytes, transposed=transposed)


def _with_low_rank(
    x_SK: torch.Tensor,
    inner: torch.Tensor,
    outer: torch.Tensor,
    stack: PackedStack | PlainStack,
    offsets_E: torch.Tensor,
    how: How,
    *,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x W^T + (x A^T) B^T``, or transposed ``dy W + (dy B) A``.

    Args:
        inner: what ``x_SK`` is multiplied with first, ``[E, K, R]``.
        outer: the factor that leads to the result.

    Returns:
        The sum, ``x inner`` ``[S, R]``, and the rows again (where they lie now).
    """
    K, R = x_SK.shape[1], inner.shape[2]
    h_SR = grouped_rows(x_SK, inner, offsets_E)
    way = how.way_of(x_SK, stack, outer, transposed=transposed)
    if not way.wide:
        y = way.product(x_SK, stack, offsets_E, outer, None, transposed=transposed, h_SR=h_SR)
        return y, h_SR, x_SK
    if isinstance(stack, PlainStack) and x_SK.dtype != torch.float32 and not way.takes_plain:
        w = matrices(stack, x_SK.dtype, None, transposed=transposed)
        outer_ERN = outer if transposed else outer.transpose(1, 2)
        return grouped_sums(x_SK, w, h_SR, outer_ERN, offsets_E), h_SR, x_SK
    limit = how.workspace_bytes
    if x_SK.dtype == torch.float32:
        y = way.product(x_SK, stack, offsets_E, None, limit, transposed=transposed)
        outer_ERN = outer if transposed else outer.transpose(1, 2)
        return add_grouped_rows_(y, h_SR, outer_ERN, offsets_E), h_SR, x_SK
    wide_Ss = empty_rows(x_SK, len(x_SK), K, R)
    wide_Ss[:, :K] = x_SK
    wide_Ss[:, K : K + R] = h_SR
    y = way.product(wide_Ss[:, : K + R], stack, offsets_E, outer, limit, transposed=transposed)
    return y, h_SR, wide_Ss[:, :K]


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SK: torch.Tensor,
        a_ERK: torch.Tensor | None,
        b_ENR: torch.Tensor | None,
        stack: PackedStack | PlainStack | RemoteStack,
        offsets_E: torch.Tensor,
        how: How,
    ) -> torch.Tensor:
        ctx.stack, ctx.how = stack, how  # (the stack, not its tensors: see `formats.remote`)
        h_SR = None
        with no_autocast(x_SK.device.type), in_use(stack) as local:
            if a_ERK is None or b_ENR is None:
                y_SN = product(x_SK, local, offsets_E, how, transposed=False)
            else:
                inner_EKR = a_ERK.transpose(1, 2)
                y_SN, h_SR, x_SK = _with_low_rank(
                    x_SK, inner_EKR, b_ENR, local, offsets_E, how, transposed=False
                )
        keep_x = ctx.needs_input_grad[1]
        keep_h = ctx.needs_input_grad[2]
        ctx.save_for_backward(x_SK if keep_x else None, h_SR if keep_h else None, a_ERK, b_ENR, offsets_E)
        return y_SN

    @staticmethod
    @once_differentiable  # a second derivative is an error, not a wrong number
    def backward(ctx: Any, grad_SN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_SK, h_SR, a_ERK, b_ENR, offsets_E = ctx.saved_tensors
        grad_SN = grad_SN.contiguous()  # grouped_mm rejects expanded gradients
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        grad_x = grad_a = grad_b = grad_h_SR = None
        with no_autocast(grad_SN.device.type):
            if needs_x and b_ENR is not None:
                with in_use(ctx.stack) as local:
                    grad_x, grad_h_SR, _ = _with_low_rank(
                        grad_SN, b_ENR, a_ERK, local, offsets_E, ctx.how, transposed=True
                    )
            elif needs_x:
                with in_use(ctx.stack) as local:
                    grad_x = product(grad_SN, local, offsets_E, ctx.how, transposed=True)
            elif needs_a:
                grad_h_SR = grouped_rows(grad_SN, b_ENR, offsets_E)
            if needs_a:
                grad_a = grouped_outer(grad_h_SR, x_SK, offsets_E)
            if needs_b:
                grad_b = grouped_outer(grad_SN, h_SR, offsets_E)
        return grad_x, grad_a, grad_b, None, None, None


class _ScaledFactor(torch.autograd.Function):
    """B times its scaling, rounded once, in one piece, with zeros behind: one pass and one launch.

    (Scaling, casting and bringing in order one by one are three, for each projection of each layer; at few
    tokens they would be half of what the host launches.)
    """

    @staticmethod
    def forward(
        ctx: Any, b_ENR: torch.Tensor, scaling: float, padding: int, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.scaling, ctx.like = scaling, (b_ENR.shape, b_ENR.stride(), b_ENR.dtype)
        E, N, R = b_ENR.shape
        out = b_ENR.new_empty(E, N, R + padding, dtype=dtype)
        torch.mul(b_ENR, scaling, out=out[..., :R])
        if padding:
            out[..., R:] = 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape, strides, dtype = ctx.like
        # In the factor's own order, so that no further copy is made of it.
        out = torch.empty_strided(shape, strides, dtype=dtype, device=grad.device)
        out.copy_(grad[..., : shape[2]])
        if ctx.scaling != 1:
            out *= ctx.scaling
        return out, None, None, None


def padded_factors(
    low_rank: LowRank | None, like: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both factors in the dtype of ``like``, in one piece, B scaled, of a rank that products take on its
    device (zeros added).
    """
    if low_rank is None:
        return None, None
    a_ERK, b_ENR, scaling = low_rank.a_ERK.to(like.dtype), low_rank.b_ENR, low_rank.scaling
    padding = -a_ERK.shape[1] % RANK_MULTIPLE if like.is_cuda else 0
    if padding:
        a_ERK = torch.nn.functional.pad(a_ERK, (0, 0, 0, padding))
    if b_ENR.dtype == like.dtype and b_ENR.is_contiguous() and scaling == 1 and not padding:
        return a_ERK.contiguous(), b_ENR
    if torch.compiler.is_compiling():  # (which fuses these)
        b_ENR = torch.nn.functional.pad((b_ENR * scaling).to(like.dtype), (0, padding)).contiguous()
    else:
        b_ENR = _ScaledFactor.apply(b_ENR, scaling, padding, like.dtype)
    return a_ERK.contiguous(), b_ENR


def packed_linear(
    x_SK: torch.Tensor,
    stack: PackedStack | PlainStack | RemoteStack,
    offsets_E: torch.Tensor,
    low_rank: LowRank | None = None,
    *,
    workspace_bytes: int | None = None,
    way: str | None = None,
) -> torch.Tensor:
    """Grouped product of sorted rows with packed weights and low-rank factors.

    Args:
        x_SK: rows sorted by expert, in the compute dtype.
        stack: packed weights ``[E, N, K]``; of one that lies elsewhere, its tensors are asked for again in
            backward.
        offsets_E: end of each expert's rows, int32; the last one must be S.
        low_rank: LoRA factors, differentiable; cast here to the dtype of ``x_SK``.
        workspace_bytes: at most this much decoded weight at a time (but never less than one expert).
        way: how to compute it (a name of `ways.WAYS`); None leaves it to the rule.

    Returns:
        ``[S, N]`` in the dtype of ``x_SK``.

    Raises:
        ConfigurationError: there is no such way, or it cannot do this.
    """
    a_ERK, b_ENR = padded_factors(low_rank, x_SK)
    how = How(workspace_bytes, way)
    if torch.compiler.is_compiling():
        from fourfold.kernels import operators

        return operators.packed_linear(x_SK, a_ERK, b_ENR, stack, offsets_E, how)
    return _PackedLinear.apply(x_SK, a_ERK, b_ENR, stack, offsets_E, how)
