"""What a step allocates where kernels do the work: the same tensors, of the same sizes, in the same order.

A step is planned by running the model's own code on fake tensors (`simulate`). Code that reads numbers, or
launches kernels, cannot run on those: packed experts, bitsandbytes' Linears, attention and the loss. Here
each has a stand-in that computes nothing. It makes and keeps what the real one makes and keeps, and lets go
of it at the same place; the tests compare the two. Which kernels are meant, `Target` says.

S routed rows, T tokens, k experts a token, E experts, K in, N out, H hidden, I intermediate, R rank, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fourfold.experts.forward import compute_dtype, is_plain_silu
from fourfold.experts.shapes import ExpertsLayout, Projection
from fourfold.formats import PackFormat
from fourfold.kernels import LowRank, ways
from fourfold.kernels.decode import ROW_MULTIPLE
from fourfold.kernels.grouped import RANK_MULTIPLE
from fourfold.kernels.linear import empty_rows
from fourfold.planning import flops

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """What a step will run on.

    Attributes:
        device: "cuda" or "cpu".
        capability: of the GPU.
    """

    device: str = "cuda"
    capability: tuple[int, int] | None = (8, 0)

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def grain(self) -> int:
        """What its allocator rounds sizes up to."""
        return 512 if self.is_cuda else 1

    def way(self, problem: ways.Problem) -> str:
        """The way that the rule would choose there, with Triton and a compiler installed."""
        for line in ways.RULE:
            if line.fits(problem) and self._can(line.way, problem):
                return line.way
        raise AssertionError("the last line fits everything")

    def _can(self, name: str, problem: ways.Problem) -> bool:
        if name == "in_product":
            return self.is_cuda and (self.capability or (0, 0)) >= (8, 0)
        reason = ways.WAYS[name].cannot(problem)
        # What this machine lacks to compile a kernel is no reason on the one that is planned for.
        return reason is None or (self.capability is not None and reason == self._lacking(name))

    def _lacking(self, name: str) -> str | None:
        from fourfold.kernels.cuda import few_rows, hopper

        assert self.capability is not None
        if name == "few_rows":
            return few_rows.unavailable(self.capability)
        return hopper.unavailable() if name == "hopper" else None


@dataclass(frozen=True)
class Matrices:
    """A stack, as far as a product's memory depends on it."""

    experts: int
    rows: int
    columns: int
    fmt: PackFormat | None
    plain: tuple[torch.dtype, tuple[int, ...]] | None

    @classmethod
    def of(cls, module: Any, projection: Projection) -> Matrices:
        shape, stack = projection.shape, module.stack(projection)
        fmt = getattr(stack, "fmt", None)
        plain = None if fmt is not None else (stack.data.dtype, tuple(stack.data.stride()))
        return cls(shape.experts, shape.rows, shape.columns, fmt, plain)


def product(
    like: torch.Tensor, S: int, matrices: Matrices, rank: int, target: Target, *, transposed: bool
) -> torch.Tensor:
    """The result of a product, after its workspace has come and gone."""
    E, N, K, dtype = matrices.experts, matrices.rows, matrices.columns, like.dtype
    problem = ways.Problem(
        target.device, target.capability, dtype, matrices.fmt, S, E, N, K, rank, transposed, matrices.plain
    )
    way = target.way(problem)
    flops.product(S, N, K, rank, backward=transposed)
    work: torch.Tensor | None = None
    if way == "workspace" and matrices.plain is None:
        extra_rows, extra = (rank, 0) if transposed else (0, rank)
        columns = K + extra + (-(K + extra) % ROW_MULTIPLE if extra else 0)
        work = like.new_empty(E, N + extra_rows, columns)
    elif way == "reference" and matrices.plain is None:
        work = like.new_empty(N, K)  # one expert after the other
    elif way == "hopper" and matrices.fmt is not None and matrices.fmt.is_4bit:
        work = like.new_empty(E, K // 64, N, dtype=torch.float32)
    out = like.new_empty(S, K if transposed else N)
    del work
    return out


def factors(low_rank: LowRank | None, dtype: torch.dtype, target: Target) -> tuple[Any, Any]:
    """`linear.padded_factors` for the target."""
    if low_rank is None:
        return None, None
    a_ERK, b_ENR = low_rank.a_ERK.to(dtype), low_rank.b_ENR.to(dtype)
    padding = -a_ERK.shape[1] % RANK_MULTIPLE if target.is_cuda else 0
    if padding:
        a_ERK = torch.nn.functional.pad(a_ERK, (0, 0, 0, padding))
        b_ENR = torch.nn.functional.pad(b_ENR, (0, padding))
    return a_ERK.contiguous(), b_ENR.contiguous()


class OneStep(torch.autograd.Function):
    """`kernels.layer._SiluExperts`."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Any, weights_Tk: Any, a_up: Any, b_up: Any, a_down: Any, b_down: Any, spec: Any
    ) -> torch.Tensor:
        up, down, target, dtype = spec
        (T, H), k = x_TH.shape, weights_Tk.shape[1]
        S, I = T * k, down.columns  # noqa: E741
        like = x_TH.new_empty(0, dtype=dtype)
        rank = 0 if a_up is None else a_up.shape[1]
        x_Ss = empty_rows(like, S, H, rank)
        h_up = like.new_empty(S, rank) if rank else None
        up_SN = product(like, S, up, rank, target, transposed=False)
        x_SH = x_Ss[:, :H] if a_up is not None and ctx.needs_input_grad[2] else None
        del x_Ss
        rank = 0 if a_down is None else a_down.shape[1]
        act_Ss = empty_rows(like, S, I, rank)
        h_down = like.new_empty(S, rank) if rank else None
        rows_SH = product(like, S, down, rank, target, transposed=False)
        del act_Ss
        out_TH = x_TH.new_empty(T, H)
        del rows_SH
        ctx.spec, ctx.S = spec, S
        ctx.save_for_backward(x_SH, up_SN, h_up, h_down, weights_Tk, a_up, b_up, a_down, b_down)
        return out_TH

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> Any:
        _, up_SN, _, _, weights_Tk, a_up, b_up, a_down, b_down = ctx.saved_tensors
        up, down, target, _ = ctx.spec
        S, (H, N) = ctx.S, (grad_TH.shape[1], up_SN.shape[1])
        wants = ctx.needs_input_grad
        grads: list[Any] = [None] * 7
        rank = 0 if b_down is None else b_down.shape[2]
        grad_Ss = empty_rows(up_SN, S, H, rank)
        low = [up_SN.new_empty(S, rank)]  # (both of these stay until the end)
        grad_SI = product(up_SN, S, down, rank, target, transposed=True)
        if wants[5]:
            grads[5] = torch.empty_like(b_down)
        del grad_Ss
        rank = 0 if b_up is None else b_up.shape[2]
        grad_up_Ss = empty_rows(up_SN, S, N, rank)
        low.append(up_SN.new_empty(S, rank))
        act_SI = torch.empty_like(grad_SI) if wants[4] else None
        grad_weights = torch.empty_like(weights_Tk)
        del grad_SI
        if wants[4]:
            grads[4] = torch.empty_like(a_down)
        del act_SI
        if wants[3]:
            grads[3] = torch.empty_like(b_up)
        if wants[2]:
            grads[2] = torch.empty_like(a_up)
        if wants[0]:
            rows_SH = product(up_SN, S, up, rank, target, transposed=True)
            del grad_up_Ss
            grads[0] = grad_TH.new_empty(grad_TH.shape)
            del rows_SH
        grads[1] = grad_weights if wants[1] else None
        return tuple(grads)


class Linear(torch.autograd.Function):
    """`kernels.linear._PackedLinear`."""

    @staticmethod
    def forward(ctx: Any, x_SK: Any, a_ERK: Any, b_ENR: Any, matrices: Matrices, target: Target) -> Any:
        rank = 0 if a_ERK is None else a_ERK.shape[1]
        kept, h_SR = x_SK, None
        if a_ERK is None:
            y_SN = product(x_SK, len(x_SK), matrices, 0, target, transposed=False)
        else:
            y_SN, h_SR, kept = _with_low_rank(x_SK, rank, matrices, target, transposed=False)
        ctx.matrices, ctx.target, ctx.rank = matrices, target, rank
        ctx.save_for_backward(
            kept if ctx.needs_input_grad[1] else None,
            h_SR if ctx.needs_input_grad[2] else None,
            a_ERK,
            b_ENR,
        )
        return y_SN

    @staticmethod
    def backward(ctx: Any, grad_SN: torch.Tensor) -> Any:
        _, _, a_ERK, b_ENR = ctx.saved_tensors
        grad_SN = grad_SN.contiguous()
        wants, grad_x, low = ctx.needs_input_grad, None, None
        if wants[0] and ctx.rank:
            grad_x, low, _ = _with_low_rank(grad_SN, ctx.rank, ctx.matrices, ctx.target, transposed=True)
        elif wants[0]:
            grad_x = product(grad_SN, len(grad_SN), ctx.matrices, 0, ctx.target, transposed=True)
        grad_a = torch.empty_like(a_ERK) if wants[1] else None
        del low
        grad_b = torch.empty_like(b_ENR) if wants[2] else None
        return grad_x, grad_a, grad_b, None, None


def _with_low_rank(
    x_SM: torch.Tensor, rank: int, matrices: Matrices, target: Target, *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    S, M = x_SM.shape
    h_SR = x_SM.new_empty(S, rank)
    way = target.way(
        ways.Problem(
            target.device,
            target.capability,
            x_SM.dtype,
            matrices.fmt,
            S,
            matrices.experts,
            matrices.rows,
            matrices.columns,
            rank,
            transposed,
            matrices.plain,
        )
    )
    wide = ways.WAYS[way].wide and x_SM.dtype != torch.float32
    rows = empty_rows(x_SM, S, M, rank)[:, :M] if wide else x_SM
    if not wide:
        flops.product(S, matrices.rows, matrices.columns, rank, backward=transposed)
        flops.count(-2 * S * matrices.rows * matrices.columns)  # (which `product` counts)
    return product(x_SM, S, matrices, rank if wide else 0, target, transposed=transposed), h_SR, rows


class Gather(torch.autograd.Function):
    """`kernels.routing._Dispatch`."""

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, k: int, target: Target) -> torch.Tensor:
        ctx.shape, ctx.target = x_TH.shape, target
        return x_TH.new_empty(len(x_TH) * k, x_TH.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_SH: torch.Tensor) -> Any:
        return _sum_rows(grad_SH, ctx.shape, grad_SH.dtype, ctx.target, weighted=False), None, None


class Combine(torch.autograd.Function):
    """`kernels.routing._Combine`."""

    @staticmethod
    def forward(
        ctx: Any, rows_SH: torch.Tensor, weights_Tk: torch.Tensor, dtype: torch.dtype, target: Target
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_SH, weights_Tk)
        ctx.target = target
        shape = (len(weights_Tk), rows_SH.shape[1])
        return _sum_rows(rows_SH, shape, dtype, target, weighted=True)

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> Any:
        rows_SH, weights_Tk = ctx.saved_tensors
        if ctx.target.is_cuda:
            grad_rows, grad_weights = torch.empty_like(rows_SH), torch.empty_like(weights_Tk)
        else:
            grad_SH = rows_SH.new_empty(rows_SH.shape, dtype=torch.float32)
            weighted_SH = torch.empty_like(grad_SH)
            grad_rows = weighted_SH.to(rows_SH.dtype)
            del weighted_SH
            product_SH = torch.empty_like(grad_SH)
            del product_SH
            grad_weights = torch.empty_like(weights_Tk)
        return grad_rows, grad_weights if ctx.needs_input_grad[1] else None, None, None


def _sum_rows(
    rows_SH: torch.Tensor, shape: Any, dtype: torch.dtype, target: Target, *, weighted: bool
) -> torch.Tensor:
    if not target.is_cuda:  # torch's own operations, each with its result
        picked_SH = torch.empty_like(rows_SH)
        picked_SH = picked_SH.float()
        if weighted:
            picked_SH = torch.empty_like(picked_SH)
    return rows_SH.new_empty(shape, dtype=dtype)


class FrozenLinear(torch.autograd.Function):
    """bitsandbytes' product with a frozen packed weight: decoded for the product, again in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: int, columns: int, bits: int) -> torch.Tensor:
        ctx.sizes = (out, columns)
        flops.product(x.numel() // columns, out, columns)
        if bits == 8:
            ctx.x = x  # (kept by an attribute)
            codes = x.to(torch.float16).to(torch.int8)
            del codes
        else:
            work = x.new_empty(out, columns)
            del work
        return x.new_empty(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        flops.product(grad.numel() // ctx.sizes[0], *ctx.sizes)
        work = grad.new_empty(ctx.sizes)
        grad_x = grad.new_empty(*grad.shape[:-1], ctx.sizes[1])
        del work
        return grad_x, None, None, None


class Attention(torch.autograd.Function):
    """Attention by blocks: keeps its inputs, its output and a logarithm a row, and a mask in their dtype."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        B, heads, length, _ = query.shape
        out = query.new_empty(B, length, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty(B, heads, length, dtype=torch.float32)
        bias = None if mask is None else mask.to(query.dtype)
        ctx.flops = _attention_flops(query, key, value, mask)
        flops.count(ctx.flops)
        ctx.save_for_backward(query, key, value, out, logsumexp, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, out, _, _ = ctx.saved_tensors
        flops.count(5 * ctx.flops // 2)  # (five products for two)
        grad = grad.contiguous()
        # (the kernel sums the query's gradient in fp32, and a key's over the queries that share its head)
        sums = torch.empty_like(query, dtype=torch.float32)
        groups = query.shape[1] // key.shape[1]
        by_query = [
            t.new_empty(t.shape[0], t.shape[1] * groups, *t.shape[2:]) for t in (key, value) if groups > 1
        ]
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, by_query, out
        return *grads, None


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> int:
    """Of both products; half of them where the kernel knows that attention is causal."""
    B, heads, length, width = query.shape
    each = 2 * B * heads * length * key.shape[2] * (width + value.shape[-1])
    return each if mask is not None else each // 2


# The tile of the chunked loss: tokens by words of the vocabulary.
TILE_TOKENS, TILE_WORDS = 4096, 32768


class ChunkedLoss(torch.autograd.Function):
    """The loss on hidden states, its logits made tile by tile and again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, vocabulary: int, target: Target) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.vocabulary, ctx.target = vocabulary, target
        flops.product(len(hidden), vocabulary, hidden.shape[1])
        tile = _tile(hidden, vocabulary, target)
        del tile
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        sums = hidden.new_empty(hidden.shape, dtype=torch.float32)
        for _ in range(2):  # (logits again, and the gradient)
            flops.product(len(hidden), ctx.vocabulary, hidden.shape[1])
        tile = _tile(hidden, ctx.vocabulary, ctx.target)
        del tile
        return sums.to(hidden.dtype), None, None


def _tile(hidden: torch.Tensor, vocabulary: int, target: Target) -> list[torch.Tensor]:
    tokens, words = min(len(hidden), TILE_TOKENS), min(vocabulary, TILE_WORDS)
    made = [hidden.new_empty(tokens, TILE_WORDS)]
    if not target.is_cuda:  # torch's own operations on a tile, in fp32
        made += [hidden.new_empty(tokens, words, dtype=torch.float32) for _ in range(5)]
    return made


def experts_forward(module: Any, target: Target) -> Any:
    """The forward of an experts module's stand-in; to be made before tensors are fake."""
    layout = module.fourfold_layout
    assert isinstance(layout, ExpertsLayout)
    plain_silu = is_plain_silu(module, layout)
    in_fp32 = module.multiplies_in_fp32()
    up, down = Matrices.of(module, layout.up), Matrices.of(module, layout.down)

    def forward(
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        *,
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> torch.Tensor:
        low_rank = low_rank or {}
        # (autocast on the CPU stands for the target's; it reaches grouped products on CUDA alone)
        dtype = compute_dtype(module, hidden, grouped=not target.is_cuda)
        if dtype != torch.float32 and module.compute_dtype is None and in_fp32:
            dtype = torch.float32
        S = index.numel()
        routing = [index.new_empty(S), index.new_empty(S), index.new_empty(S, dtype=torch.int32)]
        pairs = [factors(low_rank.get(p.name), dtype, target) for p in (layout.up, layout.down)]
        if target.is_cuda and dtype in HALF and plain_silu:
            out = OneStep.apply(
                hidden.contiguous(), weights.contiguous(), *pairs[0], *pairs[1], (up, down, target, dtype)
            )
        else:
            with torch.autocast("cpu", enabled=False):
                x = Gather.apply(hidden.to(dtype), index.shape[1], target)
                y = Linear.apply(x, *pairs[0], up, target)
                del x
                y = _biased(module, layout.up, y)
                act = module._apply_gate(y) if layout.has_gate else module.act_fn(y)
                del y
                rows = _biased(module, layout.down, Linear.apply(act.to(dtype), *pairs[1], down, target))
                del act
                if layout.has_post_expert_norm:
                    rows = module.post_expert_norm(rows)
                out = Combine.apply(rows, weights, hidden.dtype, target)
        return _Holding.apply(out, routing) if out.requires_grad else out

    return forward


def _biased(module: Any, projection: Projection, y_SN: torch.Tensor) -> torch.Tensor:
    if projection.bias is None:
        return y_SN
    bias_EN = getattr(module, projection.bias)
    return y_SN + bias_EN.new_empty(len(y_SN), bias_EN.shape[1]).to(y_SN.dtype)


class _Holding(torch.autograd.Function):
    """Passes a tensor on; the graph holds some others (the order of routed rows) until backward."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, held: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(*held)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None
