"""FSDP2 over packed experts: PyTorch's `fully_shard`, applied so that nothing is lost on the way.

Packed experts are plain integer parameters with the expert as first axis, so what `fully_shard` cuts and
gathers are whole experts, at a quarter of bf16's bytes; their scales are integers too, which mixed precision
leaves alone. What else has to be right is done here: LoRA factors begin alike on every rank, 4-bit Linears
keep their scales where a gathered weight finds them, 8-bit Linears stay whole on every rank, and a model that
`load_sharded` read is taken over shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from fourfold.distributed.alike import check_frozen_alike, make_trained_alike
from fourfold.distributed.blocks import bare, blocks, ends, flatten_linears_, left_whole
from fourfold.distributed.local_shards import from_shard
from fourfold.distributed.together import together
from fourfold.errors import ConfigurationError
from fourfold.experts.part import refuse_spread

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Place:
    """Where a shard belongs that `load_sharded` read: the places of one parameter (several, if tied)."""

    local: torch.Tensor
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)


def device_mesh() -> DeviceMesh:
    """One axis over all processes of the job, on the kind of device that they have.

    Raises:
        ConfigurationError: there is no process group.
    """
    if not dist.is_initialized():
        raise ConfigurationError(
            "no process group: start the program with `torchrun --nproc_per_node N` (or `accelerate launch`) "
            "and call torch.distributed.init_process_group first"
        )
    kind = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
    return init_device_mesh(kind, (dist.get_world_size(),))


def shards_of(mesh: DeviceMesh) -> DeviceMesh:
    """The axis of a mesh over which shards lie (the last), without a name.

    PEFT takes a distributed weight on a mesh whose axes have names for one that is computed in parts (tensor
    parallelism), and would make factors of the width of this rank's rows.
    """
    if mesh.ndim == 1 and mesh.mesh_dim_names is None:
        return mesh
    return DeviceMesh.from_group(mesh.get_group(mesh.ndim - 1), mesh.device_type)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard(
    model: Model,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool = True,
    mixed_precision: MixedPrecisionPolicy | None = None,
    offload: OffloadPolicy | None = None,
) -> Model:
    """Shard a model with packed experts over the ranks of ``mesh`` by FSDP2, in place.

    Called after the adapters were added and before an optimizer is made. Every layer is gathered for as long
    as it computes; embeddings and output layer by themselves, unless they share weights.

    Args:
        model: with or without adapters of PEFT; loaded by `from_pretrained` on every rank, or by
            `load_sharded`.
        mesh: of one axis (or replicas by shards); None takes all ranks.
        reshard_after_forward: let a layer go after its forward and gather it again for backward. Without that
            it stays until backward: fewer bytes sent, more memory.
        mixed_precision: dtypes of gathered parameters and of gradients. Packed experts are integers, and are
            never cast.
        offload: `CPUOffloadPolicy` keeps shards and optimizer in CPU memory.

    Returns:
        The same model. `set_requires_gradient_sync` and the rest of `FSDPModule` are on
        ``model.get_base_model()``, to which PEFT's models delegate.

    Raises:
        ConfigurationError: it is sharded already; its experts are offloaded; nothing in it is layers;
            adapters have the width of a shard; trained parameters of one layer differ in dtype; a parameter
            that cannot be sharded is to be trained; or the ranks hold different weights.
        TrainingError: a rank ran out of memory, with its number.
        CheckpointError: another rank raised one of these, with its number.
    """
    mesh = mesh or device_mesh()
    groups = mesh.get_all_groups()
    root = bare(model)
    with together("the model was not sharded", groups):
        layers = _layers_that_can_be(model, root)
        whole = left_whole(root, mesh.device_type)
        flatten_linears_(root, mesh.device_type)
        _check_dtypes(root, layers, mixed_precision)
    for group in groups:
        check_frozen_alike(root, group, mesh.device_type)
        make_trained_alike(root, group, mesh.device_type)
    if isinstance(offload, CPUOffloadPolicy) and mesh.device_type == "cpu":
        offload = CPUOffloadPolicy(pin_memory=False)  # (pinning asks for an accelerator)
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": mixed_precision or MixedPrecisionPolicy(),
        "offload_policy": offload or OffloadPolicy(),
        "ignored_params": set(whole.values()),
    }
    with together("the model was not sharded", groups):
        places = _take_out(root)
        _fully_shard(root, [layer for _, layer in layers], settings)
        if mixed_precision is not None:
            _never_cast_integers(root)
        _put_back(places, _offloaded(root), mesh.device_type)
    return model


def _layers_that_can_be(model: nn.Module, root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that are gathered one by one.

    Raises:
        ConfigurationError: the model is sharded or offloaded, has no layers, or adapters of wrong widths.
    """
    refuse_spread(root, "shard cuts them again", "Load the model without ep_size for FSDP2")
    if is_sharded(model):
        raise ConfigurationError("the model is sharded already; call fourfold.distributed.shard once")
    for module in root.modules():
        if getattr(module, "fourfold_host", None) is not None:
            raise ConfigurationError(
                f"{module.fourfold_name}: its experts are in host memory (fourfold.offload, or "
                "experts_device='cpu'), from where whole modules are copied; shards are not. Use one of "
                "the two: fourfold.onload(model), or offload=CPUOffloadPolicy() here"
            )
    layers = blocks(root)
    if not layers:
        raise ConfigurationError(
            f"{type(root).__name__} has no list of layers that could be sharded one by one; call "
            "torch.distributed.fsdp.fully_shard on its parts yourself"
        )
    _check_widths(root)
    return layers


def _fully_shard(root: nn.Module, layers: list[nn.Module], settings: dict[str, Any]) -> None:
    """Layers, embeddings, and all that is left.

    The output layer stays on the device also where shards are offloaded: losses that never form all logits
    (TRL's) take its weight by themselves, and compute where they find it. Backward begins with it: letting it
    go in between would be for nothing.
    """
    on_device = settings | {"offload_policy": OffloadPolicy()}
    for layer in layers:
        _shard_keeping_name(layer, settings)
    for end in ends(root):
        last = end is root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else False
        _shard_keeping_name(end, on_device | {"reshard_after_forward": False} if last else settings)
    _shard_keeping_name(root, on_device)  # (shared embeddings are here)
    root.register_forward_hook(_let_go_without_backward)


def _let_go_without_backward(root: nn.Module, *_: Any) -> None:
    """After a forward without gradients, let go what stays until backward: there is none.

    Layers that such a forward had gathered were used by every later one as they were, whatever the optimizer
    did to their shards (``reshard_after_forward=False``, an evaluation before training, torch 2.13): the loss
    stood still, and nothing said so.
    """
    if not torch.is_grad_enabled():
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _shard_keeping_name(module: nn.Module, settings: dict[str, Any]) -> None:
    """`fully_shard`, which makes a class of its own of the module's, called ``FSDP...``.

    Adapters and configurations are saved with the name of a class, and what loads them looks it up;
    accelerate looks for the classes of layers by name.
    """
    own = type(module)
    fully_shard(module, **settings)
    made = type(module)
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__


def _sharded_parameters(root: nn.Module) -> Iterator[Any]:
    """What FSDP2 knows of each parameter."""
    for module in root.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        one = getattr(state, "_fsdp_param_group", None)  # several in torch 2.13
        for group in getattr(state, "_fsdp_param_groups", None) or ([one] if one is not None else []):
            yield from group.fsdp_params


def _offloaded(root: nn.Module) -> set[int]:
    """Of which parameters (by ``id``) shards lie in CPU memory."""
    return {id(p.sharded_param) for p in _sharded_parameters(root) if p.offload_to_cpu}


def _never_cast_integers(root: nn.Module) -> None:
    """Packed experts and 4-bit Linears keep out of mixed precision.

    In torch 2.11 `fully_shard` casts every parameter, integers too, to the dtype of its policy: bytes become
    rounded numbers, and scales are lost. 2.13 leaves integers alone by itself.
    """
    for parameter in _sharded_parameters(root):
        if not parameter.sharded_param.dtype.is_floating_point:
            stock = parameter.init_dtype_attrs
            parameter.init_dtype_attrs = lambda _, stock=stock: stock(MixedPrecisionPolicy())


def _check_widths(root: nn.Module) -> None:
    """Adapters must have the widths of the whole layers (older releases of PEFT take those of a shard)."""
    for name, module in root.named_modules():
        base: Any = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Linear) or not isinstance(getattr(module, "in_features", None), int):
            continue
        adapter: Any = module
        made, wanted = (adapter.in_features, adapter.out_features), (base.in_features, base.out_features)
        if made != wanted:
            raise ConfigurationError(
                f"the adapter of {name} was made for {made} features, and the layer has {wanted}: this "
                "release of PEFT takes a shard for the layer. Install peft>=0.21.2, or load the model whole"
            )


def _check_dtypes(
    root: nn.Module, layers: list[tuple[str, nn.Module]], mixed_precision: MixedPrecisionPolicy | None
) -> None:
    """FSDP2 adds up the gradients of a layer as one tensor; it finds out in the first backward."""
    if mixed_precision is not None and mixed_precision.param_dtype is not None:
        return
    for name, layer in layers:
        trained = {p.dtype: n for n, p in layer.named_parameters() if p.requires_grad}
        if len(trained) > 1:
            shown = ", ".join(f"{name}.{n} is {dtype}" for dtype, n in trained.items())
            raise ConfigurationError(
                f"trained parameters of one layer differ in dtype ({shown}), and FSDP2 adds up their "
                "gradients together. Cast them to one, or pass MixedPrecisionPolicy(param_dtype=...)"
            )


def _take_out(root: nn.Module) -> list[_Place]:
    """Replace every parameter that is a shard already by one of its whole shape without memory.

    (`fully_shard` would take a distributed tensor for one that another kind of parallelism had cut.)
    """
    made: dict[int, nn.Parameter] = {}
    places: dict[int, _Place] = {}
    for module in root.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(parameter.data, DTensor):
                key = id(parameter)
                if key not in places:
                    shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    made[key] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
                    places[key] = _Place(parameter.data.to_local())
                places[key].holders.append((module, leaf))
            elif not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
    for key, place in places.items():
        for module, leaf in place.holders:
            module._parameters[leaf] = made[key]
    return list(places.values())


def _put_back(places: list[_Place], offloaded: set[int], device_type: str) -> None:
    """Give every place that `fully_shard` made its shard, where FSDP2 looks for it."""
    for place in places:
        module, leaf = place.holders[0]
        made: Any = module._parameters[leaf]
        if place.local.shape != made.to_local().shape:
            raise AssertionError(f"{leaf}: {place.local.shape} read, {made.to_local().shape} wanted")
        local = place.local.to("cpu" if id(made) in offloaded else device_type)
        tensor = from_shard(local, made.device_mesh, made.placements, made.shape, made.stride())
        parameter = nn.Parameter(tensor, requires_grad=made.requires_grad)
        for holder, name in place.holders:
            holder._parameters[name] = parameter
