"""From a checkpoint in high precision, or in a format that `loading.foreign` reads, to a packed one, without
ever holding the model.

The packed checkpoint is what `save_pretrained` of the loaded packed model writes: same keys, same bytes, same
configuration. Weights come through `loading.stream` one parameter at a time and go to `loading.shards`; the
peak is one projection of one layer and one shard of the output. Everything is written into a folder beside
the wanted one, which is renamed when it is complete.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.headers import checkpoint_files, read_headers
from fourfold.loading.patch import READABLE, stored_method
from fourfold.loading.paths import hub_snapshot
from fourfold.loading.shards import ShardWriter, parse_size
from fourfold.loading.skeleton import model_class, read_config
from fourfold.loading.stream import Progress, stream_pretrained
from fourfold.loading.workplace import check_target, workplace

# What tokenizers and processors are made of. No code, and no weights in other formats.
COMPANION_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
TEMPLATES = "additional_chat_templates"  # a folder of more of them
# `save_pretrained` takes 50 GB, which would be the whole model in memory here.
DEFAULT_SHARD_SIZE = "5GB"


@dataclass
class QuantizedCheckpoint:
    """What `quantize_checkpoint` wrote.

    Attributes:
        folder: where it is.
        files: names of the safetensors files.
        tensors: how many.
        bytes: of all tensors.
        packed_experts: how many experts modules are packed.
        left_on_request: names of experts modules that are in high precision because the settings say so.
        quant_method: ``fourfold``, or ``bitsandbytes`` where the model has no experts to pack.
        ignored_keys: tensors of the source that belong to nothing in the model.
        copied: files of the tokenizer and the like.
        seconds: how long it took.
    """

    folder: str
    files: list[str]
    tensors: int
    bytes: int
    packed_experts: int
    left_on_request: list[str]
    quant_method: str
    ignored_keys: list[str]
    copied: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    config: MoeBitsAndBytesConfig,
    *,
    device: str | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizedCheckpoint:
    """Write the packed checkpoint of ``model`` to ``out``.

    Args:
        model: local folder or hub id of a checkpoint (safetensors) in high precision, in MXFP4 or block-FP8,
            or with every expert in 4 bit by itself (bitsandbytes of transformers v4).
        out: the folder to make; nothing is there until all of it is.
        config: how to quantize.
        device: where to quantize; None is the GPU if there is one, as in `from_pretrained`.
        max_shard_size: of an output file, and so of what is held in memory (``5GB``).
        force: replace the checkpoint that lies at ``out``.
        progress: is called with parameters done, their total, and the name of the next one.

    Raises:
        CheckpointError: the source is no checkpoint, is damaged, lacks tensors, or is quantized in a format
            that is not read.
        ConfigurationError: ``out`` exists, or a setting is wrong.
        UnsupportedExpertsError: its experts cannot be packed and are not skipped on request.
    """
    started = time.perf_counter()
    target = Path(out).expanduser().absolute()
    shard_size = parse_size(max_shard_size)
    source = Path(model).expanduser()
    check_target(target, source, force)
    model_config = read_config(model)
    _refuse_quantized(model_config, model)
    if source.is_dir():
        read_headers(checkpoint_files(source))  # damaged files are found before anything is written
    cls = concrete_class(model_config, model)
    arguments = {"device_map": {"": _usable(device)}} if device else {}
    with workplace(target, source, force, "quantizing") as folder:
        writer = ShardWriter(folder, shard_size)
        built, ignored = stream_pretrained(
            cls,
            source if source.is_dir() else str(model),
            config,
            writer.add,
            progress,
            **arguments,
        )
        files = writer.finish()
        copied = _copy_companions(model, folder)
        save_configuration(built, folder)
    quantizer: Any = built.hf_quantizer
    method = quantizer.quantization_config.quant_method
    return QuantizedCheckpoint(
        folder=str(target),
        files=files,
        tensors=len(writer.keys),
        bytes=writer.total_size,
        packed_experts=len(quantizer.packed),
        left_on_request=list(quantizer.left_on_request),
        quant_method=str(getattr(method, "value", method)),
        ignored_keys=ignored,
        copied=copied,
        seconds=time.perf_counter() - started,
    )


def concrete_class(config: PretrainedConfig, model: str | Path) -> type[PreTrainedModel]:
    """The model's own class, never one that chooses by the configuration."""
    cls = model_class(config)
    mapping = getattr(cls, "_model_mapping", None)
    if mapping is not None:
        found = mapping.get(type(config), None)
        cls = found[0] if isinstance(found, (list, tuple)) else found
    if cls is None:
        raise CheckpointError(
            f"{model}: transformers has no model for its config.json (architectures {config.architectures}, "
            f"model_type {config.model_type})"
        )
    return cls


def _usable(device: str) -> str:
    try:
        torch.zeros(1, device=device).item()  # (there is nothing to read on the meta device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device {device!r} cannot be used here ({reason}); try cpu") from error
    return device


def _refuse_quantized(config: PretrainedConfig, model: str | Path) -> None:
    """What `from_pretrained` reads with another configuration than the stored one is read here as well."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = stored_method(stored if isinstance(stored, dict) else stored.to_dict())
    if method not in READABLE:
        raise CheckpointError(
            f"{model} is quantized already ({method}); name the checkpoint in high precision it was made from"
        )


def _copy_companions(model: str | Path, folder: Path) -> list[str]:
    """Copy what tokenizers and processors are made of; only known kinds of files."""
    source = Path(model).expanduser()
    if not source.is_dir():
        patterns = [*COMPANION_FILES, f"{TEMPLATES}/*.jinja"]
        source = hub_snapshot(str(model), allow_patterns=patterns)
    copied = []
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            copied.append(name)
    templates = source / TEMPLATES
    for template in sorted(templates.glob("*.jinja")) if templates.is_dir() else ():
        (folder / templates.name).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / templates.name / template.name)
        copied.append(f"{templates.name}/{template.name}")
    return copied


def save_configuration(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights; last of all, since nothing loads without it."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)


__all__ = ["QuantizedCheckpoint", "quantize_checkpoint"]
