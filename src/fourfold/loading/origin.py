"""Which checkpoint a packed model was made of.

A packed copy remembers it in its config.json (``quantization_config``, key ``base``), so that adapters name
the original model, and merging finds it. Names change when folders move, and say nothing of what lies under
them; so a fingerprint of the weights stands beside the name, and decides where both sides have one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import CheckpointError
from fourfold.loading.raw import fingerprint

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Origin:
    """A checkpoint in the form in which its makers published it.

    Attributes:
        name: id on the hub, or the folder as it was named when it was read.
        revision: commit on the hub; None for a local folder.
        fingerprint: of its weights (`loading.raw.fingerprint`); None where they were not seen.
    """

    name: str
    revision: str | None = None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any, where: str) -> Origin | None:
        """What `to_dict` wrote; None for None.

        Raises:
            CheckpointError: something else is stored there.
        """
        if stored is None:
            return None
        fields = ("name", "revision", "fingerprint")
        if (
            not isinstance(stored, Mapping)
            or not isinstance(stored.get("name"), str)
            or not all(isinstance(stored.get(field), str | None) for field in fields)
        ):
            raise CheckpointError(f"{where}: base={stored!r}, where name, revision and fingerprint belong")
        return cls(stored["name"], stored.get("revision"), stored.get("fingerprint"))

    def is_same(self, other: Origin) -> bool:
        """Whether both are the same weights, as far as can be told."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        if self.revision and other.revision and self.revision != other.revision:
            return False
        return self.name == other.name

    def __str__(self) -> str:
        return self.name + (f" at revision {self.revision}" if self.revision else "")


def origin_of(model: Any, checkpoint_files: Iterable[str | Path]) -> Origin | None:
    """The origin of a model that is being loaded from these files; None for one made in memory."""
    name = getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", "")
    if not name:
        return None
    return origin_of_files(str(name), checkpoint_files, getattr(model.config, "_commit_hash", None))


def origin_of_files(name: str, checkpoint_files: Iterable[str | Path], revision: str | None = None) -> Origin:
    """The origin of weights that are called ``name``.

    The revision is read off the files where nobody knows it (transformers stopped keeping it): the cache of
    the hub has ``snapshots/COMMIT`` in their path.
    """
    files = [Path(file) for file in checkpoint_files]
    folder = files[0].absolute().parent if files else None
    if (
        revision is None
        and folder is not None
        and folder.parent.name == "snapshots"
        and _COMMIT.fullmatch(folder.name)
    ):
        revision = folder.name
    return Origin(name, revision, fingerprint(files))
