"""Files of every kind that is read, with the line of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fourfold.errors import DataError
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.records import read_records
from fourfold.training.sources import Bad, raw_records

ROWS = [{"prompt": f"p{index}", "completion": f"00{index}"} for index in range(10)]


def read(path: Path, **keys: Any) -> list[tuple[str, Any]]:
    return list(raw_records(DatasetConfig(path=str(path), type="prompt_completion", **keys)))


def write(folder: Path, kind: str) -> Path:
    """The rows as a file of one kind, or a folder."""
    table, path = datasets.Dataset.from_list(ROWS), folder / f"d.{kind}"
    if kind in ("csv", "tsv"):
        sign = "," if kind == "csv" else "\t"
        lines = [sign.join(("prompt", "completion")), *(sign.join(row.values()) for row in ROWS)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind in ("jsonl", "json lines"):
        path = folder / ("d.jsonl" if kind == "jsonl" else "d.json")
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "saved with splits":
        datasets.DatasetDict(train=table, test=table.select(range(2))).save_to_disk(path)
    else:
        assert kind == "folder"
        path.mkdir()
        write(path, "jsonl")
    return path


KINDS = ["csv", "tsv", "parquet", "jsonl", "json", "json lines", "saved", "saved with splits", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    records = read(path)
    assert [record for _, record in records] == ROWS  # (texts of digits stay texts)
    assert all(str(path) in place for place, _ in records)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("csv", "tsv")])
def test_slices(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    assert [record for _, record in read(path, split="train[20%:50%]")] == ROWS[2:5]
    assert [record for _, record in read(path, split="train[:3]")] == ROWS[:3]
    assert [record for _, record in read(path, split="train[-2:]")] == ROWS[-2:]


def test_files_within_a_folder_and_named_splits(tmp_path: Path) -> None:
    folder = write(tmp_path, "folder")
    (folder / "more.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    assert len(read(folder, data_files="d.jsonl")) == 10
    assert len(read(folder, data_files=["d.jsonl", "more.jsonl"], ds_type="json")) == 11
    saved = write(tmp_path, "saved with splits")
    assert [record for _, record in read(saved, split="test")] == ROWS[:2]
    with pytest.raises(DataError, match="holds no split validation, but train, test"):
        read(saved, split="validation")


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"one\r\n\r\n  \r\ntwo words\r\n")
    entry = DatasetConfig(path=str(path), type="completion")
    assert list(raw_records(entry)) == [
        (f"{path}, line 1", {"text": "one"}),
        (f"{path}, line 4", {"text": "two words"}),
    ]
    other = path.rename(tmp_path / "d.log")
    assert len(list(raw_records(DatasetConfig(path=str(other), type="completion", ds_type="text")))) == 2


def test_a_bad_row_of_a_table_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\n"two\nlines",x\na,b,c\n\nq,\n', encoding="utf-8")
    assert read(path)[0] == (f"{path}, line 2", {"prompt": "two\nlines", "completion": "x"})
    assert read(path)[1] == (f"{path}, line 4", Bad("3 values, and the heading names 2"))
    assert read(path)[2] == (f"{path}, line 5", Bad("empty row"))
    with pytest.raises(DataError, match=r"d\.csv, line 6: `completion` is empty"):
        read_records(DatasetConfig(path=str(path), type="prompt_completion"))


@pytest.mark.parametrize(
    ("name", "content", "keys", "said"),
    [
        ("d.csv", b"a,a\n1,2\n", {}, "line 1: two columns are called 'a'"),
        ("d.csv", b'a,b\n1,"2\n', {}, "no table that can be read|line 2: no field `prompt`"),
        ("d.csv", b"prompt,completion\n", {}, "holds no record"),
        ("d.csv", b"\xff\xfe\x00", {}, "not UTF-8 text"),
        ("d.txt", b"\n\n", {}, "holds no record"),
        ("d.parquet", b"PAR1", {}, "cannot be read"),
        ("d.jsonl", b"{}", {"split": "train[:x%]"}, "cannot be read|is none"),
        ("d.jsonl", b"{}", {"split": "../x"}, "split `../x` is none"),
        ("d.jsonl", b"{}", {"name": "x"}, "`name` means nothing for a local file"),
        ("d.jsonl", b"{}", {"data_files": "x"}, "`data_files` means nothing for a local file|cannot be read"),
        ("d.py", b"import os", {}, "not a .jsonl, .json"),
    ],
)
def test_bad_files(name: str, content: bytes, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_records(DatasetConfig(path=str(tmp_path / name), type="prompt_completion", **keys))


def test_a_script_beside_the_data_is_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path, "folder")
    (folder / f"{folder.name}.py").write_text("raise SystemExit('run')\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot be read \(Dataset scripts are no longer supported"):
        read(folder)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "alone.py").write_text("raise SystemExit('run')\n", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        read(alone)
