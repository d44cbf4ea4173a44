"""What is patched in accelerate, all of it here: how it shards a model with packed experts by FSDP2.

`transformers.Trainer`, TRL's trainers and programs of one's own hand their model to `Accelerator.prepare`.
With ``fsdp_version: 2`` (a file for `accelerate launch`, or ``fsdp_config`` of the trainer's arguments) that
calls three functions, which are replaced where the model has packed experts; every other model goes on to
stock. There is no registry or method of the model to give instead (accelerate 1.15). Stock would

- `fsdp2_prepare_model`: leave every 4-bit Linear whole on every rank; fail in the first forward of an 8-bit
  Linear, whose codes are attributes of the parameter that it replaces; round packed bytes and scales to bf16
  under torch 2.11 (see `sharding`); and let each rank keep its own rows of random factors that it drew by
  itself. `sharding.shard` does what is wanted.
- `fsdp2_apply_ac` (``activation_checkpointing``): wrap layers in modules whose names PEFT does not know, and
  so save an adapter, and checkpoints, without a single tensor in them. Nothing says so (PEFT 0.21). The
  layers' own checkpointing computes the same, without wrapping.
- `Accelerator.get_state_dict`: put the whole packed model together in the first rank's memory, for an adapter
  to be picked out of it.

The first piece ends when accelerate asks the model's quantizer, the second when PEFT knows those names.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fourfold.adapters.gather import gathered_adapters
from fourfold.distributed.blocks import bare, blocks
from fourfold.distributed.sharding import is_sharded, shard
from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts

_MARK = "_fourfold"


def install() -> None:
    """Install all of it; once, whoever calls first."""
    from accelerate import accelerator as module

    if getattr(module.fsdp2_prepare_model, _MARK, False):
        return
    for name, own in (("fsdp2_prepare_model", prepare_model), ("fsdp2_apply_ac", checkpoint_layers)):
        setattr(module, name, _instead(getattr(module, name), own))
    module.Accelerator.get_state_dict = _instead(module.Accelerator.get_state_dict, _adapters_alone)


def _instead(stock: Any, own: Any) -> Any:
    """``own(accelerator, model)`` where it is ours to answer, ``stock`` elsewhere."""

    @functools.wraps(stock)
    def function(accelerator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if accelerator.is_fsdp2 and isinstance(model, nn.Module) and has_packed_experts(model):
            answer = own(accelerator, model)
            if answer is not None:
                return answer
        return stock(accelerator, model, *args, **kwargs)

    setattr(function, _MARK, True)
    return function


def has_packed_experts(model: nn.Module) -> bool:
    """Whether `shard` is wanted."""
    return any(isinstance(module, PackedExperts) for module in model.modules())


def prepare_model(accelerator: Any, model: nn.Module) -> nn.Module:
    """`shard`, as accelerate's plugin says.

    Args:
        accelerator: with FSDP2.
        model: with or without adapters; one that is sharded already is left as it is.

    Raises:
        ConfigurationError: a setting cannot be followed; and what `shard` raises.
    """
    if is_sharded(model):
        return model
    plugin = accelerator.state.fsdp_plugin
    _refuse(plugin, model)
    if accelerator.mixed_precision != "no":
        for parameter in model.parameters():  # (what is trained is kept in fp32, and computed with in less)
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32)
    return shard(
        model,
        _mesh(accelerator),
        reshard_after_forward=plugin.reshard_after_forward,
        mixed_precision=plugin.mixed_precision_policy,
        offload=plugin.cpu_offload,
    )


def _mesh(accelerator: Any) -> DeviceMesh | None:
    """The axes that accelerate shards over; None where all ranks are one axis."""
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is None:
        return None
    names = tuple(accelerator.parallelism_config.fsdp_dim_names)
    others = [name for name in mesh.mesh_dim_names if name not in names and mesh[name].size() > 1]
    if others:
        raise ConfigurationError(
            f"parallelism_config: {', '.join(others)} beside FSDP2, and packed experts are not cut in that "
            "way. Leave those axes at 1"
        )
    found: DeviceMesh = mesh[names]
    return found


def _refuse(plugin: Any, model: nn.Module) -> None:
    """What stock would follow and `shard` does not."""
    if plugin.ignored_modules is not None:
        raise ConfigurationError(
            "fsdp_ignored_modules: gradients of what is not sharded would differ between ranks. Drop it; "
            "what cannot be sharded is left whole by itself"
        )
    if plugin.min_num_params is not None and plugin.min_num_params > 0:
        raise ConfigurationError(
            "fsdp_min_num_params: a model with packed experts is sharded layer by layer, whatever their "
            "size. Set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"
        )
    root = bare(model)
    known = {type(layer).__name__ for _, layer in blocks(root)}
    usual = set(getattr(root, "_no_split_modules", None) or ())
    wrong = sorted(set(plugin.transformer_cls_names_to_wrap or ()) - known - usual)
    if wrong:
        raise ConfigurationError(
            f"fsdp_transformer_layer_cls_to_wrap: {', '.join(wrong)} is no class of layer of "
            f"{type(root).__name__}; they are {', '.join(sorted(known))}, and are found by themselves. Drop "
            "the key"
        )


def checkpoint_layers(accelerator: Any, model: nn.Module) -> nn.Module:
    """Activation checkpointing by the layers themselves.

    Raises:
        ConfigurationError: what is recomputed from is to lie in host memory.
    """
    if getattr(accelerator.state.fsdp_plugin, "activation_checkpointing_offload", False):
        raise ConfigurationError(
            "fsdp_activation_checkpointing_offload needs accelerate's own wrapper around layers, with which "
            "PEFT saves an adapter of nothing. Drop it"
        )
    root: Any = bare(model)
    root.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _adapters_alone(accelerator: Any, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """What is saved of a model with adapters; None where there are none."""
    if not hasattr(model, "peft_config"):
        return None
    return gathered_adapters(model)
