"""Writing an adapter's folder, all of it or nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fourfold.adapters.export_read import CONFIG, WEIGHTS
from fourfold.adapters.factor_file import DTYPES, Stream
from fourfold.adapters.provenance import FILE
from fourfold.errors import AdapterError

# What lies beside an adapter and stays true of it.
_COMPANIONS = ("README.md", FILE)


def check_target(target: Path, source: Path, force: bool) -> None:
    """Before anything is read.

    Raises:
        AdapterError: ``target`` exists and is not to be, or must not be, replaced.
    """
    if target.resolve() == source.resolve() or source.resolve().is_relative_to(target.resolve()):
        raise AdapterError(f"{target} holds the adapter itself; name another folder to write to")
    if target.is_symlink():
        raise AdapterError(f"{target} is a symbolic link; name the folder that it stands for")
    if not target.exists():
        return
    if not force:
        raise AdapterError(
            f"{target} exists; name another folder, or pass --force (force=True) to replace it"
        )
    if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file()):
        raise AdapterError(f"{target} is no adapter's folder, so it is not replaced; remove it first")


def write_folder(
    target: Path,
    source: Path,
    tensors: Mapping[str, Stream],
    config: Mapping[str, Any],
    force: bool,
    *,
    ordinary: bool = False,
) -> None:
    """Write beside ``target`` and rename: what lies there is the old or the new adapter, never a part of one.

    Args:
        target: checked by `check_target`.
        source: the adapter's own folder, for its companions.
        tensors: key -> tensor, in the order in which they are best read.
        config: adapter_config.json.
        force: replace what lies at ``target``.
        ordinary: what the adapter began with has been taken off, and ``fourfold.json`` says so.

    Raises:
        AdapterError: nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".exporting", dir=target.parent))
    except OSError as error:
        raise AdapterError(f"{target} cannot be written ({error.strerror}); name another folder") from error
    try:
        write_streams(folder / WEIGHTS, tensors)
        for name in _COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if ordinary:
            said = json.loads((source / FILE).read_text(encoding="utf-8")) | {"init": None}
            (folder / FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        # Sorted, as PEFT writes it; last, for without it nothing loads.
        text = json.dumps(dict(config), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        folder.chmod(0o755)
        check_target(target, source, force)
        _put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_streams(path: Path, tensors: Mapping[str, Stream]) -> None:
    """The bytes that `safetensors.torch.save_file` writes, with a piece of a tensor in memory at a time.

    Tensors lie in its order, widest dtype first, then by name; they are read in the order of ``tensors``.
    """
    widths = list(DTYPES)
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda key: (widths.index(names[tensors[key].dtype]), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for key in order:
        stream = tensors[key]
        begins[key], end = end, end + torch.Size(stream.shape).numel() * stream.dtype.itemsize
        header[key] = {
            "dtype": names[stream.dtype],
            "shape": list(stream.shape),
            "data_offsets": [begins[key], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for key, stream in tensors.items():
            file.seek(start + begins[key])
            for piece in stream.pieces():
                if piece.dtype != stream.dtype:
                    raise AssertionError(f"{key}: a piece in {piece.dtype}, not {stream.dtype}")
                file.write(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy()))
            if file.tell() - start != header[key]["data_offsets"][1]:
                raise AssertionError(f"{key}: wrote to {file.tell() - start}, not its end")


def _put_in_place(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
    try:
        target.rename(aside / "old")
        try:
            folder.rename(target)
        except OSError:
            (aside / "old").rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
