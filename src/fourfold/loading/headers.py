"""What the files of a checkpoint say they hold, read from their headers alone.

Loaders cast by value: an absmax that was stored as fp32 would arrive in its int32 parameter as zeros, and the
model would load as noise. So shapes and dtypes of packed tensors are compared before a weight is read.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fourfold.errors import CheckpointError
from fourfold.experts import PackedExperts, find_experts

DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Header:
    """One stored tensor: its file, safetensors' name of its dtype, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint's folder: those that transformers loads, if both kinds are there.

    Raises:
        CheckpointError: there are none, the index is damaged, or it points outside the folder.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; only safetensors are read")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("weight_map holds no names of files")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint ({error!r})") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} points outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not there; download the checkpoint again")
    return [folder / name for name in names]


def check_files(folder: str | Path, files: Iterable[str | Path]) -> dict[str, Header]:
    """What can be wrong with the files that a loader is about to read, found before it reads them.

    The one reading of headers in a load: what it returns is handed on to all that asks for them.

    Args:
        folder: the model's, or its id on the hub.
        files: as the loader has resolved them.

    Returns:
        Key -> header of every tensor in safetensors files.

    Raises:
        CheckpointError: a file lies outside the folder (an index may name any path), is truncated, damaged,
            or of a kind that has to be unpickled.
    """
    inside = os.path.abspath(folder) if os.path.isdir(folder) else None
    safetensors: list[Path] = []
    for file in files:
        if Path(file).suffix in _PICKLED:
            raise CheckpointError(f"{file}: only safetensors are read; convert the checkpoint first")
        if inside is not None and not Path(os.path.abspath(file)).is_relative_to(inside):
            raise CheckpointError(f"the index of {folder} points outside its folder: {file}")
        if Path(file).suffix == ".safetensors":
            safetensors.append(Path(file))
    return read_headers(safetensors)


@contextlib.contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    """Opening reads the header and compares the file's length with it."""
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or damaged ({error}); download the checkpoint again"
        ) from error


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Key -> header of every tensor in ``files``.

    Raises:
        CheckpointError: a file is truncated or no safetensors file.
    """
    headers: dict[str, Header] = {}
    for file in files:
        with _opened(file) as reader:
            for key in reader.keys():  # noqa: SIM118  (not a mapping)
                part = reader.get_slice(key)
                headers[key] = Header(file, part.get_dtype(), tuple(part.get_shape()))
    return headers


def hub_headers(repo_id: str) -> dict[str, Header]:
    """Key -> header of every tensor of a model on the hub; headers are fetched, weights are not.

    Raises:
        CheckpointError: it cannot be reached, or holds no safetensors.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = get_safetensors_metadata(repo_id)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(
            f"{repo_id} holds no readable safetensors ({error}); nothing else is read"
        ) from error
    except Exception as error:  # requests' or httpx's own among them, by the release of huggingface_hub
        raise CheckpointError(f"the files of {repo_id} cannot be read from the hub: {error}") from error
    return {
        key: Header(Path(name), info.dtype, tuple(info.shape))
        for name, file in metadata.files_metadata.items()
        for key, info in file.tensors.items()
    }


def _key_of(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name in the model -> key in the files, by the loader's own renaming."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    state = model.state_dict()
    result: dict[str, str] = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, state)
        result[key if name not in state and key in state else name] = key
    return result


def check_packed(model: PreTrainedModel, headers: Mapping[str, Header], *, complete: bool) -> list[str]:
    """Compare the packed experts of a prepared model with what the files hold.

    Args:
        model: prepared for a packed checkpoint (on the meta device, say).
        headers: of the checkpoint.
        complete: whether a missing tensor is an error here (loading finds out for itself).

    Returns:
        Full names of fused expert parameters that the files hold in high precision.

    Raises:
        CheckpointError: a packed tensor has another dtype or shape than its format asks for.
    """
    key_of = _key_of(model, headers)
    unpacked: list[str] = []
    for found in find_experts(model):
        module = found.module
        if not isinstance(module, PackedExperts):
            continue
        for projection in module.fourfold_layout.projections:
            for suffix, (shape, dtype) in projection.shape.tensors(module.fourfold_format).items():
                name = f"{found.name}.{projection.name}{suffix}"
                key = key_of.get(name)
                if key is None:
                    if complete and not (suffix and f"{found.name}.{projection.name}" in unpacked):
                        raise CheckpointError(
                            f"the checkpoint holds no tensor {name}; its experts cannot be read"
                        )
                    continue
                header = headers[key]
                if header.dtype == DTYPE_NAMES[dtype] and header.shape == shape:
                    continue
                if not suffix and header.dtype in ("BF16", "F16", "F32"):
                    unpacked.append(name)
                    continue
                raise CheckpointError(
                    f"{header.file}: {key} is {header.dtype} {list(header.shape)}, where "
                    f"{DTYPE_NAMES[dtype]} {list(shape)} is expected for {module.fourfold_format}; the file "
                    "is of another model or format than its config.json, or damaged"
                )
    return unpacked


_FLOATS = ("BF16", "F16", "F32", "F64")


def check_plain(model: PreTrainedModel, headers: Mapping[str, Header], *, converted: bool) -> None:
    """Compare tensors that the loader takes as numbers: shapes, where it takes them as they are, and dtypes.

    transformers finds a wrong shape too, but says no more than "the above report" where its log is turned
    down. Codes of a quantized weight it takes for numbers, wherever the shape fits (INT8, FP8).

    Args:
        model: prepared, on the meta device.
        headers: of the checkpoint.
        converted: whether the model's conversions are applied while loading (not to packed checkpoints).

    Raises:
        CheckpointError: naming file, key and both shapes.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
    converters = [c for c in mapping if isinstance(c, WeightConverter)] if converted else []
    state = model.state_dict()
    linears = {
        f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "source_cls")
    }
    for key, header in headers.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        tensor = state.get(name)
        linear = None if converted else linears.get(name)
        if linear is not None:
            _check_linear(linear, key, headers)
            continue
        if tensor is None or not tensor.is_floating_point():
            continue
        if header.dtype not in _FLOATS:
            raise CheckpointError(
                f"{header.file}: {key} is {header.dtype}, where the configuration asks for numbers in high "
                "precision; the checkpoint is quantized in a way that its config.json does not say"
            )
        if pattern is None and header.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{header.file}: {key} is {list(header.shape)} in the checkpoint, where the configuration "
                f"asks for {list(tensor.shape)}; they are not of the same model"
            )


def _check_linear(linear: nn.Module, key: str, headers: Mapping[str, Header]) -> None:
    """A packed checkpoint holds bitsandbytes' Linears as codes; anything else would be taken for some."""
    header = headers[key]
    four = type(getattr(linear, "weight", None)).__name__ == "Params4bit"
    if (f"{key}.absmax" not in headers) if four else header.dtype != "I8":
        raise CheckpointError(
            f"{header.file}: {key} is {header.dtype}{' without scales (absmax)' if four else ''}, where the "
            f"configuration asks for {4 if four else 8} bit; the file is of another format than its "
            "config.json, or damaged"
        )
