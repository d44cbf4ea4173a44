"""Telling folders from ids on the hub, and whether the hub can be asked, without importing anything heavy."""

from __future__ import annotations

import os
from pathlib import Path

from fourfold.errors import ConfigurationError

# One attempt to connect; transformers itself retries for the better part of a minute.
CONNECT_SECONDS = 3.0


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


def ensure_reachable(name: str | Path) -> None:
    """Fail at once where ``name`` is neither a path that exists, nor in the cache, nor on a hub within reach.

    To be called before transformers is asked for ``name``: without a network it retries each file for most of
    a minute, and then speaks of a connection where a misspelt folder was meant.

    Raises:
        ConfigurationError: says both, that there is no such folder and that the hub cannot be reached (or
            must not be asked, offline).
    """
    if is_meant_as_path(name) or _is_cached(str(name)):
        return
    what = f"there is no folder {name}; relative paths start at the current directory, {Path.cwd()}"
    reason = _why_unreachable()
    if reason is not None:
        raise ConfigurationError(
            f"{what}. Nor is it a model's id in the local cache, and the hub cannot be asked ({reason}). "
            "Name an existing folder, or connect to a network."
        )


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _why_unreachable() -> str | None:
    """None where the hub answers at all; any status is an answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=CONNECT_SECONDS)
    except Exception as error:  # requests' or httpx's own, by the release of huggingface_hub
        return f"{endpoint}: {type(error).__name__}"
    return None


def hub_snapshot(
    repo_id: str,
    revision: str | None = None,
    *,
    allow_patterns: list[str] | None = None,
    ignore_patterns: list[str] | None = None,
) -> Path:
    """The folder of a model on the hub, downloaded where it is not in the cache.

    Offline the cache alone is asked: some versions of huggingface_hub (1.33) list the files of a commit on
    the hub even then, and fail.
    """
    from huggingface_hub import constants, snapshot_download

    folder = snapshot_download(
        repo_id,
        revision=revision,
        local_files_only=constants.HF_HUB_OFFLINE,
        allow_patterns=allow_patterns,
        ignore_patterns=ignore_patterns,
    )
    return Path(folder)
