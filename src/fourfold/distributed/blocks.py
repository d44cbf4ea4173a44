"""Which modules are sharded as one, and which parameters cannot be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fourfold.errors import ConfigurationError
from fourfold.experts import find_experts


def bare(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper: `generate` calls its forward, so hooks go there."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a model, by name: gathered for as long as each computes.

    They are the children of the lists whose classes the model says must not be split (`_no_split_modules`),
    and of those that hold fused experts.
    """
    whole = set(getattr(model, "_no_split_modules", None) or ())
    holders = {found.name for found in find_experts(model)}
    result: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(f"{name}.".startswith(f"{b}.") for b, _ in result):
            continue
        children = [(f"{name}.{n}" if name else n, child) for n, child in module.named_children()]
        if any(
            type(child).__name__ in whole or any(f"{h}.".startswith(f"{n}.") for h in holders)
            for n, child in children
        ):
            result += children
    return result


def ends(model: nn.Module) -> list[nn.Module]:
    """Input and output embeddings, where each has a weight of its own and nothing wraps it."""
    found: list[nn.Module] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module) and all(module is not other for other in found):
            found.append(module)
    weights = [id(p) for module in found for p in module.parameters()]
    return found if len(set(weights)) == len(weights) else []


def is_whole_on_every_rank(module: nn.Module, leaf: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is left out of sharding.

    bitsandbytes' 8-bit Linears keep codes and scales as attributes of the parameter object and of the
    module's state, where no gathering reaches them; a number without axes has none to cut.
    """
    return hasattr(parameter, "SCB") or type(parameter).__name__ == "Int8Params" or parameter.ndim == 0


def left_whole(model: nn.Module, device_type: str) -> dict[str, nn.Parameter]:
    """Full name -> parameter of all that stays whole on every rank.

    Raises:
        ConfigurationError: one of them is trained (its gradients would not be added up over the ranks), or
            lies elsewhere than the ranks compute.
    """
    found = {
        f"{path}.{leaf}" if path else leaf: parameter
        for path, module in model.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and is_whole_on_every_rank(module, leaf, parameter)
    }
    here = (device_type, "meta")
    away = [name for name, parameter in found.items() if parameter.device.type not in here]
    if away:
        raise ConfigurationError(
            f"{away[0]} stays whole on every rank, and lies on {found[away[0]].device}, while the ranks "
            f"compute on {device_type}. Load it there (device={device_type!r}); only shards are offloaded"
        )
    trained = [name for name, parameter in found.items() if parameter.requires_grad]
    if trained:
        raise ConfigurationError(
            f"{trained[0]} cannot be sharded ({type(found[trained[0]]).__name__} with "
            f"{found[trained[0]].ndim} axes), and is to be trained: its gradients would differ between ranks."
            " Freeze it, or train on one GPU or with DDP"
        )
    return found


def flatten_linears_(model: nn.Module, device_type: str) -> None:
    """4-bit Linears of bitsandbytes: plain bytes as parameter, scales in the module, as gathered.

    The bytes may be held as bf16 (`bnb_4bit_quant_storage`), which mixed precision would round. bitsandbytes
    finds the scales in the module (`quant_state`) where the parameter has lost them; they are not gathered,
    and so have to lie where the ranks compute.
    """
    for module in model.modules():
        state: Any = getattr(module, "quant_state", None)
        if state is not None and state.absmax.device.type != device_type:
            state.to(
                torch.device(device_type, torch.cuda.current_device())
                if device_type == "cuda"
                else device_type
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):  # repacks gathered bytes, and the scales for good
            module.support_avx512bf16_for_cpu = False
        weight: Any = module._parameters.get("weight")
        if type(weight).__name__ != "Params4bit":
            continue
        linear: Any = module
        linear.quant_state = weight.quant_state
        settings = linear_settings(weight)
        data = torch.Tensor(weight.data).view(torch.uint8).view(-1, 1)
        module._parameters["weight"] = with_settings(nn.Parameter(data, requires_grad=False), settings)


def linear_settings(weight: Any) -> dict[str, Any]:
    """How a 4-bit weight was quantized, as PEFT reads it off the parameter."""
    return {name: getattr(weight, name) for name in ("blocksize", "compress_statistics", "quant_type")}


def with_settings(parameter: nn.Parameter, settings: dict[str, Any]) -> nn.Parameter:
    """The parameter with these attributes."""
    for name, value in settings.items():
        setattr(parameter, name, value)
    return parameter
