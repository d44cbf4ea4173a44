"""What `fourfold quantize` leaves on disk: killed, interrupted, run twice, or replacing what is there."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from fourfold.errors import ConfigurationError
from fourfold.loading.quantize import quantize_checkpoint
from fourfold.loading.workplace import workplace as workplace_of

Config = fourfold.MoeBitsAndBytesConfig
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
workplace = functools.partial(workplace_of, doing="quantizing")


KILLED = """
import os, signal, sys
from pathlib import Path
import fourfold
from fourfold.loading import quantize
from fourfold.loading.quantize import quantize_checkpoint
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def die(done, total, name):
    if done == total // 2:
        kill()
if sys.argv[3] == "all weights written":
    quantize.save_configuration = lambda *_: kill()
    die = None
config = fourfold.MoeBitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
quantize_checkpoint(sys.argv[1], sys.argv[2], config, max_shard_size="20KB", progress=die)
"""


@pytest.mark.parametrize("when", ["half-way", "all weights written"])
def test_a_killed_run_leaves_nothing_that_loads_and_the_next_one_cleans_up(tmp_path: Path, when: str) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(out), when],
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists()
    (left,) = (p for p in tmp_path.iterdir() if p.is_dir() and p.name not in ("model", "out"))
    assert any(left.iterdir())
    assert any(left.glob("*.safetensors")) == (when == "all weights written")
    with pytest.raises(Exception, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(left)
    quantize_checkpoint(tmp_path / "model", out, Config(**NF4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    AutoModelForCausalLM.from_pretrained(out)


def test_a_failing_run_leaves_nothing(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")

    def interrupt(done: int, total: int, _name: str) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4), progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_two_runs_to_the_same_place(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    seen: list[str] = []

    def again(done: int, total: int, _name: str) -> None:
        if done == 1:
            with pytest.raises(ConfigurationError, match="another run is writing"):
                quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))
            seen.append("refused")

    quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4), progress=again)
    assert seen == ["refused"]
    fourfold.verify(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("fails", [False, True])
def test_an_ending_run_leaves_the_next_ones_folder_alone(tmp_path: Path, monkeypatch, fails: bool) -> None:
    """The next run begins at the moment at which the lock is given back."""
    out, close, busy = tmp_path / "out", os.close, []
    following: list[Path] = []
    runs = contextlib.ExitStack()

    def close_and_begin(handle: int) -> None:
        close(handle)
        if busy or following:
            return
        busy.append(handle)
        with contextlib.suppress(ConfigurationError):  # not that moment yet
            following.append(runs.enter_context(workplace(out, tmp_path / "model", force=True)))
            (following[0] / "part").write_text("of the next")
        busy.clear()

    with runs:
        with (
            contextlib.suppress(KeyboardInterrupt),
            monkeypatch.context() as patch,
            workplace(out, tmp_path / "model", force=False) as folder,
        ):
            (folder / "config.json").write_text("{}")
            patch.setattr(os, "close", close_and_begin)
            if fails:
                raise KeyboardInterrupt
        assert (following[0] / "part").read_text() == "of the next"
        assert out.exists() != fails
    assert [p.name for p in out.iterdir()] == ["part"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def replaceable(tmp_path: Path) -> Path:
    """What passes for a checkpoint that is to be replaced."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    return tmp_path / "out"


def write_new(out: Path) -> None:
    with workplace(out, out.parent / "model", force=True) as folder:
        (folder / "config.json").write_text("new")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("rename", [1, 2])
def test_an_interrupted_replacement_leaves_the_old_or_the_new(
    replaceable: Path, monkeypatch, error: type[BaseException], done: bool, rename: int
) -> None:
    original, count = Path.rename, 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count != rename:
            return original(path, target)
        if done:
            original(path, target)
        raise error

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error):
        write_new(replaceable)
    assert (replaceable / "config.json").read_text() == ("new" if rename == 2 and done else "old")
    assert [p.name for p in replaceable.parent.iterdir()] == ["out"]


def test_what_a_run_killed_while_replacing_left(replaceable: Path) -> None:
    old, folder = (replaceable.with_name(f".out.{name}") for name in ("replaced", "quantizing"))
    folder.mkdir()
    replaceable.rename(old)  # killed between the two renames: the next run finds what it must not destroy
    with (
        pytest.raises(ConfigurationError, match="exists"),
        workplace(replaceable, replaceable.parent / "model", force=False),
    ):
        pytest.fail("begun")
    assert (replaceable / "config.json").read_text() == "old"
    assert [p.name for p in replaceable.parent.iterdir()] == ["out"]
    old.mkdir()  # killed after the second
    (old / "config.json").write_text("older")
    write_new(replaceable)
    assert (replaceable / "config.json").read_text() == "new"
    assert [p.name for p in replaceable.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_symbolic_link_is_refused_before_any_work(tmp_path: Path, replaceable: Path, force: bool) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    (tmp_path / "link").symlink_to(replaceable)
    with pytest.raises(ConfigurationError, match="is a symbolic link"):
        quantize_checkpoint(
            tmp_path / "model", tmp_path / "link", Config(**NF4), force=force, progress=pytest.fail
        )
    assert (replaceable / "config.json").read_text() == "old"


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_goes_on_where_nothing_can_be_locked(replaceable: Path, monkeypatch, code: int) -> None:
    def no_locks(handle: int, _operation: int) -> None:
        assert fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with workplace(replaceable, replaceable.parent / "model", force=True) as folder:
        (folder / "config.json").write_text("new")
        with pytest.raises(ConfigurationError, match="no locks"):
            write_new(replaceable)
        assert (folder / "config.json").read_text() == "new"
    assert (replaceable / "config.json").read_text() == "new"
    assert [p.name for p in replaceable.parent.iterdir()] == ["out"]


def test_a_lock_that_fails_is_an_error_and_leaves_nothing(replaceable: Path, monkeypatch) -> None:
    handles: list[int] = []

    def broken(handle: int, _operation: int) -> None:
        handles.append(handle)
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(ConfigurationError, match="cannot be locked"):
        write_new(replaceable)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])
    assert [p.name for p in replaceable.parent.iterdir()] == ["out"]


def test_what_is_replaced_and_what_is_not(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    model, out = tmp_path / "model", tmp_path / "out"
    quantize_checkpoint(model, out, Config(**NF4))
    with pytest.raises(ConfigurationError, match="exists"):
        quantize_checkpoint(model, out, Config(load_in_8bit=True))
    (out / "left-over.txt").write_text("old")
    quantize_checkpoint(model, out, Config(load_in_8bit=True), force=True)
    assert not (out / "left-over.txt").exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["linears"] == "8bit"
    for target, said in ((model, "the model itself"), (tmp_path, "no checkpoint's folder")):
        with pytest.raises(ConfigurationError, match=said):
            quantize_checkpoint(model, target, Config(**NF4), force=True)
    assert (model / "config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
