"""The module that holds packed experts.

An experts module keeps its class: a dynamic subclass puts `PackedExperts` in front of it, so that
`isinstance`, the activation, `_apply_gate`, biases and norms stay what they were, and only `forward` changes.
Each fused parameter becomes a plain integer parameter of the same name in the same place of the registration
order, with companions ``<name>_absmax`` and, double-quantized, ``<name>_absmax_scale`` and
``<name>_absmax_offset`` behind. Plain parameters with the expert as first axis: state_dict, safetensors,
sharding and slicing need no hook.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import nn

from fourfold.errors import UnsupportedExpertsError
from fourfold.experts.forward import RoutedExperts, routed_forward
from fourfold.experts.layout import read_layout
from fourfold.experts.part import Part
from fourfold.experts.shapes import ExpertsLayout, Layout, Projection
from fourfold.experts.subclass import subclass
from fourfold.formats import PackedStack, PackFormat, decode_stack
from fourfold.formats.quantize import pack_stack
from fourfold.formats.remote import RemoteStack
from fourfold.kernels import LowRank


class HostExperts(Protocol):
    """What brings the experts of a module whose packed tensors lie in host memory (`fourfold.offloading`)."""

    @property
    def device(self) -> torch.device:
        """Where they are computed with."""

    def move(self, device: torch.device) -> None:
        """Compute on another device from now on."""

    def stack(self, projection: Projection) -> RemoteStack:
        """The packed weights of a projection, to be computed with."""

    def hold(self, device: torch.device, index_Tk: torch.Tensor | None = None) -> AbstractContextManager[Any]:
        """Keep them on ``device`` while a forward runs there, with those in ``index_Tk`` alone."""


class SpreadExperts(Protocol):
    """What brings tokens to the processes that hold their experts (expert parallelism)."""

    part: Part
    group: Any

    @property
    def experts(self) -> int:
        """How many the module has in all processes together."""

    def __call__(
        self,
        module: PackedExperts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        low_rank: Mapping[str, LowRank],
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs, wherever those are, ``[T, H]``."""


class PackedExperts(RoutedExperts):
    """Mixin of packed experts modules.

    Attributes:
        fourfold_name: full name of the module in its model.
        fourfold_layout: how the experts were laid out before packing.
        fourfold_format: how they are packed.
        fourfold_dtype: dtype of the unquantized parameters.
        compute_dtype: dtype of the products; None follows autocast and the input.
        workspace_bytes: limit of the decoding workspace; None is one projection of the layer.
        way: how products are computed (`fourfold.kernels.ways`); None leaves it to the rule.
        fourfold_host: what brings the packed tensors from host memory; None where they are computed with
            where they lie.
        fourfold_spread: what brings tokens to experts of other processes; the layout is then that of the
            experts in this one. None where all of them are here.
        fourfold_arrives: what a packed tensor becomes when it is set as a parameter (while loading).
    """

    fourfold_name: str
    fourfold_layout: Layout
    fourfold_format: PackFormat
    fourfold_dtype: torch.dtype
    compute_dtype: torch.dtype | None
    workspace_bytes: int | None
    way: str | None
    fourfold_host: HostExperts | None = None
    fourfold_spread: SpreadExperts | None = None
    fourfold_arrives: Callable[[torch.Tensor], torch.Tensor] | None = None

    def stack(self, projection: Projection) -> PackedStack:
        """The packed weights of one projection, where they lie."""
        suffixes = projection.shape.tensors(self.fourfold_format)
        # (not by attribute: a module that runs its own forward shows decoded weights there)
        tensors = {suffix: self.own_parameter(projection.name + suffix) for suffix in suffixes}
        for suffix, (_, dtype) in suffixes.items():
            tensor = tensors[suffix]
            if tensor is not None and tensor.dtype != dtype:
                raise UnsupportedExpertsError(_cast_away(self.fourfold_name, projection.name, tensor.dtype))
        return PackedStack.from_tensors(self.fourfold_format, projection.shape, cast(Any, tensors))

    def own_parameter(self, name: str) -> torch.Tensor | None:
        """A parameter of the experts in this process."""
        parameter = self._parameters[name]
        if self.fourfold_spread is None or not hasattr(parameter, "to_local"):
            return parameter
        local: torch.Tensor = cast(Any, parameter).to_local()
        return local

    def weights(self, projection: Projection) -> PackedStack | RemoteStack:
        """The packed weights of one projection as products take them."""
        return self.stack(projection) if self.fourfold_host is None else self.fourfold_host.stack(projection)

    @property
    def computing_device(self) -> torch.device:
        """Where products with these experts run."""
        if self.fourfold_host is not None:
            return self.fourfold_host.device
        return self.stack(self.fourfold_layout.projections[0]).data.device

    def packed_names(self) -> list[str]:
        """Names of the packed tensors among the module's own parameters."""
        layout, fmt = self.fourfold_layout, self.fourfold_format
        return [p.name + suffix for p in layout.projections for suffix in p.shape.tensors(fmt)]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        arrives = self.__dict__.get("fourfold_arrives")
        if arrives is not None and param is not None and not param.is_meta and name in self.packed_names():
            param.data = arrives(param.data)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What moves a module leaves experts in host memory there, and moves where they are computed with."""
        host = self.fourfold_host
        if host is None:
            return super()._apply(fn, recurse)
        own, away = dict(self._parameters), set(self.packed_names())
        for name in away:
            del self._parameters[name]
        try:
            super()._apply(fn, recurse)
        finally:
            moved = dict(self._parameters)
            self._parameters.clear()  # (in the order of registration, which adapters go by)
            self._parameters.update({name: p if name in away else moved[name] for name, p in own.items()})
        device = fn(torch.empty(0, dtype=torch.uint8, device=host.device)).device
        if device.type != "meta":
            host.move(device)
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        low_rank: Mapping[str, LowRank] | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: expert of each token and slot, ``[T, k]``.
            top_k_weights: routing weights, ``[T, k]``.
            low_rank: LoRA factors by projection name; adapters pass them, models do not.

        Returns:
            ``[T, H]`` in the dtype of ``hidden_states``.
        """
        arguments = (hidden_states, top_k_index, top_k_weights, low_rank or {})
        if self.fourfold_spread is not None:
            return self.fourfold_spread(self, *arguments)
        if self.fourfold_host is not None:
            return self._forward_from_host(self.fourfold_host, *arguments)
        return routed_forward(self, *arguments)

    @torch.compiler.disable  # which buffer weights come to is decided at each call
    def _forward_from_host(
        self, host: HostExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, *arguments: Any
    ) -> torch.Tensor:
        with host.hold(hidden_states.device, top_k_index):
            return routed_forward(self, hidden_states, top_k_index, *arguments)

    def extra_repr(self) -> str:
        layout = self.fourfold_layout
        sizes = ", ".join(f"{p.name}={layout.model_shape(p)}" for p in layout.projections)
        return f"{sizes}, {self.fourfold_format}"


def packed_class(cls: type[nn.Module], mixin: type[PackedExperts] = PackedExperts) -> type[nn.Module]:
    """The subclass of an experts class that holds packed parameters; one per class."""
    return subclass(cls, mixin, "Packed")


def _mixin(layout: Layout) -> type[PackedExperts]:
    if layout.routed:
        return PackedExperts
    from fourfold.experts.own_forward import OwnForwardExperts  # it is built on this file

    return OwnForwardExperts


def _cast_away(name: str, projection: str, dtype: torch.dtype) -> str:
    return (
        f"{name}.{projection} was cast to {dtype}, and its packed bytes or scales are lost in that. FSDP2's "
        "mixed precision casts integers in torch 2.11: shard the model by fourfold.distributed.shard, "
        "which keeps them out of it, install torch>=2.13, or leave mixed precision off"
    )


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def prepare_module_(
    module: nn.Module,
    fmt: PackFormat,
    *,
    name: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    packed_on_disk: bool = False,
    layout: Layout | None = None,
) -> PackedExperts:
    """Make a module on the meta device ready to receive packed weights, in place.

    Companions are registered with their final shapes. The fused parameters themselves stay floating point
    where the checkpoint is in high precision (loaders read shape and dtype off them) and take their packed
    shape where it is packed already. ``layout`` is what `find_experts` found (an undecorated module shows its
    own only inside its model).
    """
    layout = layout or _read(module)
    _refuse_what_is_not_its_own_class(module, name)
    own_class: Any = type(module)
    mixin: Any = _mixin(layout)
    module.__class__ = packed_class(own_class, mixin)
    assert isinstance(module, PackedExperts)
    module.fourfold_name, module.fourfold_layout, module.fourfold_format = name, layout, fmt
    module.fourfold_dtype, module.compute_dtype, module.workspace_bytes = dtype, compute_dtype, None
    module.way = None
    if isinstance(layout, ExpertsLayout) and layout.has_gate:
        module.has_silu_gate()  # (now, so that modules that share compiled code answer alike from the start)
    # transformers initialises what a checkpoint lacks, with normal numbers; on packed bytes that is an error
    # from the inside of torch. The loader's own check names what is missing.
    module._is_hf_initialized = True
    for projection in layout.projections:
        for suffix, tensor in PackedStack.empty(fmt, projection.shape, "meta").tensors():
            if suffix or packed_on_disk:
                module._parameters[projection.name + suffix] = _frozen(tensor)
    return module


def _refuse_what_is_not_its_own_class(module: nn.Module, name: str) -> None:
    from fourfold.experts.plain import PlainExperts  # it is built on this file

    kind = type(module).__name__
    if isinstance(module, PackedExperts):
        raise UnsupportedExpertsError(
            f"{name} ({kind}) is packed already; quantizing twice would round twice. Call "
            "`fourfold.dequantize` on the model first, or leave the module as it is"
        )
    if isinstance(module, PlainExperts):
        raise UnsupportedExpertsError(
            f"{name} ({kind}) was prepared for LoRA on unquantized experts, whose numbers it needs; pack "
            "before `fourfold.prepare`, or load the model with MoeBitsAndBytesConfig"
        )


def _read(module: nn.Module) -> Layout:
    found = read_layout(module)
    if found is None or found[0] is None:
        raise TypeError(f"{type(module).__name__} is no experts module that can be packed by itself")
    return found[0]


def pack_module_(
    module: nn.Module, fmt: PackFormat, name: str = "experts", layout: Layout | None = None
) -> PackedExperts:
    """Pack a loaded experts module in place, one matrix at a time; returns the same module.

    Loading packs while it reads and does not come by here; this is for modules built in memory.

    Raises:
        CheckpointError: a weight is not finite.
        UnsupportedExpertsError: it is packed already, or was prepared by `fourfold.prepare`.
    """
    _refuse_what_is_not_its_own_class(module, name)
    weights = {n: p.data for n, p in module.named_parameters(recurse=False)}
    layout = layout or _read(module)
    dtype = weights[layout.projections[0].name].dtype
    stacks: list[tuple[Projection, PackedStack]] = []
    for projection in layout.projections:
        weight = weights[projection.name]
        stack = PackedStack.empty(fmt, projection.shape, weight.device)
        pack_stack(stack, layout.to_stack(weight, projection), f"{name}.{projection.name}")
        stacks.append((projection, stack))
    packed = prepare_module_(module, fmt, name=name, dtype=dtype, layout=layout)
    for projection, stack in stacks:  # (after all of them were packed: a failure leaves the module as it was)
        set_stack_(packed, projection, stack)
    return packed


def set_stack_(module: PackedExperts, projection: Projection, stack: PackedStack) -> None:
    """Register the tensors of a stack as the frozen parameters of a projection."""
    for suffix, tensor in stack.tensors():
        module._parameters[projection.name + suffix] = _frozen(tensor)


def unpack_module_(module: PackedExperts, dtype: torch.dtype) -> nn.Module:
    """Back to the module's own class with the same numbers in ``dtype``, in place."""
    layout, device = module.fourfold_layout, module.computing_device
    for projection in layout.projections:
        # (where it lies: what brings experts from host memory reads all projections, and some are gone)
        weight = decode_stack(module.stack(projection).to(device), dtype)
        for suffix in projection.shape.tensors(module.fourfold_format):
            if suffix:
                del module._parameters[projection.name + suffix]
        module._parameters[projection.name] = _frozen(layout.from_stack(weight, projection))
    for attribute in (
        "fourfold_name",
        "fourfold_layout",
        "fourfold_format",
        "fourfold_dtype",
        "compute_dtype",
        "workspace_bytes",
        "way",
    ):
        delattr(module, attribute)
    for attribute in ("_fourfold_gate_tried", "fourfold_host", "fourfold_arrives"):  # where there is one
        module.__dict__.pop(attribute, None)
    return give_class_back_(module)


def give_class_back_(module: nn.Module) -> nn.Module:
    """Undo a dynamic subclass, in place; returns the module."""
    plain: Any = type(module).__bases__[-1]
    module.__class__ = plain
    rebind_hooked_forward(module)
    return module


def rebind_hooked_forward(module: nn.Module) -> None:
    """After a change of class: Accelerate's hooks (``device_map`` over several devices) keep the forward that
    they found; it has to be that of the class that the module has now.
    """
    kept = module.__dict__.get("_old_forward")
    if kept is not None and getattr(kept, "__self__", None) is module:
        own: Any = type(module)
        module.__dict__["_old_forward"] = types.MethodType(own.forward, module)
