"""What must hold after loading, whatever the files were: nothing packed is missing, numbers are numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
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


def refuse_spreading(device_map: Any) -> None:
    """Experts that are loaded into host memory, or stay on disk, are brought to one device.

    (Hooks of a map over several devices put every parameter on its device after loading.)

    Args:
        device_map: module -> device, as far as it is known; anything but a dictionary is passed over.

    Raises:
        ConfigurationError: naming the devices.
    """
    devices = sorted({str(place) for place in device_map.values()}) if isinstance(device_map, dict) else []
    if len(devices) > 1:
        raise ConfigurationError(
            f"experts_device together with a device map over several devices ({', '.join(devices)}) is "
            "not supported; load onto one (device_map={'': 0}), or leave experts_device out and call "
            "fourfold.offload on the loaded model"
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
                loaded = _is_loaded(tensor) and not tensor.is_meta
                if not loaded or tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    missing.append(f"{name}.{leaf}")
        biases = [p.bias for p in module.fourfold_layout.projections if p.bias is not None]
        missing += [f"{name}.{bias}" for bias in biases if not _is_loaded(getattr(module, bias))]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_shown(missing)}, or holds them in another format than its config.json "
            "says; experts cannot be read without them. Save or download the checkpoint again"
        )


def check_nothing_is_missing(model: PreTrainedModel, stored: Collection[str] | None = None) -> None:
    """Every tensor must have come from the checkpoint, where that says it is of this very class.

    transformers fills what is missing with random numbers and logs it; commands turn its log down. (Another
    class may add a head, to be trained.)

    Args:
        model: loaded; or prepared, if ``stored`` is given.
        stored: the model's own names of what the files hold; None asks the loaded tensors.

    Raises:
        CheckpointError: naming what is missing.
    """
    if type(model).__name__ not in (model.config.architectures or ()):
        return
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*ties, *ties.values()}  # either name will do
    patterns = [
        *(model._keys_to_ignore_on_load_missing or ()),
        *map(re.escape, model._keys_to_ignore_on_save or ()),
    ]
    if stored is None:  # (old files may lack buffers, and their classes know what to put there)
        absent = [n for n, p in model.named_parameters() if not (_is_loaded(p) or p.is_meta)]
    else:
        buffers = [n for n, _ in model.named_buffers() if n in model.state_dict()]
        absent = [n for n in (*dict(model.named_parameters()), *buffers) if n not in stored]
    missing = [n for n in absent if n not in tied and not any(re.search(p, n) for p in patterns)]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_shown(missing)} of {type(model).__name__}; the files of another model "
            "lie beside this configuration, or some are missing. Download or save it again"
        )


def _is_loaded(tensor: torch.Tensor) -> bool:
    """The loader marks what it has read."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def _numbers(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating point numbers of a module itself: parameters, saved buffers, scales wherever they are kept."""
    packed = isinstance(module, PackedExperts)
    for leaf, parameter in module.named_parameters(recurse=False):
        name = prefix + leaf
        if packed and hasattr(parameter, "to_local"):  # (the other ranks look at theirs)
            parameter = cast(Any, parameter).to_local()
        if parameter.is_meta:
            continue
        state: Any = getattr(parameter, "quant_state", None)
        if parameter.is_floating_point() and state is None:  # (4-bit Linears may hold bytes as bf16)
            yield name, parameter
        elif packed and parameter.dtype == torch.int32:
            yield name, parameter.view(torch.float32)
        while state is not None:
            yield f"{name}.absmax", state.absmax
            yield f"{name}.quant_map", state.code
            nested = getattr(state, "nested", False)
            if nested and isinstance(state.offset, torch.Tensor):
                yield f"{name}.nested_offset", state.offset
            state = state.state2 if nested else None
        if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):
            yield f"{name}.SCB", scales
    for leaf, buffer in module.named_buffers(recurse=False):
        # Single numbers may be bounds, and infinite on purpose (gemma4's ranges of activations).
        if leaf not in module._non_persistent_buffers_set and buffer.ndim and not buffer.is_meta:
            yield prefix + leaf, buffer


@torch.no_grad()
def check_finite(module: nn.Module, name: str = "", *, recurse: bool = True) -> None:
    """No NaN and no infinity anywhere; read once per device, at the end.

    Args:
        module: a loaded model, or a part of one.
        name: of the part; empty for a model.
        recurse: whether in the modules inside it as well.

    Raises:
        CheckpointError: naming the tensors.
    """
    names: dict[torch.device, list[str]] = {}
    limits: dict[torch.device, list[torch.Tensor]] = {}
    for path, part in module.named_modules(prefix=name) if recurse else [(name, module)]:
        for key, tensor in _numbers(part, f"{path}." if path else ""):
            if tensor.is_floating_point() and tensor.numel():
                low, high = torch.aminmax(tensor)  # NaN where a number is; no copy of the tensor is made
                names.setdefault(tensor.device, []).append(key)
                limits.setdefault(tensor.device, []).extend((low.float().view(1), high.float().view(1)))
    damaged = []
    for device, found in limits.items():
        fine = torch.isfinite(torch.cat(found)).view(-1, 2).all(dim=1).tolist()
        damaged += [key for key, is_fine in zip(names[device], fine, strict=True) if not is_fine]
    if damaged:
        raise CheckpointError(
            f"{_shown(damaged)} hold NaN or infinite numbers; the checkpoint is damaged, get another copy"
        )
