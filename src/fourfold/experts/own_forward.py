"""Packed experts that keep the forward of their own class.

An undecorated module is computed in its own way (a dense batched product, identity experts, a parent that
does the product), so its own code runs, and sees ordinary weights: while the forward of whoever reads them
runs, each packed parameter is decoded as it is used, in the dtype of the computation and in the model's own
shape, and let go when that forward ends at the latest. Nothing decoded stays behind for backward: what
autograd wants to save of a decoded weight is kept as (packed stack, size, stride, offset), and the experts it
covers are decoded again when backward asks.

A forward that takes one expert after the other by index gets them decoded one at a time; one that multiplies
the stack gets a whole projection of the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fourfold.errors import ConfigurationError
from fourfold.experts.forward import compute_dtype
from fourfold.experts.own_precision import PRODUCTS
from fourfold.experts.packed import PackedExperts, give_class_back_
from fourfold.experts.shapes import OwnForwardLayout, Projection
from fourfold.experts.subclass import Dynamic, subclass
from fourfold.experts.update import Update
from fourfold.formats import PackedStack
from fourfold.formats.remote import RemoteStack, in_use
from fourfold.kernels.decode import decode


@dataclass(frozen=True)
class _View:
    """A view of a decoded weight, without its numbers."""

    stack: PackedStack | RemoteStack
    layout: OwnForwardLayout
    projection: Projection
    update: Update | None
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def decode(self) -> torch.Tensor:
        """The same view again; only the experts that it covers are decoded."""
        matrix = self.stack.shape.rows * self.stack.shape.columns
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        first, stop = self.offset // matrix, last // matrix + 1
        update = None if self.update is None else self.update.experts(first, stop)
        weight = _formed(self.stack.experts(first, stop), self.layout, self.projection, update, self.dtype)
        return weight.as_strided(self.size, self.stride, self.offset - first * matrix)


def _formed(
    stack: PackedStack | RemoteStack,
    layout: OwnForwardLayout,
    projection: Projection,
    update: Update | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decoded experts, with what is added to them; in the model's own shape."""
    decoded_in = dtype if update is None else update.weight_dtype or dtype
    with in_use(stack) as local:
        weight = layout.from_stack(decode(local, decoded_in), projection)
    return weight if update is None else update.added_to(weight, dtype)


_Origin: TypeAlias = tuple[
    StorageWeakRef, int, "PackedStack | RemoteStack", OwnForwardLayout, Projection, "Update | None"
]


class _Scope:
    """Decoded weights of the modules that one forward reads.

    Attributes:
        decoded: whole projections, kept until the scope is closed.
        updates: what adapters add to a projection, by module and name.
        origin: where a decoded storage comes from, by its identity. A weak reference keeps that identity from
            being given to another storage as long as the scope is open. The version is that of the numbers as
            decoded: what was changed in place since cannot be decoded again.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.decoded: dict[tuple[int, str], torch.Tensor] = {}
        self.updates: dict[tuple[int, str], Update | None] = {}
        self.origin: dict[int, _Origin] = {}

    def _decode(
        self,
        stack: PackedStack | RemoteStack,
        layout: OwnForwardLayout,
        projection: Projection,
        update: Update | None,
    ) -> torch.Tensor:
        weight = _formed(stack, layout, projection, update, self.dtype)
        if update is not None:
            update = update.detach()
        storage = weight.untyped_storage()
        version = 0 if weight.is_inference() else weight._version  # (inference keeps none, and saves nothing)
        self.origin[storage._cdata] = (StorageWeakRef(storage), version, stack, layout, projection, update)
        return weight

    def weight(self, module: OwnForwardExperts, projection: Projection) -> torch.Tensor:
        """A whole parameter in the model's own shape."""
        key = (id(module), projection.name)
        if key not in self.decoded:
            stack, update = module.weights(projection), self.updates.get(key)
            self.decoded[key] = self._decode(stack, module.own_layout, projection, update)
        return self.decoded[key]

    def expert(self, module: OwnForwardExperts, projection: Projection, expert: int) -> torch.Tensor:
        """One expert's matrix in the model's own orientation; not kept."""
        stack = module.weights(projection).experts(expert, expert + 1)
        update = self.updates.get((id(module), projection.name))
        if update is not None:
            update = update.experts(expert, expert + 1)
        weight = self._decode(stack, module.own_layout, projection, update)
        return weight.view(weight.shape[-2:])

    def close(self) -> None:
        self.decoded.clear()
        self.updates.clear()
        self.origin.clear()

    def view(self, tensor: torch.Tensor) -> _View | None:
        if not self.origin or tensor.dtype != self.dtype:
            return None
        found = self.origin.get(tensor.untyped_storage()._cdata)
        if found is None or tensor._version != found[1]:
            return None
        return _View(*found[2:], tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    @contextlib.contextmanager
    def saving_views(self) -> Iterator[None]:
        """Have autograd save views of decoded weights by name.

        torch calls the innermost hooks only, so everything else is passed on to those around these
        (checkpointing is made of such hooks, and would otherwise keep what it means to recompute).
        """
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

        def pack(tensor: torch.Tensor) -> Any:
            view = self.view(tensor)
            if view is not None:
                return view
            return outer[0](tensor) if outer else tensor

        def unpack(saved: Any) -> torch.Tensor:
            if isinstance(saved, _View):
                return saved.decode()
            return outer[1](saved) if outer else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


# What the shown parameter answers without being decoded.
_METADATA = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "requires_grad",
    "is_cuda",
    "is_meta",
    "is_floating_point",
)
_METADATA_CALLS = ("size", "dim", "numel", "__len__", "is_floating_point", "stride")


class _Shown(torch.Tensor):
    """What a packed parameter shows of itself in a forward: a tensor without storage, decoded as it is used.

    It lives as long as one expression of that forward; nothing stores it.
    """

    scope: _Scope
    module: OwnForwardExperts
    projection: Projection

    @staticmethod
    def __new__(
        cls, scope: _Scope, module: OwnForwardExperts, projection: Projection, shape: tuple[int, ...]
    ) -> _Shown:
        device = module.computing_device
        shown: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scope.dtype, device=device)
        shown.scope, shown.module, shown.projection = scope, module, projection
        return cast(_Shown, shown)

    def whole(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.scope.weight(self.module, self.projection).view(self.shape)

    def _index(self, index: Any) -> torch.Tensor | None:
        """One expert, where that is what is asked for."""
        if isinstance(index, torch.Tensor):
            if index.ndim or index.dtype == torch.bool or index.is_floating_point():
                return None
            index = int(index)
        if isinstance(index, bool) or not isinstance(index, int) or self.ndim != 3:
            return None
        experts = self.shape[0]
        if not -experts <= index < experts:
            raise IndexError(f"expert {index} of {experts}")
        return self.scope.expert(self.module, self.projection, index % experts)

    def _by_expert(self, func: Any, args: Any, kwargs: Any) -> _Shown | None:
        """A flattened parameter viewed as the stack that it is."""
        shape = func(torch.empty(self.shape, device="meta"), *args, **kwargs).shape
        layout, stack = self.module.own_layout, self.projection.shape
        rows, columns = stack.rows, stack.columns
        if self.projection.name in layout.transposed:
            rows, columns = columns, rows
        if tuple(shape) != (stack.experts, rows, columns):
            return None
        return _Shown(self.scope, self.module, self.projection, tuple(shape))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name == "__get__":
            name = func.__self__.__name__
            plain = name in _METADATA
        else:
            plain = name in _METADATA_CALLS
        with torch._C.DisableTorchFunctionSubclass():
            if plain:
                return func(*args, **kwargs)
            result: torch.Tensor | None = None
            if args and isinstance(args[0], cls) and name == "__getitem__":
                result = args[0]._index(args[1])
            elif args and isinstance(args[0], cls) and name in ("view", "reshape"):
                result = args[0]._by_expert(func, args[1:], kwargs)
            if result is not None:
                return result
            args, kwargs = tree_map(lambda v: v.whole() if isinstance(v, cls) else v, (args, kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was reached by a parameter that is packed")


# Scopes by the identity of the modules that show decoded weights, in this thread and at this moment.
_SHOWING: ContextVar[dict[int, _Scope] | None] = ContextVar("_SHOWING", default=None)


class OwnForwardExperts(PackedExperts):
    """Mixin of packed experts modules that keep their forward."""

    @property
    def own_layout(self) -> OwnForwardLayout:
        layout = self.fourfold_layout
        assert isinstance(layout, OwnForwardLayout)
        return layout

    def __getattr__(self, name: str) -> Any:
        scope = (_SHOWING.get() or {}).get(id(self))
        if scope is not None:
            projection = self.own_layout.projection(name)
            if projection is not None:
                return _Shown(scope, self, projection, self.own_layout.model_shape(projection))
        return super().__getattr__(name)

    def is_showing(self) -> bool:
        """Whether the forward of whoever reads the parameters is running."""
        return id(self) in (_SHOWING.get() or {})

    def lend_update(self, name: str, update: Callable[[], Update | None]) -> None:
        """What the projection ``name`` is shown with until the forward that is running ends; asked once."""
        scope, key = (_SHOWING.get() or {})[id(self)], (id(self), name)
        if key not in scope.updates:
            scope.updates[key] = update()

    def forward(self, *args: Any, updates: Mapping[str, Update] | None = None, **kwargs: Any) -> Any:
        """The module's own forward, with its own arguments and results.

        Args:
            args: the module's own.
            updates: what adapters add to the weights, by projection name; adapters pass them, models do not.
            kwargs: the module's own.
        """
        own = super(PackedExperts, self).forward
        if self.own_layout.reader:  # whose scope it is; adapters lend theirs as parameters are read
            return own(*args, **kwargs)
        return _run([self], own, args, kwargs, updates)


class ReadsPackedExperts(Dynamic):
    """Mixin of a module that reads the packed parameters of modules inside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its own arguments and results."""
        return _run(_lenders(self), super().forward, args, kwargs)


class _Products(TorchFunctionMode):
    """Products in one dtype, their results in another, and everything else as it comes.

    What autocast does, but for the results: it leaves them in its own dtype, so that what follows is rounded
    at each step (up to 1.19 times stock's error when a whole forward was cast), and a forward that adds them
    to a buffer of the input's dtype fails.
    """

    def __init__(self, dtype: torch.dtype, result: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.result = dtype, result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ not in PRODUCTS or kwargs.get("out") is not None:
            return func(*args, **kwargs)

        def lower(value: Any) -> Any:
            is_other = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(self.dtype) if is_other and value.dtype != self.dtype else value

        args, kwargs = tree_map(lower, (args, kwargs))
        return func(*args, **kwargs).to(self.result)


def _lenders(reader: nn.Module) -> list[OwnForwardExperts]:
    return [m for m in reader.modules() if isinstance(m, OwnForwardExperts) and m.own_layout.reader]


@torch.compiler.disable  # what shows decoded weights, and saves them by name, cannot be traced
def _run(
    modules: list[OwnForwardExperts],
    own: Any,
    args: Any,
    kwargs: Any,
    updates: Mapping[str, Update] | None = None,
) -> Any:
    """Call ``own`` while ``modules`` show decoded weights.

    An explicit dtype of the products holds for the whole forward: inputs are cast to it and results back, as
    a quantized Linear does. Autocast's holds for the products alone (`_Products`). Other threads, and other
    calls of the same modules within this one, have scopes of their own.
    """
    for module in modules:
        if module.way is not None:
            raise ConfigurationError(
                f"{module.fourfold_name}: way={module.way!r} says how grouped products are computed; these "
                "experts run their own forward on decoded weights. Leave it None here"
            )
    floats = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point())
    first = next(floats, None)
    given = modules[0].fourfold_dtype if first is None else first.dtype
    first = torch.empty(0, device=modules[0].computing_device) if first is None else first
    dtype = compute_dtype(modules[0], first)

    def cast(value: Any, to: torch.dtype) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(to) if floating else value

    other, explicit = dtype != given, modules[0].compute_dtype is not None
    if other and explicit:
        args, kwargs = tree_map(lambda v: cast(v, dtype), (args, kwargs))
    scope = _Scope(dtype)
    scope.updates.update({(id(modules[0]), name): update for name, update in (updates or {}).items()})
    stack = contextlib.ExitStack()
    if other:
        stack.enter_context(torch.autocast(first.device.type, enabled=False))
        if not explicit:
            stack.enter_context(_Products(dtype, given))
    token = _SHOWING.set((_SHOWING.get() or {}) | {id(module): scope for module in modules})
    try:
        with stack, scope.saving_views():
            for module in modules:
                if module.fourfold_host is not None:  # (one use, however often the forward reads a weight)
                    stack.enter_context(module.fourfold_host.hold(first.device))
            result = own(*args, **kwargs)
    finally:
        _SHOWING.reset(token)
        scope.close()
    return tree_map(lambda v: cast(v, given), result) if other else result


def prepare_reader_(module: nn.Module) -> None:
    """Let a module read packed parameters inside it (those whose layout says so), in place."""
    if not isinstance(module, ReadsPackedExperts):
        own: Any = type(module)
        module.__class__ = subclass(own, ReadsPackedExperts, "Reading")


def release_readers_(model: nn.Module) -> None:
    """Give every module that has nothing packed to read any more its own class back."""
    for module in model.modules():
        if isinstance(module, ReadsPackedExperts) and not _lenders(module):
            give_class_back_(module)
