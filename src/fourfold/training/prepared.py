"""Tokenized data, kept by what they were made of.

``dataset_prepared_path`` is a folder of folders, each named by a hash of everything that decides its content:
the bytes of the files, the entries' settings, the tokenizer with its special tokens, the chat templates, the
lengths, the split, and the versions of the code. Another of any of these is another folder; nothing in one is
ever changed. A folder is written beside its place and put there whole, by a rename; it holds Arrow tables and
JSON, with a checksum of each file, and one that is damaged is made anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fourfold.errors import ConfigurationError
from fourfold.training.data import Loaded, Templates, Tokenized, load_records, tokenize
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.encode import Sample, sample_of
from fourfold.training.packing import without_bars
from fourfold.training.records import Conversation, left_out
from fourfold.training.schema import TrainConfig
from fourfold.training.tokenizer import choose_template

# Raised whenever the same settings would give other tokens.
FORMAT = 2
META = "fourfold-data.json"
_PARTS = ("train", "held_out")
_CODE = ("fourfold", "transformers", "tokenizers", "datasets")


@dataclass
class Prepared:
    """All there is to know of a run's data.

    Attributes:
        train: to train on.
        held_out: to evaluate on, if anything is.
        sample: one question to put to the model; held out if anything is.
        bad: place and problem of each record that was left out.
        kept: the folder that they were read from, if they were.
    """

    train: Tokenized
    held_out: Tokenized | None
    sample: Sample
    bad: list[str]
    kept: str | None = None

    @property
    def notes(self) -> list[str]:
        """Lines that say what is not trained on as it stands in the files."""
        held_out = [] if self.held_out is None else self.held_out.too_long("held-out data")
        return [*left_out(self.bad), *self.train.too_long("datasets"), *held_out]


def templates_of(config: TrainConfig, tokenizer: Any) -> dict[tuple[str, str | None], str | None]:
    """What the datasets' own ``chat_template`` settings mean, by the settings.

    To be asked before the tokenizer is given the run's own template.
    """
    entries = [*config.datasets, *(config.test_datasets or ())]
    return {
        (entry.chat_template, entry.chat_template_jinja): choose_template(config, tokenizer, entry)
        for entry in entries
        if entry.chat_template is not None
    }


def prepare_data(
    config: TrainConfig, tokenizer: Any, templates: Templates, loaded: Loaded | None = None
) -> Prepared:
    """Tokenized data: from ``dataset_prepared_path`` where they are there, else made and put there.

    Args:
        config: of the run.
        tokenizer: with the run's chat template.
        templates: see ``templates_of``.
        loaded: the records, where they have been read already.

    Raises:
        DataError: see ``load_records`` and ``tokenize``.
        ConfigurationError: the folder cannot be written.
    """
    folder = None
    if config.dataset_prepared_path is not None:
        key = key_of(config, tokenizer, templates)
        folder = None if key is None else Path(config.dataset_prepared_path) / key
        found = None if folder is None else _read(folder)
        if found is not None:
            return found
    loaded = load_records(config) if loaded is None else loaded
    rest = (config.excess_length_strategy, templates)
    train = tokenize(loaded.train, tokenizer, config.sequence_len, "datasets", *rest)
    held_out = None
    if loaded.held_out:
        held_out = tokenize(loaded.held_out, tokenizer, config.sequence_len, "held-out data", *rest)
    shown = loaded.train[train.first] if held_out is None else loaded.held_out[held_out.first]
    own = templates[shown.template] if isinstance(shown, Conversation) and shown.template else None
    result = Prepared(train, held_out, sample_of(shown, tokenizer, own), loaded.bad)
    if folder is not None:
        _write(folder, result)
    return result


def key_of(config: TrainConfig, tokenizer: Any, templates: Templates) -> str | None:
    """A hash of everything that decides the tokenized data; None where a source's content cannot be known."""
    entries = []
    for entry in [*config.datasets, None, *(config.test_datasets or ())]:
        content = None if entry is None else _content(entry)
        if entry is not None and content is None:
            return None
        settings = None if entry is None else entry.model_dump(exclude={"path", "chat_template_jinja"})
        own = None if entry is None or entry.chat_template is None else templates[_template(entry)]
        entries.append([settings, own, content])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decides = {
        "format": FORMAT,
        "code": {name: version(name) for name in _CODE},
        "entries": entries,
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "special": [str(tokenizer.special_tokens_map), tokenizer.eos_token_id, tokenizer.bos_token_id],
        "begins": tokenizer("a")["input_ids"],
        "template": tokenizer.chat_template,
        "train_on_inputs": config.train_on_inputs,
        "max_bad_records": config.max_bad_records,
        "split": [config.val_set_size, config.seed if config.val_set_size else None],
        "length": [config.sequence_len, config.excess_length_strategy],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _template(entry: DatasetConfig) -> tuple[str, str | None]:
    return str(entry.chat_template), entry.chat_template_jinja


def _content(entry: DatasetConfig) -> Any:
    """What a source holds: hashes of local files; of the hub the commit, or None where it cannot be asked."""
    path = Path(entry.path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [[str(file.relative_to(path)), _checksum(file)] for file in files]
    if path.exists():
        return [path.suffix, _checksum(path)]
    from huggingface_hub import HfApi

    try:
        return [entry.path, HfApi().dataset_info(entry.path, revision=entry.revision).sha]
    except Exception:  # no such dataset, or nobody to ask: reading it says so
        return None


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return ""  # reading it says why
    return digest.hexdigest()


def _write(folder: Path, prepared: Prepared) -> None:
    """Put a whole folder in its place; another process may have put the same one there meanwhile."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        meta: dict[str, Any] = {"bad": prepared.bad, "sample": dataclasses.asdict(prepared.sample)}
        with without_bars():
            for name in _PARTS:
                part = getattr(prepared, name)
                if part is None:
                    meta[name] = None
                    continue
                part.dataset.save_to_disk(str(beside / name))
                meta[name] = {
                    field.name: getattr(part, field.name)
                    for field in dataclasses.fields(part)
                    if field.name not in ("dataset", "packed")
                }
        files = sorted(file for file in beside.rglob("*") if file.is_file())
        meta["files"] = {str(file.relative_to(beside)): _checksum(file) for file in files}
        (beside / META).write_text(json.dumps(meta), encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            damaged = beside.with_name(f"{beside.name}.damaged")
            folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        beside.chmod(folder.parent.stat().st_mode & 0o777)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # (else another process was faster)
                raise
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"dataset_prepared_path: cannot write to {folder.parent} ({error.strerror or error}). Name another "
        "folder, or drop the key."
    )


def _read(folder: Path) -> Prepared | None:
    """What a folder holds; None where it is not there, or not whole."""
    import datasets

    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        if files != {*meta["files"], META}:
            return None
        if any(_checksum(folder / name) != checksum for name, checksum in meta["files"].items()):
            return None
        parts = {}
        for name in _PARTS:
            kept = meta[name]
            whole = None if kept is None else datasets.load_from_disk(str(folder / name))
            parts[name] = None if kept is None else Tokenized(dataset=whole, **kept)
        sample = Sample(**meta["sample"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    train = parts["train"]
    return None if train is None else Prepared(train, parts["held_out"], sample, meta["bad"], str(folder))
