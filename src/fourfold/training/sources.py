"""Raw records, each with its place.

JSON, CSV and text files that are meant whole are read here, so that complaints name a line. Slices, folders,
Parquet and the hub are read by `datasets`, which runs no code from there.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import DataError
from fourfold.loading.paths import is_meant_as_path
from fourfold.training.dataset_keys import DatasetConfig

# What `datasets` calls the kinds of files that can hold records.
KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
READ_HERE = ("json", "csv", "text")
_SPLIT = re.compile(r"[\w.\-]+(\[[^\]]*\])?(\+[\w.\-]+(\[[^\]]*\])?)*")


@dataclass(frozen=True)
class Bad:
    """In place of a record: why there is none. (A type of its own: a row may well be a JSON string.)"""

    why: str


Records = Iterator[tuple[str, Any]]


def raw_records(entry: DatasetConfig) -> Records:
    """Each record of an entry, or ``Bad``, with its place (file and line, or number).

    Raises:
        DataError: there is no such file, it cannot be read, or a key has no meaning for it.
    """
    path = Path(entry.path)
    if not path.exists() and (path.suffix in KINDS or is_meant_as_path(entry.path)):
        raise DataError(f"{path}: no such file. Relative paths start at the current directory, {Path.cwd()}.")
    if is_plain(entry):
        return _file(path, entry.ds_type or KINDS[path.suffix])
    return from_library(entry)


def is_plain(entry: DatasetConfig) -> bool:
    """Whether an entry is a whole file of a kind that is read here."""
    path = Path(entry.path)
    whole = entry.split in (None, "train") and entry.data_files is None
    whole = whole and entry.name is None and entry.revision is None  # (else these are refused by name)
    return whole and path.is_file() and (entry.ds_type or KINDS.get(path.suffix)) in READ_HERE


def from_library(entry: DatasetConfig) -> Records:
    """Each record, with its place, of what `datasets` reads: slices, folders, Parquet, the hub.

    Raises:
        DataError: it cannot be read, or a key has no meaning for it.
    """
    import datasets

    path, split = Path(entry.path), entry.split or "train"
    if not _SPLIT.fullmatch(split):
        raise DataError(f"{entry.path}: split `{split}` is none. Write a name, or a slice: train[:20%].")
    saved = path / "dataset_info.json", path / "dataset_dict.json"
    try:
        if any(file.is_file() for file in saved):
            table = _saved(entry, split)
        else:
            table = datasets.load_dataset(split=split, **_arguments(entry))
    except DataError:
        raise
    except Exception as error:  # whatever the reader of that kind raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{entry.path}: cannot be read ({reason}). It must be a local file or folder, or a dataset "
            "on the hub, which must be within reach; check split and data_files."
        ) from error
    for index, record in enumerate(table, 1):
        yield f"{entry.path}, record {index}", record


def _arguments(entry: DatasetConfig) -> dict[str, Any]:
    """For ``datasets.load_dataset``."""
    path, kind = Path(entry.path), entry.ds_type
    if not path.exists():
        if kind is not None:
            raise DataError(f"{path}: `ds_type` means nothing for a dataset on the hub. Drop it.")
        given = {"name": entry.name, "data_files": entry.data_files, "revision": entry.revision}
        return {"path": entry.path, **given}
    unused = [key for key in ("name", "revision") if getattr(entry, key) is not None]
    if path.is_file():
        unused += ["data_files"] if entry.data_files is not None else []
        kind = kind or KINDS.get(path.suffix)  # type: ignore[assignment]
    if unused:
        raise DataError(f"{path}: `{unused[0]}` means nothing for a local file or folder. Drop it.")
    if path.is_file() and kind is None:
        raise DataError(
            f"{path}: not a {', '.join(KINDS)} file. Other kinds are not read yet; ds_type names one of "
            "these where the ending does not."
        )
    more = {"sep": "\t"} if path.suffix == ".tsv" else {}
    if path.is_file():
        return {"path": kind, "data_files": str(path), **more}
    if kind is not None:
        files = entry.data_files or ["*"]
        return {"path": kind, "data_files": [str(path / name) for name in files]}
    return {"path": entry.path, "data_files": entry.data_files}


def _saved(entry: DatasetConfig, split: str) -> Any:
    """A folder that ``save_to_disk`` wrote."""
    import datasets

    unused = [key for key in ("name", "revision", "data_files", "ds_type") if getattr(entry, key) is not None]
    if unused:
        raise DataError(f"{entry.path}: `{unused[0]}` means nothing for a dataset saved to disk. Drop it.")
    found = datasets.load_from_disk(entry.path)
    if isinstance(found, datasets.DatasetDict):
        name = split.partition("[")[0]
        if name not in found:
            raise DataError(f"{entry.path}: holds no split {name}, but {', '.join(found)}. Set split.")
        found = found[name]
    elif entry.split is not None and not entry.split.startswith("train"):
        raise DataError(f"{entry.path}: holds one set without a name, so split can only be train.")
    instruction = datasets.ReadInstruction.from_spec("train" + split[len(split.partition("[")[0]) :])
    [part] = instruction.to_absolute({"train": len(found)})
    return found.select(range(part.from_ or 0, len(found) if part.to is None else part.to))


def _file(path: Path, kind: str) -> Records:
    """Each record of a whole file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert the file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    if kind == "csv":
        return _table(path, text)
    if kind == "text":
        lines = ((number, line) for number, line in enumerate(_lines(text), 1) if line.strip())
        return ((f"{path}, line {number}", {"text": line}) for number, line in lines)
    if path.suffix == ".json" and not _is_a_record_a_line(text):
        return _list(path, text)
    return (
        (f"{path}, line {number}", _parse(line) if line.strip() else Bad("empty row"))
        for number, line in enumerate(_lines(text), 1)
    )


def _lines(text: str) -> list[str]:
    # Not str.splitlines: it also splits at U+2028 and the like, which JSON strings may hold unescaped.
    lines = text.split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _is_a_record_a_line(text: str) -> bool:
    """Whether a .json file is one of JSON lines, as many are."""
    first, _, rest = text.lstrip().partition("\n")
    return first.startswith("{") and bool(rest.strip()) and isinstance(_parse(first), dict)


def _list(path: Path, text: str) -> Records:
    records = _parse(text)
    if isinstance(records, Bad):
        raise DataError(f"{path}: {records.why}.")
    if not isinstance(records, list):
        raise DataError(f"{path}: holds a {type(records).__name__}, not a list of records.")
    return ((f"{path}, record {index}", record) for index, record in enumerate(records, 1))


def _table(path: Path, text: str) -> Records:
    """Rows of a table with a heading; every value is text, as it stands."""
    csv.field_size_limit(2**31 - 1)  # (the module allows 128 KiB a value)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    heading: list[str] | None = None
    before = 0
    try:
        for row in reader:
            line, before = before + 1, reader.line_num  # (a value in quotes may span lines)
            if heading is None:
                heading = row
                twice = [name for name in row if row.count(name) > 1]
                if twice:
                    raise DataError(f"{path}, line {line}: two columns are called {twice[0]!r}. Rename one.")
            elif len(row) != len(heading):
                why = f"{len(row)} values, and the heading names {len(heading)}" if row else "empty row"
                yield f"{path}, line {line}", Bad(why)
            else:
                yield f"{path}, line {line}", dict(zip(heading, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no table that can be read ({error}).") from None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}: " if "\n" in text else ""
        return Bad(f"{where}not valid JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return Bad(f"no JSON that can be read ({error})")
