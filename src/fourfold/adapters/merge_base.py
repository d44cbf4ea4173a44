"""Whether a base is the one that an adapter was trained on, as far as `fourfold.json` can tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fourfold.adapters import provenance
from fourfold.adapters.updates import Adapter
from fourfold.errors import AdapterError, CheckpointError
from fourfold.loading.config import QUANT_METHOD
from fourfold.loading.origin import Origin
from fourfold.loading.patch import stored_method
from fourfold.loading.paths import hub_snapshot
from fourfold.loading.skeleton import read_config


def local_folder(base: str | Path, stored: Mapping[str, Any] | None) -> Path:
    """The base's folder; downloaded, at the revision that the adapter names, where it is an id on the hub."""
    if Path(base).expanduser().is_dir():
        return Path(base).expanduser()
    read_config(base)  # says what is wrong with a name that is neither
    origin = Origin.from_dict(stored["base"], provenance.FILE) if stored else None
    revision = origin.revision if origin and origin.name == str(base) else None
    patterns = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]
    return hub_snapshot(str(base), revision, ignore_patterns=patterns)


def refuse_quantized(config: Any, base: str | Path) -> None:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored_method(settings)
    if method == QUANT_METHOD:
        origin = Origin.from_dict(settings.get("base"), f"{base}/config.json")
        original = f"it was made of {origin}" if origin else "name the checkpoint it was made of"
        raise CheckpointError(
            f"{base} is packed, and a sum with packed weights would have to be quantized again; merge into "
            f"the original: {original}. (--base-weights dequantized gives its numbers)"
        )
    raise CheckpointError(
        f"{base} is quantized ({method}); name the checkpoint in high precision "
        "(with --any-base, if the adapter was trained on this one)"
    )


def check_base(stored: Mapping[str, Any], origin: Origin, adapter: Adapter, config: Any) -> None:
    """The base must be the one that ``fourfold.json`` names; one that names none tells nothing of weights."""
    trained, file = Origin.from_dict(stored["base"], provenance.FILE), adapter.folder / provenance.FILE
    advice = "pass --any-base (any_base=True) to merge all the same"
    known = {config.model_type, config.get_text_config().model_type}
    if stored.get("model_type") not in (None, *known):
        raise AdapterError(
            f"{adapter.folder} was trained on a model of type {stored['model_type']}, and {origin} is "
            f"{config.model_type}. Name the base that it was trained on, or {advice}"
        )
    if trained is None:
        raise AdapterError(
            f"{file} does not say which base {adapter.folder} was trained on (base: null; a model that was "
            f"packed without a name). Nothing tells whether {origin} has its weights. If it has, {advice}"
        )
    if trained.is_same(origin):
        return
    what = (
        f"its weights are others (fingerprint {origin.fingerprint}, not {trained.fingerprint})"
        if trained.fingerprint and origin.fingerprint
        else f"{file} names another"
    )
    raise AdapterError(
        f"{adapter.folder} was trained on {trained}, and {origin} is not that base: {what}. Name that base, "
        f"or {advice}"
    )


def check_packing(stored: Mapping[str, Any], model: nn.Module, adapter: Adapter, dequantized: bool) -> None:
    """The skeleton, packed as ``fourfold.json`` says, must have the shapes that it says, and the modules that
    were left in high precision. (Those change what ``dequantized`` writes, and nothing else.)"""
    ours = provenance.shapes_of(model)
    if stored["shapes"] != ours:
        raise AdapterError(
            f"{adapter.folder} was trained on a model with packed experts of {stored['shapes']}, and this "
            f"base packed in the same way has {ours}; it is another model"
        )
    linears = stored["linears"]["bits"] is not None
    differs = provenance.difference_of_left(
        stored.get("left"), provenance.left_unpacked(model, linears=linears)
    )
    if dequantized and differs:
        raise AdapterError(
            f"{adapter.folder} was trained on {differs}: with --base-weights dequantized those weights would "
            "be others than it was trained on. Merge into the original weights, or use the releases of "
            "transformers and fourfold that it was trained with"
        )
