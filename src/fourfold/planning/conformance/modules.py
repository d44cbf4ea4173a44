"""An experts module by itself: its arguments, its output and gradient, and damage that must be seen."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import PreTrainedModel

from fourfold.experts import FoundExperts, PackedExperts
from fourfold.experts.observe import blocks_around, possible_inputs
from fourfold.planning.conformance.row import NOISE, TIGHT, Row
from fourfold.planning.conformance.tiny_models import HIDDEN, VOCABULARY

# How models say that inputs which their signature leaves open are missing.
_WANTS_OTHERS = r"(must|have to|need to|should|please) (specify|provide|pass|be)|required|missing"


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Token ids; where those are not taken, their embeddings."""
    ids = torch.arange(1, 25).view(2, 12) % (VOCABULARY // 2)
    yield {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    yield {
        "inputs_embeds": torch.randn(2, 12, getattr(model.config.get_text_config(), "hidden_size", HIDDEN))
    }


def _takes(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether the signature offers these inputs and asks for no others."""
    parameters = inspect.signature(type(model).forward).parameters
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError:
        return False
    return inputs.keys() <= parameters.keys() and type(model).forward is not nn.Module.forward


def inputs_it_takes(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Token ids or embeddings, whichever the model runs on; None where its signature wants something else.

    Raises:
        Exception: the model's own, where it takes such inputs by its signature and runs on none of them,
            unless it says itself that they lack something.
    """
    torch.manual_seed(0)
    error: Exception | None = None
    for inputs in _inputs(model):
        if not _takes(model, inputs):
            continue
        try:
            run_on(model, inputs)
            return inputs
        except Exception as raised:
            error = error or raised
    if error is not None and not re.search(_WANTS_OTHERS, str(error), re.IGNORECASE | re.DOTALL):
        raise error
    return None


def run_on(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's first output on these inputs."""
    torch.manual_seed(0)  # the noise that diffusion begins with
    with torch.no_grad():
        output = model(**inputs)
    return next(t for t in tree_leaves(tuple(output.values())) if isinstance(t, torch.Tensor))


def align_(model: nn.Module, alignment: int = 64) -> None:
    """Copy tensors that lie as their file has them, at any multiple of eight bytes, to aligned memory.

    CPU code sums in another order where a tensor is not aligned: two models with equal tensors then differ in
    the last bit (4e-8 to 2e-7 for inkling2).
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.data_ptr() % alignment:
            tensor.data = tensor.data.clone()


@dataclass
class Call:
    """An experts module of each kind in a model, and arguments for the module that reads it."""

    found: FoundExperts
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _routed_arguments(found: FoundExperts, tokens: int = 17) -> tuple[torch.Tensor, ...]:
    layout: Any = found.layout
    x_TH = torch.randn(tokens, layout.up.shape.columns)
    weights_Tk, index_Tk = torch.softmax(torch.randn(tokens, layout.num_experts), -1).topk(2)
    return x_TH, index_Tk, weights_Tk


def observe_calls(
    model: PreTrainedModel, found: list[FoundExperts], inputs: dict[str, torch.Tensor] | None
) -> list[Call]:
    """One call for each kind and shape: made up for the routed, overheard for the undecorated."""
    kinds = {(type(f.module), f.layout): f for f in found}
    heard: dict[str, tuple[Any, Any]] = {}
    handles = []
    for f in kinds.values():
        if f.layout is not None and not f.layout.routed:
            reader = model.get_submodule(f.reader)
            handles.append(reader.register_forward_pre_hook(partial(_hear, heard, f.name), with_kwargs=True))
    if inputs is not None:
        run_on(model, inputs)
    for f in kinds.values():
        if f.layout is not None and not f.layout.routed and f.name not in heard:
            _call_around(model, f, heard)
    for handle in handles:
        handle.remove()
    calls = []
    for f in kinds.values():
        if f.layout is not None and f.layout.routed:
            calls.append(Call(f, _routed_arguments(f), {}))
        else:
            calls.append(Call(f, *_vivid(*heard[f.name])))
    return calls


def _hear(heard: dict[str, Any], name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
    heard.setdefault(name, (args, kwargs))


def _call_around(model: PreTrainedModel, found: FoundExperts, heard: dict[str, Any]) -> None:
    """Call the smallest module around experts that takes hidden states alone, until theirs are overheard."""
    assert found.layout is not None
    sizes = sorted({size for p in found.layout.projections for size in found.layout.model_shape(p)})
    for block in blocks_around(model, found.reader):
        for inputs in possible_inputs(block, sizes, torch.float32):
            with torch.no_grad(), contextlib.suppress(Exception):
                block(**{n: torch.randn(2, 12, x.shape[-1]) for n, x in inputs.items() if x.ndim == 3})
            if found.name in heard:
                return
    raise RuntimeError(f"nothing around {found.name} could be called")


def _vivid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Overheard arguments with the first floating one scaled to unit size and the others made unequal.

    (Weights that are all alike would make a sum over experts blind to their order.)
    """
    values, spec = tree_flatten((args, kwargs))
    floats = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for i in floats:
        value = values[i].detach()
        size = value.square().mean().sqrt().clamp(min=1e-12)
        values[i] = value / size if i == floats[0] else torch.rand_like(value)
    vivid: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(values, spec)
    return vivid


def _run(reader: nn.Module, call: Call, grad: bool = False) -> list[torch.Tensor]:
    """Output and, on request, gradient of the first floating input."""
    for module in reader.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    args, kwargs = tree_map(
        lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (call.args, call.kwargs)
    )
    x = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point())
    x.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = tree_leaves(reader(*args, **kwargs))[0]
    if not grad:
        return [y]
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), x)]


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check_output(
    row: Row, fmt: str, call: Call, model: PreTrainedModel, packed: PreTrainedModel, plain: PreTrainedModel
) -> None:
    reader, where = call.found.reader, f"{fmt}, {call.found.name}"
    (original,) = _run(model.get_submodule(reader), call)
    (same,) = _run(plain.get_submodule(reader), call)
    (ours,) = _run(packed.get_submodule(reader), call)
    low, high = NOISE[fmt]
    with row.check("same numbers", where):
        if not _distance(ours, same) < TIGHT:
            raise ValueError(f"{_distance(ours, same):.2e} from the same numbers dequantized")
    with row.check("noise", where):
        noise = _distance(ours, original)
        row.noise[fmt] = max(noise, row.noise.get(fmt, 0.0))
        if not low < noise < high:
            raise ValueError(f"{noise:.2e} from the original, where {low} to {high} is right")
    with row.check("backward", where):
        for mine, theirs in zip(
            _run(packed.get_submodule(reader), call, grad=True),
            _run(plain.get_submodule(reader), call, grad=True),
            strict=True,
        ):
            if not theirs.norm() > 0 or not _distance(mine, theirs) < TIGHT * 5:
                raise ValueError(f"gradient {_distance(mine, theirs):.2e} from the one of the same numbers")
    with row.check("controls", where):
        for damage, apply_ in DAMAGES.items():
            damaged = copy.deepcopy(packed.get_submodule(reader))
            inside = call.found.name[len(reader) :].lstrip(".")
            module: Any = damaged.get_submodule(inside)
            apply_(module)
            (wrong,) = _run(damaged, call)
            for theirs, limit in ((same, TIGHT), (original, high)):
                if not _distance(wrong, theirs) > limit:
                    raise ValueError(f"{damage}: only {_distance(wrong, theirs):.2e} away, and not seen")


def _replace(module: PackedExperts, name: str, suffix: str, tensor: torch.Tensor) -> None:
    module._parameters[name + suffix] = nn.Parameter(tensor, requires_grad=False)


def _roll_experts(module: PackedExperts, data: bool = True) -> None:
    for projection in module.fourfold_layout.projections:
        for suffix, tensor in module.stack(projection).tensors():
            if suffix or data:
                _replace(module, projection.name, suffix, tensor.roll(1, 0))


def _swap_gate_and_up(module: PackedExperts) -> None:
    """Gate and up exchanged; where there is no gate, the halves of the first product's rows."""
    layout: Any = module.fourfold_layout
    first = layout.projections[0]
    second = layout.projections[1] if len(layout.projections) == 3 else None
    if second is not None and second.shape == first.shape:
        for (suffix, one), (_, other) in zip(
            module.stack(first).tensors(), module.stack(second).tensors(), strict=True
        ):
            _replace(module, first.name, suffix, other)
            _replace(module, second.name, suffix, one)
        return
    rows = first.shape.rows
    order = torch.arange(rows).roll(rows // 2)
    if not getattr(layout, "is_concatenated", True):
        order = torch.arange(rows).view(-1, 2).flip(1).flatten()
    for suffix, tensor in module.stack(first).tensors():
        if tensor.ndim >= 2 and tensor.shape[1] == rows:
            _replace(module, first.name, suffix, tensor[:, order])
        elif tensor.ndim >= 2 and tensor.shape[1] == first.shape.parts == 2:
            _replace(module, first.name, suffix, tensor.flip(1))


DAMAGES: dict[str, Callable[[PackedExperts], None]] = {
    "experts rolled by one": _roll_experts,
    "scales of the neighbour": lambda module: _roll_experts(module, data=False),
    "gate and up swapped": _swap_gate_and_up,
}
