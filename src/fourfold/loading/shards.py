"""Writing a checkpoint tensor by tensor: one shard is in memory at a time, never the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fourfold.errors import ConfigurationError
from fourfold.loading.headers import INDEX, SINGLE
from fourfold.sizes import bytes_of


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``200MB`` (decimal, as `save_pretrained` reads them) or ``4GiB``.

    Raises:
        ConfigurationError: it is no size, or not positive.
    """
    size = bytes_of(text)
    if size is None:
        raise ConfigurationError(f"{text!r} is no size; write it as 5GB, 200MB or 4GiB")
    if size < 1:
        raise ConfigurationError(f"a size of {text!r} holds nothing")
    return size


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever the next one would make it too big.

    A tensor that is bigger than a shard gets one of its own. Until `finish`, files have names that no loader
    looks for.

    Attributes:
        total_size: bytes of all tensors so far.
        keys: name of every tensor so far -> its shard, counted from 0.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self.folder = folder
        self.max_shard_size = max_shard_size
        self.total_size = 0
        self.keys: dict[str, int] = {}
        self._held: dict[str, torch.Tensor] = {}
        self._held_size = 0
        self._shards = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; may write what was taken before."""
        if name in self.keys:
            raise AssertionError(f"{name} was written twice")
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view would keep alive all of what it is a part of
        if self._held and self._held_size + tensor.nbytes > self.max_shard_size:
            self._flush()
        self.keys[name] = self._shards
        self._held[name] = tensor
        self._held_size += tensor.nbytes
        self.total_size += tensor.nbytes

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.tmp"

    def _flush(self) -> None:
        save_file(self._held, self._part(self._shards), metadata={"format": "pt"})
        self._held, self._held_size = {}, 0
        self._shards += 1

    def finish(self) -> list[str]:
        """Write the last shard, give the files their names, and write the index; returns their names."""
        if self._held or not self._shards:
            self._flush()
        if self._shards == 1:
            names = [SINGLE]
        else:
            names = [f"model-{i + 1:05d}-of-{self._shards:05d}.safetensors" for i in range(self._shards)]
            weight_map = {key: names[number] for key, number in sorted(self.keys.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        return names
