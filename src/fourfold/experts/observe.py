"""How an undecorated experts module uses its parameters, found by watching it.

A decorated module says how it is laid out. An undecorated one says nothing, and its shapes do not tell
either: ``[E, a, b]`` is as good as ``[E, b, a]``, and a flattened ``[E*I, H]`` may be multiplied by the left
or by the right. So the block around it is copied with its matrices on the meta device (no memory, no
arithmetic) and called once on two tokens of zeros. A `TorchFunctionMode` sees every product that a matrix
enters, and reads off the strides of the operand which stored axis is summed over: that one is `in`. Who reads
the parameter is seen as well, for some modules lend theirs to the module around them.

What cannot be watched (a block that wants other inputs, a parameter that no product takes) is not guessed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# The name of a product -> position of its weight operand when that comes second, and the axis summed over.
_PRODUCTS = {
    "linear": -1,
    "matmul": -2,
    "__matmul__": -2,
    "bmm": -2,
    "mm": -2,
    "_grouped_mm": -2,
    "grouped_mm": -2,
}


@dataclass(frozen=True)
class Use:
    """How one stored parameter is used.

    Attributes:
        rows, columns: of one stored matrix.
        sums_columns: the product sums over the columns, i.e. the matrix is stored out-by-in.
    """

    rows: int
    columns: int
    sums_columns: bool


@dataclass(frozen=True)
class Observed:
    """Uses of a module's parameters, and who reads them: the module itself (0), its parent (1), ..."""

    uses: dict[str, Use]
    reader: int


class _Seen(BaseException):
    """Ends an observation early; no `except Exception` of a model may swallow it."""


class _Watch(TorchFunctionMode):
    """Notes products of the watched parameters; answers any mix of meta and real tensors with zeros."""

    def __init__(self, watched: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = {p.untyped_storage()._cdata: name for name, p in watched.items()}
        self.watched = watched
        self.uses: dict[str, Use] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        name = getattr(func, "__name__", "")
        indexing = name == "__getitem__"
        mixed = not indexing and any(t.is_meta for t in tensors) and any(not t.is_meta for t in tensors)
        if not mixed:
            return func(*args, **kwargs)
        self._note(name, args, kwargs)

        def to_meta(value: Any) -> Any:
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        def to_zeros(value: Any) -> Any:
            return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(to_meta, args), tree_map(to_meta, kwargs)
        return tree_map(to_zeros, func(*args, **kwargs))

    def _note(self, product: str, args: Any, kwargs: Any) -> None:
        axis = _PRODUCTS.get(product)
        if axis is None:
            return
        operands = [*args, *kwargs.values()][:2]
        for position, operand in enumerate(operands):
            if not isinstance(operand, torch.Tensor) or not operand.is_meta or operand.ndim < 2:
                continue
            name = self.names.get(operand.untyped_storage()._cdata)
            if name is None:
                continue
            summed = axis if position == 1 else -1
            use = _read_strides(operand, summed)
            if use is not None:
                self.uses.setdefault(name, use)
        if len(self.uses) == len(self.names):
            raise _Seen


def _read_strides(operand: torch.Tensor, summed: int) -> Use | None:
    """The stored matrix behind an operand, from the strides of its last two axes."""
    kept = -1 if summed == -2 else -2
    size, stride = operand.shape, operand.stride()
    if stride[summed] == 1 and stride[kept] == size[summed]:
        return Use(rows=size[kept], columns=size[summed], sums_columns=True)
    if stride[kept] == 1 and stride[summed] == size[kept]:
        return Use(rows=size[summed], columns=size[kept], sums_columns=False)
    return None


def _weightless_copy(block: nn.Module) -> nn.Module:
    """A copy whose matrices are on the meta device, and whose vectors and buffers are zeros."""
    memo: dict[int, Any] = {}
    for parameter in block.parameters():
        device = "meta" if parameter.ndim >= 2 else "cpu"
        blank = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
        memo[id(parameter)] = nn.Parameter(blank, requires_grad=False)
    for buffer in block.buffers():
        memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    blank = copy.deepcopy(block, memo).eval()
    for module in blank.modules():
        # Decorated experts beside it: their loop runs where their grouped products refuse the meta device.
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return blank


def _record_readers(block: nn.Module, path: str, names: set[str]) -> list[str]:
    """Make the copy note which module's forward runs whenever a watched parameter is read."""
    running: list[str] = []
    readers: list[str] = []
    for name, module in block.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        module.register_forward_hook(lambda *_: running.pop() and None, always_call=True)
    watched: Any = block.get_submodule(path)

    def read(self: nn.Module, name: str) -> Any:
        if name in names and running:
            readers.append(running[-1])
        return nn.Module.__getattr__(self, name)

    watched.__class__ = type(type(watched).__name__, (type(watched),), {"__getattr__": read})
    return readers


def possible_inputs(
    block: nn.Module, sizes: list[int], dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """What the block could be called with: token ids, or hidden states of each width there could be."""
    # (without the first, the module itself, whatever it is called)
    signature = dict(list(inspect.signature(type(block).forward).parameters.items())[1:])
    if "input_ids" in signature:
        yield {"input_ids": torch.ones(1, 2, dtype=torch.long)}
        return
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [n for n, p in signature.items() if p.default is p.empty and p.kind in plain]
    if len(required) == 1:
        for size in sizes:
            yield {required[0]: torch.zeros(1, 2, size, dtype=dtype)}


def blocks_around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold module ``name``, from its parent to the model."""
    parts = name.split(".") if name else []
    for depth in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:depth]))


def observe(model: nn.Module, name: str, parameters: dict[str, nn.Parameter]) -> Observed | None:
    """Watch how the model uses parameters of one of its modules.

    Args:
        model: on any device; nothing of it is changed, moved or computed.
        name: of the module in ``model``.
        parameters: the module's own parameters that hold experts.

    Returns:
        None where no module around it could be called. A parameter that entered no product has no use.
    """
    sizes = sorted({size for p in parameters.values() for size in p.shape})
    dtype = next(iter(parameters.values())).dtype
    parts = name.split(".")
    partly: Observed | None = None
    with torch.device("cpu"):  # models are made, and so observed, under the meta device as the default
        for levels, block in enumerate(blocks_around(model, name), start=1):
            inside = ".".join(parts[-levels:])
            for inputs in possible_inputs(block, sizes, dtype):
                found = _observe_in(block, inside, parameters, inputs)
                if found is not None and found.uses.keys() == parameters.keys():
                    return found
                partly = partly or found
    return partly


def _observe_in(
    block: nn.Module, path: str, parameters: dict[str, nn.Parameter], inputs: dict[str, torch.Tensor]
) -> Observed | None:
    blank = _weightless_copy(block)
    module = blank.get_submodule(path)
    readers = _record_readers(blank, path, set(parameters))
    watched = {n: p for n, p in module.named_parameters(recurse=False) if n in parameters}
    watch = _Watch(watched)
    try:
        with torch.no_grad(), watch:
            blank(**inputs)
    except _Seen:
        pass
    except Exception:  # whatever a block says to inputs that are not its own: then another one is asked
        return None
    if not watch.uses or not readers:
        return None
    levels = path.count(".") + 1
    return Observed(watch.uses, max(levels - (r.count(".") + 1 if r else 0) for r in readers))
