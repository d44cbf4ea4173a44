"""Packed experts of a packed checkpoint as tensors of its mapped files: they are not read while loading."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import ConfigurationError
from fourfold.loading.ahead import AheadConverter, converters_of
from fourfold.loading.headers import DTYPE_NAMES, Header
from fourfold.offloading.disk import IN_MEMORY
from fourfold.offloading.host import HostMemory
from fourfold.offloading.mapped import MappedFile


class MappedReader:
    """Stands where an `AheadReader` does, and gives out mapped tensors.

    Args:
        headers: of the checkpoint's tensors, by key.
        wanted: name of a parameter to its shape and dtype.
        memory: where small tensors are read into.

    Attributes:
        nbytes: read, of those.
        device_map: is not asked.
    """

    def __init__(
        self,
        headers: Mapping[str, Header],
        wanted: Mapping[str, tuple[torch.Size, torch.dtype]],
        memory: HostMemory,
    ) -> None:
        self.headers, self.device_map, self.nbytes = headers, None, 0
        self._wanted, self._memory = wanted, memory
        self._files: dict[Path, MappedFile] = {}
        self._keys: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedReader:
        return self  # the loader copies converters for every key

    def converters(self) -> list[AheadConverter]:
        return converters_of(self._wanted, self, on_host=True)

    def reads(self, name: str, key: str) -> bool:
        """Whether stored tensor ``key`` is parameter ``name`` as it lies there."""
        wanted, header = self._wanted.get(name), self.headers.get(key)
        if wanted is None or header is None:
            return False
        return (header.shape, header.dtype) == (tuple(wanted[0]), DTYPE_NAMES[wanted[1]])

    def takes_over(self, future: Any) -> bool:
        """Always (a tensor that the loader's own threads have begun to read is dropped)."""
        if isinstance(future, Future):
            future.cancel()
        return True

    def begin(self, name: str, key: str) -> None:
        self._keys[name] = key

    def take(self, name: str) -> torch.Tensor:
        """The mapped tensor; scales of scales are read."""
        key = self._keys.pop(name)
        path = self.headers[key].file
        if path not in self._files:
            self._files[path] = MappedFile(path)
        tensor = self._files[path].tensor(key)
        if name.endswith(IN_MEMORY):
            tensor = self._memory.take(tensor)
            self.nbytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        self._keys.clear()


def refuse_unmapped(model: str, *, as_stored: bool) -> None:
    """Experts on disk are those of a packed checkpoint, under the names that the model has.

    Args:
        model: its folder or id.
        as_stored: whether packed tensors are stored as they are wanted.

    Raises:
        ConfigurationError: they would have to be packed first.
    """
    if not as_stored:
        raise ConfigurationError(
            f"experts_device='disk' maps packed experts from their files, and those of {model} are not "
            f"packed. Pack them once, `fourfold quantize {model} FOLDER`, and load FOLDER"
        )
