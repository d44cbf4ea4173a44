"""The folder in which a checkpoint is written before it takes its name, for every verb that writes one.

A run that says what its result is made of (``inputs``) can be gone on with: what a killed one left is kept if
it was made of the same, and files that it had finished (`finish`) need not be written again (`finished`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fourfold.errors import ConfigurationError

# Holds what a run leaves to the one that goes on with it; gone before the folder takes its name.
_RECORDS = ".fourfold-run"
_INPUTS = "made-of"
# What file systems without locks answer (NFS mounted without, and some of clusters).
_NO_LOCKS = (errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def check_target(target: Path, source: Path, force: bool) -> None:
    """Refuse to write where something lies that is not to be replaced.

    Raises:
        ConfigurationError: naming what lies there.
    """
    if source.exists() and (target == source.absolute() or target.resolve() == source.resolve()):
        raise ConfigurationError(f"{target} is the model itself; name another folder to write to")
    if target.is_symlink():
        raise ConfigurationError(f"{target} is a symbolic link; name the folder that it stands for")
    if not target.exists():
        return
    if not force:
        raise ConfigurationError(f"{target} exists; name another folder, or pass --force to replace it")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ConfigurationError(
            f"{target} is no checkpoint's folder, so it is not replaced; remove it first"
        )
    if source.exists() and source.resolve().is_relative_to(target.resolve()):
        raise ConfigurationError(f"{source} lies in {target}, which is to be replaced")


@contextlib.contextmanager
def workplace(
    target: Path, source: Path, force: bool, doing: str, inputs: str | None = None
) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when all is done, and is removed when anything fails.

    What a killed run has left is removed first, unless it was made of the same ``inputs``; another run that
    is still at it is an error. Nothing loads from the folder of a killed run, whatever it holds: config.json
    is written last of all.

    Args:
        target: the wanted folder.
        source: the model that is read; never written to.
        force: replace the checkpoint that lies at ``target``.
        doing: what is done, e.g. ``quantizing``; part of the folder's name.
        inputs: what decides every byte of the result, as a digest; None where a run is never gone on with.

    Raises:
        ConfigurationError: ``target`` exists, cannot be written, or another run is writing it.
    """
    folder = target.with_name(f".{target.name}.{doing}")
    lock = target.with_name(f".{target.name}.{doing}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = _lock(lock, target)
    except OSError as error:  # no such right, a file where a folder should be, a name too long
        raise ConfigurationError(
            f"{target} cannot be written ({error.strerror}); name another folder"
        ) from error
    try:
        left = handle is not None and _is_made_of(folder, inputs)
        if handle is not None and not left:  # whoever made it is gone
            shutil.rmtree(folder, ignore_errors=True)
        if not left:
            _make(folder, target, inputs)
        (folder / "config.json").unlink(missing_ok=True)
        try:
            _recover(target)
            check_target(target, source, force)
            yield folder
            shutil.rmtree(folder / _RECORDS, ignore_errors=True)
            _put_in_place(folder, target, force)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        if handle is not None:  # last of all: from here on the names belong to the next run
            lock.unlink(missing_ok=True)
            os.close(handle)


def _is_made_of(folder: Path, inputs: str | None) -> bool:
    try:
        return inputs is not None and (folder / _RECORDS / _INPUTS).read_text(encoding="utf-8") == inputs
    except (OSError, ValueError):
        return False


def finish(part: Path, path: Path, record: Mapping[str, Any]) -> None:
    """Give a finished file its name, and note it for a run that goes on with this one.

    The file is on the disk before the note is: a machine that loses power loses the note first.

    Args:
        part: the file, under another name in the same folder.
        path: its name in the folder of `workplace`.
        record: what `finished` gives back, in JSON's types.
    """
    _sync(part)
    part.rename(path)
    note = _note(path)
    note.parent.mkdir(exist_ok=True)
    draft = note.with_suffix(".part")
    draft.write_text(json.dumps({"file": _identity(path), "record": record}), encoding="utf-8")
    _sync(draft)
    draft.rename(note)


def finished(path: Path) -> Any:
    """What `finish` noted of a file that is still as it was then; None of any other."""
    try:
        stored = json.loads(_note(path).read_text(encoding="utf-8"))
        return stored["record"] if stored["file"] == _identity(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note(path: Path) -> Path:
    return path.parent / _RECORDS / f"{path.name}.json"


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _make(folder: Path, target: Path, inputs: str | None) -> None:
    try:
        folder.mkdir()
    except FileExistsError:  # only where nothing can be locked
        raise ConfigurationError(
            f"{folder} exists, and there are no locks on this file system that would tell why: another run "
            f"is writing {target} at this moment, or one was killed. If none is running, remove that folder"
        ) from None
    if inputs is not None:
        (folder / _RECORDS).mkdir()
        (folder / _RECORDS / _INPUTS).write_text(inputs, encoding="utf-8")


def _lock(path: Path, target: Path) -> int | None:
    """Make the file and lock it; a process that ends, however it ends, unlocks it.

    Returns:
        The open file, or None on a file system that has no locks.
    """
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what is open for writing
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigurationError(f"another run is writing {target} at this moment") from None
        except OSError as error:
            path.unlink(missing_ok=True)
            os.close(handle)
            if error.errno in _NO_LOCKS:
                return None
            raise ConfigurationError(
                f"{path} cannot be locked ({error.strerror}); write to a folder on another file system"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # the run before has ended in between, and taken its file away


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _recover(target: Path) -> None:
    """Finish what a run was killed at: the checkpoint that it was replacing comes back, or goes."""
    old = _replaced(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _put_in_place(folder: Path, target: Path, force: bool) -> None:
    """Give the finished folder its name; there is always a checkpoint at ``target`` if there was one."""
    if not (force and target.exists()):
        folder.rename(target)
        return
    try:
        target.rename(_replaced(target))
        folder.rename(target)
    finally:
        _recover(target)
