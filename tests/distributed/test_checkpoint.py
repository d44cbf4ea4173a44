"""Sharded checkpoints in one process: what is kept, damaged ones, those of other models, and pickles."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from fourfold.distributed import plain_values, storage
from fourfold.distributed.checkpoint import load_checkpoint, save_checkpoint
from fourfold.distributed.tensor_file import DTYPE_NAMES, Entry, Writing, begin, in_order, pieces
from fourfold.errors import CheckpointError

TOUCHED: list[str] = []


class Bomb:
    """Opening a pickle of it is noticed."""

    def __reduce__(self) -> Any:
        return os.mkdir, (TOUCHED[-1],)


def stepped(model: nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        model(torch.full((3, 4), float(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_one_of_more_adapters_is_refused(tmp_path: Path) -> None:
    both = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    save_checkpoint(tmp_path, both)
    load_checkpoint(tmp_path, both)
    with pytest.raises(
        CheckpointError, match=r"holds model\.second\.bias and 1 more, which the model has not"
    ):
        load_checkpoint(tmp_path, nn.ModuleDict({"first": nn.Linear(4, 4)}))
    with pytest.raises(CheckpointError, match=r"other adapters.*third"):
        load_checkpoint(tmp_path, nn.ModuleDict({**both, "third": nn.Linear(4, 4)}))


def test_everything_comes_back_and_nothing_in_the_folder_is_a_pickle(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = stepped(model, 3)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 5])
    scheduler.step()
    plain = {"rate": 0.1, "far": float("inf"), "pair": (1, [2, None]), "seen": {3, 4}, 5: b"\0\1", "on": True}
    state = {"random": torch.get_rng_state(), "plain": plain, "dtype": torch.bfloat16, "scheduler": scheduler}
    save_checkpoint(tmp_path, model, optimizer, **state)
    for file in tmp_path.iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)
    again = nn.Linear(4, 4)
    other = stepped(again, 1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(other, [7])
    given = {"random": torch.zeros_like(state["random"]), "plain": None, "dtype": None}
    back = load_checkpoint(tmp_path, again, other, **given, scheduler=schedule)
    assert back["plain"] == plain
    assert [type(value) for value in back["plain"].values()] == [type(value) for value in plain.values()]
    assert back["dtype"] is torch.bfloat16
    assert torch.equal(back["random"], state["random"])
    assert schedule.milestones == Counter([1, 5])
    assert isinstance(schedule.milestones, Counter)
    for one, two in ((model, again), (optimizer, other)):
        ours, theirs = json_like(one.state_dict()), json_like(two.state_dict())
        assert ours == theirs


def json_like(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: json_like(value) for key, value in state.items()}
    return [json_like(value) for value in state] if isinstance(state, (list, tuple)) else state


def test_what_would_need_a_pickle_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(CheckpointError, match=r"odd holds a .*Bomb"):
        save_checkpoint(folder, nn.Linear(4, 4), odd=Bomb())
    assert not (folder / storage.INDEX).exists()


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """DCP's own index; and a pickle where JSON and tensors belong."""
    TOUCHED.append(str(tmp_path / "touched"))
    model = nn.Linear(4, 4)
    old = tmp_path / "old"
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(old), no_dist=True)
    (old / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pickle.*not opened"):
        load_checkpoint(old, model)
    folder = tmp_path / "folder"
    save_checkpoint(folder, model, step=1)
    (tensors,) = folder.glob("*.safetensors")
    for file in (folder / storage.INDEX, tensors):
        kept = file.read_bytes()
        file.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError, match=r"damaged.*Take an earlier checkpoint"):
            load_checkpoint(folder, model, step=0)
        file.write_bytes(kept)
    index = json.loads((folder / storage.INDEX).read_text())
    index["values"]["step"] = {"pickle": "gASVDAAAAAAAAACMAm9zlA=="}
    (folder / storage.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'pickle' is no kind of stored value"):
        load_checkpoint(folder, model, step=0)
    assert not Path(TOUCHED[-1]).exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert Path(TOUCHED[-1]).exists()  # (it would have been noticed)


def broken(index: Any, how: str) -> None:
    weight = index["tensors"]["model.weight"]
    part = weight["parts"][0]
    if how == "a part is missing":
        weight["parts"] = []
    elif how == "a part is short":
        part["sizes"][0] -= 1
    elif how == "twice":
        part["sizes"][0] //= 2
        weight["parts"].append(dict(part))
    elif how == "outside":
        part["offsets"][0] += 1
    elif how == "elsewhere":
        part["file"] = "../" + part["file"]
    elif how == "negative":
        part["offsets"][0] = -1
    elif how == "another shape":
        part["key"] = "model.bias@0"
    elif how == "another dtype":
        weight["dtype"] = "I32"
    elif how == "unknown dtype":
        weight["dtype"] = "F12"
    elif how == "no such key":
        part["key"] = "model.wight"
    elif how == "no such file":
        part["file"] = "0-1.safetensors"
    elif how == "no tensors":
        del index["tensors"]
    elif how == "another format":
        index["version"] = 2
    else:
        index["tensors"] = [weight]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a part is missing", r"do not make up \[4, 4\]"),
        ("a part is short", r"do not make up \[4, 4\]"),
        ("twice", "do not make up"),
        ("outside", "lies outside of it"),
        ("elsewhere", r"said to lie in '\.\./"),
        ("negative", r"is no shape"),
        ("another shape", r"F32 \[4\] in it, not as"),
        ("another dtype", r"F32 \[4, 4\] in it, not as"),
        ("unknown dtype", "F12"),
        ("no such key", "wight"),
        ("no such file", "missing or damaged"),
        ("no tensors", "tensors"),
        ("another format", r"fourfold\.sharded 2, and this Fourfold reads fourfold\.sharded 1"),
        ("a list", "damaged"),
    ],
)
def test_a_damaged_index_is_said_to_be(tmp_path: Path, how: str, said: str) -> None:
    model = nn.Linear(4, 4)
    save_checkpoint(tmp_path, model)
    index = json.loads((tmp_path / storage.INDEX).read_text())
    broken(index, how)
    (tmp_path / storage.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path, model)


def test_a_file_cut_short_or_gone_is_said_to_be(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    save_checkpoint(tmp_path, model)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{file.name} is missing or damaged"):
        load_checkpoint(tmp_path, model)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing or damaged"):
        load_checkpoint(tmp_path, model)
    (tmp_path / storage.INDEX).unlink()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path, model)


def test_other_dtypes_would_round_and_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, nn.Linear(4, 4))
    with pytest.raises(
        CheckpointError, match=r"model\.\w+ is torch\.float32 in .* torch\.bfloat16 in this run"
    ):
        load_checkpoint(tmp_path, nn.Linear(4, 4, dtype=torch.bfloat16))


def test_a_folder_that_the_ranks_do_not_share_is_told_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = storage.PlainWriter.finish

    def elsewhere(self: Any, *arguments: Any, **named: Any) -> None:
        next(tmp_path.glob("*.safetensors")).unlink()
        finish(self, *arguments, **named)

    monkeypatch.setattr(storage.PlainWriter, "finish", elsewhere)
    with pytest.raises(CheckpointError, match=r"safetensors was written by another rank and is not here"):
        save_checkpoint(tmp_path, nn.Linear(4, 4))
    assert not (tmp_path / storage.INDEX).exists()


def test_saving_over_a_checkpoint_leaves_one_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 4)
    save_checkpoint(tmp_path, model, step=1)
    before = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    with monkeypatch.context() as patch:
        patch.setattr(storage.json, "dump", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(CheckpointError, match="disk full"):
            save_checkpoint(tmp_path, model, step=2)
    assert load_checkpoint(tmp_path, model, step=0) == {"step": 1}
    assert torch.equal(model.weight, before)
    others = tmp_path / "adapter.safetensors"
    others.write_bytes(b"somebody else's")
    save_checkpoint(tmp_path, model, step=3)
    assert others.exists()
    others.unlink()
    assert load_checkpoint(tmp_path, model, step=0) == {"step": 3}
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # of the last save only


@pytest.mark.parametrize(
    "value", [{"tuple": 3}, {"dict": [1]}, {"dtype": "load"}, {"a": 1, "b": 2}, {"bytes": "%"}]
)
def test_values_that_nothing_wrote_are_errors(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        plain_values.decoded(value)


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """Every dtype by the name that safetensors gives it, the file byte for byte where it can be compared."""
    tensors = {}
    for number, dtype in enumerate(DTYPE_NAMES):
        data = torch.arange(16, dtype=torch.uint8).view(2, 8)
        data = data % 2 if dtype == torch.bool else data
        tensors[f"t{number:02d}"] = data.view(dtype)
    tensors["empty"] = torch.empty(0, 3)
    tensors["scalar"] = torch.tensor(2.5)
    entries = in_order(Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    begin(tmp_path / "ours.safetensors", entries)
    with Writing(tmp_path / "ours.safetensors", entries) as writing:
        for entry in entries:
            for at, piece in pieces(tensors[entry.key]):
                writing.write(entry.key, at, piece)
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours, theirs = (load_file(tmp_path / f"{who}.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == theirs[name].dtype == tensor.dtype
        assert ours[name].view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name
    with pytest.raises(CheckpointError, match=r"odd is torch\.complex128"):
        begin(tmp_path / "odd", [Entry("odd", torch.complex128, (1,))])
