"""What must hold after loading, whatever the files were: nothing packed is missing, numbers are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.experts.layout import name_suffix

_OFFLOADED = ("cpu", "disk")


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def refuse_offloading(packed: Iterable[str], device_map: Any) -> None:
    """Packed experts compute where they lie: a map may put them on a CPU only with everything else.

    (Parts of a model on a CPU or a disk beside a GPU are moved to it at each call, by hooks that know
    the loader's own formats.)

    Args:
        packed: names of the packed experts modules.
        device_map: module -> device, as far as it is known; anything but a dictionary is passed over.

    Raises:
        ConfigurationError: naming the modules.
    """
    if not isinstance(device_map, dict):
        return
    places = {prefix: str(place) for prefix, place in device_map.items()}
    if "disk" not in places.values() and len({place.partition(":")[0] for place in places.values()}) == 1:
        return
    away = []
    for name in packed:
        inside = [prefix for prefix in places if not prefix or f"{name}.".startswith(f"{prefix}.")]
        if inside and places[max(inside, key=len)] in _OFFLOADED:
            away.append(name)
    if away:
        raise ConfigurationError(
            f"the device map leaves packed experts on the CPU or on disk beside another device: "
            f"{_shown(away)}. That is not supported; give the GPU(s) room for all experts (fewer other "
            "programs, another max_memory, a smaller format), or leave experts in high precision with "
            f"llm_int8_skip_modules={sorted(set(map(name_suffix, away)))}"
        )


def check_complete(model: PreTrainedModel, packed: Iterable[str]) -> None:
    """Every packed tensor must have come from the checkpoint.

    A missing one is only reported by transformers, filled with whatever memory holds, and would load as
    noise.

    Raises:
        CheckpointError: naming what is missing.
    """
    missing = []
    for name in packed:
        module = model.get_submodule(name)
        assert isinstance(module, PackedExperts)
        for projection in module.fourfold_layout.projections:
            for suffix, (shape, dtype) in projection.shape.tensors(module.fourfold_format).items():
                leaf = projection.name + suffix
                tensor = module._parameters[leaf]
                assert tensor is not None
                loaded = getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta
                if not loaded or tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    missing.append(f"{name}.{leaf}")
        biases = [p.bias for p in module.fourfold_layout.projections if p.bias is not None]
        missing += [
            f"{name}.{bias}"
            for bias in biases
            if not getattr(getattr(module, bias), "_is_hf_initialized", False)
        ]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_shown(missing)}, or holds them in another format than its config.json "
            "says; experts cannot be read without them. Save or download the checkpoint again"
        )


def _numbers(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating point number of a model: parameters, and scales wherever they are kept."""
    for prefix, module in model.named_modules():
        packed = isinstance(module, PackedExperts)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter.is_meta:
                continue
            state: Any = getattr(parameter, "quant_state", None)
            if parameter.is_floating_point() and state is None:  # (4-bit Linears may hold bytes as bf16)
                yield name, parameter
            elif packed and parameter.dtype == torch.int32:
                yield name, parameter.view(torch.float32)
            while state is not None:
                yield f"{name}.absmax", state.absmax
                state = state.state2 if getattr(state, "nested", False) else None
            if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):
                yield f"{name}.SCB", scales


@torch.no_grad()
def check_finite(model: PreTrainedModel) -> None:
    """No NaN and no infinity anywhere; read once per device, at the end.

    Raises:
        CheckpointError: naming the tensors.
    """
    names: dict[torch.device, list[str]] = {}
    ranges: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in _numbers(model):
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # NaN where a number is; no copy of the tensor is made
            names.setdefault(tensor.device, []).append(name)
            ranges.setdefault(tensor.device, []).append((low.float() - high.float()).view(1))
    damaged = []
    for device, differences in ranges.items():
        fine = torch.isfinite(torch.cat(differences)).tolist()
        damaged += [name for name, is_fine in zip(names[device], fine, strict=True) if not is_fine]
    if damaged:
        raise CheckpointError(
            f"{_shown(damaged)} hold NaN or infinite numbers; the checkpoint is damaged, get another copy"
        )
