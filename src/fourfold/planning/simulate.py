"""One training step on fake tensors: shapes without numbers, and so the memory of a step before there is one.

The model's own code runs, forward and backward, with its adapters and its checkpointing, in no memory: its
parameters are made anew as fake tensors, and what cannot run on those has a stand-in (`standins`).
`LiveBytes` counts what is alive meanwhile. So no formula for an architecture is written down anywhere: what a
model published tomorrow keeps for backward is found by running it.

Autocast is that of the CPU, which casts the same products.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface

from fourfold.experts import PackedExperts
from fourfold.experts.plain import PlainExperts
from fourfold.experts.shapes import ExpertsLayout
from fourfold.planning.flops import FlopCount
from fourfold.planning.live import LiveBytes
from fourfold.planning.standins import Attention, ChunkedLoss, FrozenLinear, Target, experts_forward


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch beside weights, adapters, gradients and the optimizer's states.

    Attributes:
        kept: what the forward leaves for backward, the head excluded.
        forward: the most that is alive in the forward of the model, what is kept included.
        loss: what head and loss take beside what is kept, at most, in forward or backward.
        backward: the most that is alive in the model's backward beside gradients.
        backward_with_gradients: the most that is alive in backward, gradients as they arrive included.
        gradients: of all adapters, when backward is done.
        flops: no bytes: the floating-point operations of all of it.
    """

    kept: int
    forward: int
    loss: int
    backward: int
    backward_with_gradients: int
    gradients: int
    flops: int

    @property
    def peak(self) -> int:
        """The most that is alive, gradients included."""
        return max(self.forward, self.kept + self.loss, self.backward_with_gradients)

    @property
    def peak_beside_gradients(self) -> int:
        """The same where all gradients lie there from the start (a later micro batch of a step)."""
        return max(self.forward, self.kept + self.loss, self.backward)


def simulate_step(
    model: Any,
    target: Target,
    *,
    batch: int,
    length: int,
    bf16: bool,
    checkpointing: bool,
    padded: bool = False,
    loss_positions: int | None = None,
) -> Activations:
    """Run one micro batch of a model on the meta device, with its adapters; the model is used up.

    Args:
        model: a skeleton with LoRA on it.
        target: what the step will run on.
        batch: examples in a micro batch.
        length: tokens of each.
        bf16: whether products are under autocast.
        checkpointing: recompute a layer's activations in backward.
        padded: examples differ in length, so that attention takes a mask.
        loss_positions: how many positions of each example have a loss; None is all.

    Raises:
        Exception: whatever code raises that wants numbers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in base.modules():
        _set_stand_in(module, target)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(model, mode)
    config = base.config
    for part in (config, config.get_text_config()):
        if part._attn_implementation != "eager":
            part._attn_implementation = PADDED if padded else PLANNED
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if checkpointing:
            # (the state of random numbers is no number that a fake tensor has)
            kwargs = {"use_reentrant": False, "preserve_rng_state": False}
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        base.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    live = LiveBytes(trained, target.grain)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with mode, live, FlopCount() as counted:
        live.ignore(tensor for tensor in (*model.parameters(), *model.buffers()))
        ids = torch.zeros(batch, length, dtype=torch.long)
        head = base.get_output_embeddings()
        with autocast:
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            kept, forward = live.live, live.peak
            live.restart_peaks()
            # (cut off from the model, so that the two backwards are told apart)
            last = hidden.detach().requires_grad_()
            loss = _loss(last, head, target, loss_positions)
        loss.backward()
        at_loss = live.peak - kept
        del loss
        gradient, last = last.grad, None
        live.restart_peaks()
        hidden.backward(gradient)
    return Activations(
        kept=kept,
        forward=forward,
        loss=at_loss,
        backward=live.peak_beside_gradients,
        backward_with_gradients=live.peak,
        gradients=live.gradients,
        flops=counted.total,
    )


def _loss(hidden: torch.Tensor, head: Any, target: Target, positions: int | None) -> torch.Tensor:
    """The loss as the trainer takes it: tile by tile, of the positions before the last."""
    H = hidden.shape[-1]
    hidden = hidden[:, :-1] if positions is None else hidden[:, -1 - positions : -1]
    if target.is_cuda:  # positions with a label are gathered
        flat = hidden.flatten(0, 1)
        hidden = flat[torch.zeros(len(flat), dtype=torch.long)]
    else:
        hidden = hidden.reshape(-1, H)
    if torch.is_autocast_enabled("cpu"):
        hidden = hidden.to(torch.bfloat16)
    return ChunkedLoss.apply(hidden, head.weight.shape[0], target).sum()


def _set_stand_in(module: Any, target: Target) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if isinstance(module, PackedExperts | PlainExperts) and isinstance(module.fourfold_layout, ExpertsLayout):
        experts: Any = module
        experts.forward = experts_forward(module, target)
    elif isinstance(module, Linear4bit | Linear8bitLt):
        linear: Any = module
        linear.forward = types.MethodType(_frozen_forward, linear)


def _frozen_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    dtype = getattr(self, "compute_dtype", None)
    bits = 4 if dtype is not None or hasattr(self.weight, "quant_type") else 8
    rows = x if dtype is None or x.dtype == dtype else x.to(dtype)
    if x.ndim > 3 and bits == 8:
        rows = rows.flatten(0, -2)
    out = FrozenLinear.apply(rows, self.out_features, self.in_features, bits)
    return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Every parameter and buffer as a fake tensor on the CPU; shared ones stay shared."""
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        made[id(tensor)] = fake
                    tensors[name] = made[id(tensor)]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by blocks, as a GPU computes it; with a mask, for which heads of keys are repeated."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None and groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return Attention.apply(query, key, value, attention_mask).transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Batches without padding: the mask is left out, and known to be causal."""


def _padding_mask(
    batch_size: int, q_length: int | torch.Tensor, kv_length: int, **kwargs: Any
) -> torch.Tensor:
    length = q_length if isinstance(q_length, int) else len(q_length)
    return torch.empty(batch_size, 1, length, kv_length, dtype=torch.bool)


PLANNED, PADDED = "fourfold_planned", "fourfold_planned_padded"
for _name, _mask in ((PLANNED, _no_mask), (PADDED, _padding_mask)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[LiveBytes]:
    """Count what real tensors take while the block runs (on a CPU, in the block's thread)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with LiveBytes(trained) as live:
        live.ignore(tensor for tensor in (*model.parameters(), *model.buffers()))
        yield live
