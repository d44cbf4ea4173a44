"""Telling folders from ids on the hub, without importing anything heavy."""

from __future__ import annotations

from pathlib import Path


def is_meant_as_path(name: str | Path) -> bool:
    """Whether ``name`` can only be, or is clearly meant as, a path.

    An id on the hub is ``name`` or ``owner/name``; anything else is a path, and so is ``folder/name`` beside
    an existing folder: asking the hub takes most of a minute where there is none.
    """
    path = Path(name).expanduser()
    text = str(name)
    if path.exists() or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        return True
    return path.suffix == ".json" or (len(path.parts) == 2 and Path(path.parts[0]).is_dir())
