"""Reading encoded tensors from a checkpoint's files in their own dtype, inside the loader's own converters.

The loader casts what it reads to the model's dtype, by value: it would round scales, and blow up packed
bytes. A `DecodingConverter` therefore puts its own reading in the place of the loader's for every slice that
its `Source` knows; the loader's is asked once per parameter, for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers.core_model_loading import ConversionOps, WeightConverter

from fourfold.errors import CheckpointError
from fourfold.loading.converters import PackingConverter
from fourfold.loading.headers import Header
from fourfold.loading.reading import Slice, read_slice


class StoredTensors:
    """The files of a checkpoint, to read single tensors or slices of them in their own dtype.

    Args:
        headers: of every stored tensor, by key.
        dtype: of decoded weights whose parameter does not say.
    """

    def __init__(self, headers: Mapping[str, Header], dtype: torch.dtype) -> None:
        self.headers = headers
        self.dtype = dtype
        self._open: dict[Path, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensors:
        return self  # the loader copies converters, and what they hold, for every key

    def slice(self, key: str) -> Any:
        """A lazy view of a stored tensor; indexing it reads."""
        file = self.headers[key].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_slice(key)

    def read(self, key: str, device: torch.device | str) -> torch.Tensor:
        with torch.device("cpu"):  # models are made under another default
            return self.slice(key)[...].to(device)

    def close(self) -> None:
        self._open.clear()


@dataclass
class Target:
    """Where the tensors of one converter go: known when the loader has placed the first of them."""

    dtype: torch.dtype
    probe: Slice | None = None
    found: torch.device | None = None

    def device(self) -> torch.device:
        if self.found is None:
            assert self.probe is not None
            placed = read_slice(self.probe)
            if placed is None:
                raise CheckpointError("sharded loading of quantized checkpoints is not supported")
            self.found, self.probe = placed.device, None
        return self.found


class Source(Protocol):
    """A format that encoded tensors are stored in."""

    stored: StoredTensors

    def is_encoded(self, key: str) -> bool: ...

    def decode(self, key: str, target: Target) -> torch.Tensor: ...

    def place(
        self, converter: DecodingConverter, name: str, model: Any, quantizer: Any
    ) -> dict[str, Any] | None:
        """Parameters that take the encoded bytes as they are; None where they are to be decoded."""


def _parameter_dtype(model: Any, name: str, default: torch.dtype) -> torch.dtype:
    try:
        dtype = model.get_parameter(name).dtype
    except AttributeError:
        return default
    return dtype if dtype.is_floating_point else default


class Unchanged(ConversionOps):
    """An operation that does nothing. (``hf_quantizer`` marks what must not be reversed when saving.)"""

    def __init__(self, source: Any) -> None:
        self.hf_quantizer = source

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        return {full_layer_name: tensors[0]}


class DecodingConverter(PackingConverter):
    """A converter of the model's mapping whose slices are decoded when they are read."""

    __slots__ = ("source", "target")

    @classmethod
    def around(cls, converter: WeightConverter, source: Source) -> DecodingConverter:
        made = cls.wrap(converter)
        assert isinstance(made, DecodingConverter)
        made.source, made.target = source, Target(source.stored.dtype)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingConverter:
        made = super().__deepcopy__(memo)
        assert isinstance(made, DecodingConverter)
        if getattr(self, "source", None) is not None:
            made.target = Target(self.source.stored.dtype)  # parameters may go to different devices
        return made

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        source: Source | None = getattr(
            self, "source", None
        )  # none where transformers reverses it for saving
        if source is not None and source.is_encoded(source_key):
            target = self.target
            target.probe = target.probe or future
            future = _Decoded(source, source_key, target)
        super().add_tensor(target_key, source_key, source_pattern, future)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        if getattr(self, "source", None) is not None:
            self.target.dtype = _parameter_dtype(model, layer_name, self.source.stored.dtype)
            placed = self.source.place(self, layer_name, model, hf_quantizer)
            if placed is not None:
                return placed
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)

    def encoded_keys(self) -> list[list[str | None]]:
        """For each source pattern, the keys of its slices; None for one that is not encoded."""
        return [
            [s.key if isinstance(s, _Decoded) else None for s in self.collected_tensors.get(pattern, [])]
            for pattern in self.source_patterns
        ]


@dataclass
class _Decoded:
    """A slice that reads and decodes when called."""

    source: Source
    key: str
    target: Target

    def __call__(self) -> torch.Tensor:
        return self.source.decode(self.key, self.target)


def decoding(conversions: list[Any], source: Source) -> list[Any]:
    """The model's converters, each decoding first, and one for weights that have none."""
    wrapped = [
        DecodingConverter.around(c, source) if isinstance(c, WeightConverter) else c for c in conversions
    ]
    plain = WeightConverter(["weight$"], ["weight"], [Unchanged(source)])
    return [*wrapped, DecodingConverter.around(plain, source)]
