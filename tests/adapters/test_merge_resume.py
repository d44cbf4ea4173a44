"""A merge that was killed is gone on with, if it would give the very same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, WeightConverter

import fourfold
import tiny
from fourfold.adapters import merge as merging
from fourfold.cli import main

WEIGHTS = "adapter_model.safetensors"
KILLED = """
import os, signal, sys
import fourfold
def die(done, total, name):
    if done >= int(sys.argv[4]) and name:
        os.kill(os.getpid(), signal.SIGKILL)
fourfold.merge(*sys.argv[1:4], progress=die)
"""


def kill_a_run(folder: Path, after: int) -> Path:
    """A real process, killed when it has done so many tensors; the folder that it left."""
    arguments = [*(str(folder / name) for name in ("base", "adapter", "out")), str(after)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = (p for p in folder.iterdir() if p.is_dir() and p.name not in ("base", "adapter"))
    return left


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, and what a run left that was killed in its third file; beside it in
    ``whole`` what an undisturbed run makes. Tests take copies (hard links: times and inodes are the same)."""
    folder = tmp_path_factory.mktemp("killed") / "work"
    folder.mkdir()
    tiny.save(tiny.qwen3_moe(), folder / "base", max_shard_size="60KB")
    model = tiny.load(folder / "base", experts_quant_type="nf4")
    lora = {"target_modules": ["q_proj"], "target_parameters": fourfold.expert_targets(model)}
    torch.manual_seed(2)
    get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **lora)).save_pretrained(
        folder / "adapter"
    )
    whole = fourfold.merge(folder / "base", folder / "adapter", folder.parent / "whole")
    (folder.parent / "report.json").write_text(json.dumps(asdict(whole)))
    files = [len(load_file(folder / "base" / name)) for name in whole.files]
    assert len(files) > 4
    kill_a_run(folder, sum(files[:2]) + 1)
    return folder


@pytest.fixture
def work(killed: Path, tmp_path: Path) -> Path:
    """To be merged with the base of ``killed``: its place is part of what a result is made of."""
    shutil.copytree(killed / ".out.merging", tmp_path / ".out.merging", copy_function=os.link)
    shutil.copytree(killed / "adapter", tmp_path / "adapter")
    return tmp_path


def assert_whole(killed: Path, work: Path) -> None:
    whole = killed.parent / "whole"
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    assert sorted(str(p.relative_to(work / "out")) for p in (work / "out").rglob("*") if p.is_file()) == names
    for name in names:
        assert (work / "out" / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [p for p in work.iterdir() if p.name.startswith(".")]


def test_it_is_gone_on_with(killed: Path, work: Path) -> None:
    left = work / ".out.merging"
    before = {p.name: p.stat() for p in left.glob("*.safetensors")}
    assert len(before) == 2
    with pytest.raises(ValueError, match=r"model_type.*config\.json"):
        AutoModelForCausalLM.from_pretrained(left)
    steps: list[int] = []
    report = fourfold.merge(
        killed / "base", work / "adapter", work / "out", progress=lambda done, *_: steps.append(done)
    )
    assert report.resumed == sorted(before)
    for name, stat in before.items():
        now = (work / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), name
    assert_whole(killed, work)
    wanted = json.loads((killed.parent / "report.json").read_text())
    for what in ("files", "keys", "planned", "roles", "copied", "warnings"):
        assert asdict(report)[what] == wanted[what], what
    assert steps[-1] == sum(len(load_file(killed / "base" / name)) for name in report.files)


def same_inputs(work: Path) -> None:
    """Nothing was changed."""


def adapter(work: Path) -> None:
    tensors = load_file(work / "adapter" / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, work / "adapter" / WEIGHTS, metadata={"format": "pt"})


def alpha(work: Path) -> None:
    file = work / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}))


@pytest.mark.parametrize("change", [same_inputs, adapter, alpha])
def test_of_other_inputs_nothing_is_kept(killed: Path, work: Path, change) -> None:
    change(work)
    report = fourfold.merge(killed / "base", work / "adapter", work / "out")
    assert len(report.resumed) == (2 if change is same_inputs else 0)
    if change is same_inputs:
        assert_whole(killed, work)
    else:
        fourfold.merge(killed / "base", work / "adapter", work / "fresh")
        for file in (work / "fresh").glob("*.safetensors"):
            assert (work / "out" / file.name).read_bytes() == file.read_bytes()


def test_other_weights_and_a_touched_base(killed: Path, work: Path) -> None:
    assert fourfold.merge(killed / "base", work / "adapter", work / "out", "dequantized").resumed == []
    shutil.rmtree(work / "out")
    shutil.copytree(killed / ".out.merging", work / ".out.merging", copy_function=os.link)
    file = next((killed / "base").glob("*.safetensors"))
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        assert fourfold.merge(killed / "base", work / "adapter", work / "out").resumed == []
    finally:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_whole(killed, work)


def test_the_command_says_what_was_kept(killed: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(killed / "base"), str(work / "adapter"), str(work / "out")]
    (work / "out").mkdir()
    assert main(["merge", *arguments]) == 2  # (it exists, and nothing is lost by asking)
    (work / "out").rmdir()
    assert main(["merge", *arguments]) == 0
    assert "kept of a run that was killed: 2 file(s)" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["truncated", "changed", "no note", "broken note", "a note of old"])
def test_a_finished_file_that_is_not_as_it_was_is_written_again(killed: Path, work: Path, what: str) -> None:
    first, second = sorted((work / ".out.merging").glob("*.safetensors"))
    data = first.read_bytes()
    note = work / ".out.merging" / ".fourfold-run" / f"{first.name}.json"
    changed = note if "note" in what else first
    changed.unlink()  # (a hard link)
    if what == "truncated":
        first.write_bytes(data[:-8])
    elif what == "changed":
        first.write_bytes(data[:-1] + b"\0")
    elif what == "broken note":
        note.write_text('{"file": [1')
    elif what == "a note of old":
        stat = first.stat()
        note.write_text(json.dumps({"file": [stat.st_size, stat.st_mtime_ns], "record": {"written": []}}))
    assert fourfold.merge(killed / "base", work / "adapter", work / "out").resumed == [second.name]
    assert_whole(killed, work)


def test_a_failing_run_leaves_nothing_to_go_on_with(killed: Path, work: Path) -> None:
    def fail(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fourfold.merge(killed / "base", work / "adapter", work / "out", progress=fail)
    assert not (work / ".out.merging").exists()


def test_killed_at_the_very_end(killed: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are there, config.json among them; the next run writes it last again."""
    (work / ".out.merging" / "config.json").write_text("{}")
    seen: list[bool] = []
    write = merging._Writer.write

    def watched(self, file, path):
        seen.append((path.parent / "config.json").exists())
        write(self, file, path)

    monkeypatch.setattr(merging._Writer, "write", watched)
    fourfold.merge(killed / "base", work / "adapter", work / "out")
    assert seen
    assert not any(seen)
    assert_whole(killed, work)


JOINED = WeightConverter(
    ["mlp.experts.*.gate.weight", "mlp.experts.*.up.weight"],
    "mlp.experts.gate_up_proj",
    [MergeModulelist(dim=0), Concatenate(dim=1), Interleave(dim=1)],
)


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[Path]:
    """A base in which the keys of one conversion lie in several files."""
    kind = "qwen3_moe"
    before = conversion_mapping.get_checkpoint_conversion_mapping(kind)
    down = WeightConverter(
        "mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]
    )
    conversion_mapping.register_checkpoint_conversion_mapping(kind, [JOINED, down], overwrite=True)
    try:
        tiny.save(tiny.qwen3_moe(), tmp_path / "base")
        cut_files(tmp_path / "base", 7)
        yield tmp_path
    finally:
        conversion_mapping.register_checkpoint_conversion_mapping(kind, before, overwrite=True)


def cut_files(base: Path, keys: int) -> None:
    """The same tensors, so many to a file. (`save_pretrained` keeps those of one parameter together.)"""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i // keys:02d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file(
            {n: tensors[n] for n in names if weight_map[n] == file}, base / file, metadata={"format": "pt"}
        )
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_conversion_over_several_files_is_counted_once(cut: Path) -> None:
    model = tiny.load(cut / "base", experts_quant_type="nf4")
    targets = fourfold.expert_targets(model)
    lora = LoraConfig(r=3, target_modules=[], target_parameters=targets, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(cut / "adapter")
    files = [set(load_file(f)) for f in sorted((cut / "base").glob("*.safetensors"))]
    holding = [i for i, keys in enumerate(files) if any("0.mlp.experts.3.gate" in key for key in keys)]
    holding += [i for i, keys in enumerate(files) if any("0.mlp.experts.5.gate" in key for key in keys)]
    assert holding[0] < holding[1]
    whole = fourfold.merge(cut / "base", cut / "adapter", cut / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "workplace", keeping(merging.workplace))
        stop = sum(map(len, files[: holding[1]]))
        with pytest.raises(Stop):
            fourfold.merge(cut / "base", cut / "adapter", cut / "out", progress=stopping(stop))
    report = fourfold.merge(cut / "base", cut / "adapter", cut / "out")
    assert len(report.resumed) == holding[1]
    assert (report.roles, report.planned, report.keys) == (whole.roles, whole.planned, whole.keys)
    for file in (cut / "whole").glob("*.safetensors"):
        assert (cut / "out" / file.name).read_bytes() == file.read_bytes()


class Stop(BaseException):
    """As if the process were killed."""


def stopping(after: int):
    def stop(done: int, total: int, name: str) -> None:
        if done >= after:
            raise Stop

    return stop


def keeping(workplace):
    """A workplace that is left as it is when the run is stopped."""
    from contextlib import contextmanager

    @contextmanager
    def kept(target, *args):
        with workplace(target, *args) as folder:
            try:
                yield folder
            except Stop:
                shutil.copytree(folder, target.parent / "kept")
                raise

    @contextmanager
    def put_back(target, *args):
        try:
            with kept(target, *args) as folder:
                yield folder
        except Stop:
            (target.parent / "kept").rename(target.with_name(f".{target.name}.merging"))
            raise

    return put_back


def test_of_another_release_of_what_decides_the_bytes_nothing_is_kept(
    killed: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourfold.adapters import merge_files
    from fourfold.adapters.merge_plan import make_plan

    plan = make_plan(killed / "base", work / "adapter", "original", any_base=False)
    ours = merge_files.inputs_of(plan)
    for library in (merge_files.bitsandbytes, merge_files.peft, merge_files.torch, merge_files.transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0.0")
            assert merge_files.inputs_of(plan) != ours
    assert merge_files.inputs_of(plan) == ours
