"""``fourfold export``: flags, exit statuses, what lies there afterwards."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

import adapters
import tiny
from fourfold.cli import main


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapters.make(tiny.mixtral(), tmp_path, r=20)
    (tmp_path / "adapter" / "README.md").write_text("what it is")
    return tmp_path / "adapter"


def test_export_and_back(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "new" / "out", tmp_path / "back"
    assert main(["export", str(adapter), str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == {
        "folder": str(out),
        "layout": "per-expert",
        "experts_modules": 2,
        "tensors": 2 * 2 * (4 * 3 + 2),
        "rank": 20,
        "names": "base",
        "exact": True,
        "zero_filled": [],
        "flags": ["--max-lora-rank 32"],
    }
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]  # nothing is left of the making
    assert sorted(p.name for p in out.iterdir()) == ["README.md", adapters.CONFIG, adapters.WEIGHTS]
    assert stat.S_IMODE(out.stat().st_mode) & 0o055 == 0o055
    assert main(["export", str(out), str(back), "--layout", "fused"]) == 0
    said = capsys.readouterr().out
    assert "fused, 2 experts modules" in said
    assert "--max-lora-rank 32" in said
    assert (back / adapters.WEIGHTS).read_bytes() == (adapter / adapters.WEIGHTS).read_bytes()


def test_what_lies_there(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(adapter), str(out)]) == 0
    assert main(["export", str(adapter), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    (out / "old").write_text("")
    assert main(["export", str(adapter), str(out), "--force"]) == 0
    assert not (out / "old").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "diary").write_text("")
    assert main(["export", str(adapter), str(full), "--force"]) == 2
    assert (full / "diary").exists()
    for inside in (adapter, tmp_path):
        assert main(["export", str(adapter), str(inside), "--force"]) == 2
        assert "holds the adapter itself" in capsys.readouterr().err
    link = tmp_path / "link"
    link.symlink_to(out)
    assert main(["export", str(adapter), str(link), "--force"]) == 2
    (tmp_path / "file").write_text("")
    assert main(["export", str(adapter), str(tmp_path / "file" / "out")]) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_failed_replacement_keeps_the_old(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourfold.adapters import export_write

    out = tmp_path / "out"
    assert main(["export", str(adapter), str(out)]) == 0
    before = (out / adapters.WEIGHTS).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_write, "write_streams", full)
    assert main(["export", str(adapter), str(out), "--force", "--layout", "fused"]) == 3
    assert (out / adapters.WEIGHTS).read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_base_out_of_reach(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    adapters.rewrite(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 2
    assert "--gate-up" in capsys.readouterr().err
    assert main(["export", str(adapter), str(tmp_path / "out"), "--gate-up", "concatenated"]) == 0
    assert "pass --base" in capsys.readouterr().out
    assert any(".mlp.experts.0.gate_proj." in key for key in adapters.read(tmp_path / "out")[0])
    base = str(tmp_path / "base" / "config.json")
    assert main(["export", str(adapter), str(tmp_path / "named"), "--base", base]) == 0
    assert any(".block_sparse_moe.experts.0.w1." in key for key in adapters.read(tmp_path / "named")[0])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layout", "stacked"], "invalid choice"),
        (["--source-layout", "guess"], "invalid choice"),
        (["--base", "no/such/base"], "no model folder"),
        (["--gate-up", "interleaved"], "contradicts the base"),
    ],
)
def test_wrong_flags(
    capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    assert main(["export", str(adapter), str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_adapter(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    assert main(["export", str(tmp_path / "base"), str(tmp_path / "out"), "--json"]) == 2
    assert "holds no adapter" in json.loads(capsys.readouterr().out)["error"]["message"]
    (adapter / adapters.WEIGHTS).rename(adapter / "adapter_model.bin")
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 2
    assert "other formats are not read" in capsys.readouterr().err
