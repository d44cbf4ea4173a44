"""Files of a merged checkpoint that are the base's own, and what the others are made of."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers

from fourfold import version
from fourfold.adapters import provenance
from fourfold.adapters.merge_plan import MergePlan

_INDEXES = (".safetensors.index.json", ".bin.index.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def inputs_of(plan: MergePlan) -> str:
    """What decides every byte of the result, as a digest; reads the adapter once.

    The adapter counts by its bytes; the base's files, which may have a terabyte, by name, size and time of
    their last change.

    Raises:
        AdapterError: a number of the adapter is NaN or infinite.
    """
    adapter = plan.adapter.folder
    stats = [(file.path, file.path.stat()) for file in plan.files]
    texts = (adapter / "adapter_config.json", adapter / provenance.FILE, plan.base / "config.json")
    made_of = {
        "releases": [m.__version__ for m in (version, torch, transformers, peft, bitsandbytes)],
        "adapter": plan.adapter.file.check(),
        "texts": [hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None for p in texts],
        "base": [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "dequantized": plan.dequantized,
        # (how the adapter is read, whatever said so)
        "updates": [[u.parameter, u.scaling, u.out_by_in, u.grouped] for u in plan.updates.values()],
    }
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _is_index_of_others(path: Path, files: set[str]) -> bool:
    """Whether it is an index (of pickled files, of a second copy of the weights) of what is left out."""
    if not path.name.endswith(_INDEXES):
        return False
    try:
        return not files.issuperset(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True


def copy_other_files(plan: MergePlan, folder: Path) -> tuple[list[str], list[str]]:
    """Everything of the base that is no weights, config.json last; what is hidden stays behind."""
    copied: list[str] = []
    left_out: list[str] = []
    files = {file.path.name for file in plan.files}
    found = sorted(path for path in plan.base.rglob("*") if path.is_file())
    for path in sorted(found, key=lambda path: path == plan.base / "config.json"):
        name = path.relative_to(plan.base)
        if any(part.startswith(".") for part in name.parts) or str(name) in files:
            continue
        if path.suffix in _WEIGHTS or _is_index_of_others(path, files):
            left_out.append(str(name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        copied.append(str(name))
    return copied, left_out
