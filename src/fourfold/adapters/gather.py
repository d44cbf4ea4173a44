"""Adapters of a sharded model, put together: what is saved is what one process would save.

Every rank holds some rows of each factor; a rank that saved what it holds would write a fraction of the
adapter under the name of all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fourfold.adapters.spread import spread_factors
from fourfold.errors import AdapterError


def is_distributed(tensor: Any) -> bool:
    """Whether it is a `DTensor`, of which a rank holds a part."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")


def has_distributed_parameters(model: nn.Module) -> bool:
    return any(is_distributed(parameter.data) for parameter in model.parameters())


def refuse_taken_away(model: nn.Module) -> None:
    """Parameters that DeepSpeed's ZeRO-3 has taken away are empty, and would be saved so.

    Raises:
        AdapterError: naming one of them.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and hasattr(parameter, "ds_id") and not parameter.numel():
            raise AdapterError(
                f"{name} lies in parts on the ranks (DeepSpeed's ZeRO-3), and would be saved empty. Save "
                "within deepspeed.zero.GatheredParameters(list(model.parameters())) on every rank, or use "
                "ZeRO-2 or FSDP2"
            )


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class before FSDP2 put its own in front (``FSDPLinear`` is made of ``Linear``)."""
    bases = type(module).__mro__
    return bases[2] if bases[1].__name__ == "FSDPModule" else bases[0]


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor of which every rank has a part (each has to call this), or the tensor itself.

    A part that is offloaded goes to where the ranks compute first: what gathers does not reach the CPU.
    """
    if not is_distributed(tensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:
        tensor = tensor.detach().to(tensor.device_mesh.device_type)
    return tensor.full_tensor()


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@torch.no_grad()
def gathered_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything of a PEFT model that is not its frozen base, whole: on the first rank's CPU, {} elsewhere.

    Every rank has to call it: each tensor is gathered from all of them, one at a time.
    """
    state: dict[str, torch.Tensor] = {}
    first = is_first_rank()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    spread = spread_factors(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if name not in trained and not any(part in name for part in (".lora_", ".modules_to_save.")):
            continue
        gathered = spread[name].whole(tensor) if name in spread else whole(tensor)
        if first:
            state[name] = gathered.detach().cpu().clone()
        del gathered
    return state
