"""Export reads and writes a piece at a time: the bytes of `save_file`, and never the adapter in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapters
import fourfold
import tiny
from fourfold.adapters import factor_file
from fourfold.adapters.export_write import write_streams
from fourfold.adapters.factor_file import AdapterFile, Stream
from fourfold.errors import AdapterError


def test_the_bytes_of_save_file(tmp_path: Path) -> None:
    """Dtypes mixed, names that are not ASCII, an empty tensor, and another order of writing."""
    torch.manual_seed(0)
    dtypes = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    tensors = {
        f"{name}.{i}": torch.randn(3, i + 2).to(dtype) for i, dtype in enumerate(dtypes) for name in "zaé"
    }
    tensors["empty"] = torch.empty(0, 5)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    streams = {
        key: Stream(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: iter(tensor.split(1)))
        for key, tensor in reversed(tensors.items())
    }
    write_streams(tmp_path / "ours", streams)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("what", ["short", "dtype"])
def test_pieces_that_are_not_the_tensor_are_a_bug(tmp_path: Path, what: str) -> None:
    piece = torch.zeros(4, 3) if what == "short" else torch.zeros(5, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="x: "):
        write_streams(tmp_path / "f", {"x": Stream((5, 3), torch.float32, lambda: iter((piece,)))})


@pytest.mark.parametrize("kind", [*tiny.KINDS, "llama4"])
def test_a_few_experts_and_rows_at_a_time_give_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**tiny.KINDS, "llama4": tiny.llama4}[kind]()
    adapters.make(config, tmp_path, target_modules=[] if kind == "llama4" else ["q_proj"])
    arguments = {"gate_up": "concatenated"} if kind == "llama4" else {}
    fourfold.export(tmp_path / "adapter", tmp_path / "known", **arguments)
    reads: list[int] = []
    rows = AdapterFile.rows

    def counted(self, key: str, begin: int, end: int) -> torch.Tensor:
        found = rows(self, key, begin, end)
        reads.append(found.nbytes)
        return found

    monkeypatch.setattr(AdapterFile, "rows", counted)
    monkeypatch.setattr(factor_file, "HELD_BYTES", 3000)
    monkeypatch.setattr(factor_file, "CHUNK_BYTES", 700)
    fourfold.export(tmp_path / "adapter", tmp_path / "out", **arguments)
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused", **arguments)
    for one, other in (("known", "out"), ("adapter", "back")):
        files = [(tmp_path / folder / adapters.WEIGHTS).read_bytes() for folder in (one, other)]
        assert files[0] == files[1]
    fused = [t for key, t in adapters.read(tmp_path / "adapter")[0].items() if "experts" in key]
    assert max(reads) <= max(t.nbytes for t in fused) / 4  # (of four experts, or more)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(24,), (24, 8, 8)])
def test_factors_that_are_no_matrices(tmp_path: Path, fused: bool, shape: tuple[int, ...]) -> None:
    adapters.make(tiny.qwen3_moe(), tmp_path)
    folder, layout = tmp_path / "adapter", "per-expert"
    if not fused:
        fourfold.export(folder, tmp_path / "listed")
        folder, layout = tmp_path / "listed", "fused"
    tensors, _ = adapters.read(folder)
    key = next(key for key in tensors if "experts" in key and "lora_B" in key)
    adapters.rewrite(folder, tensors | {key: torch.ones(shape)})
    with pytest.raises(AdapterError, match=r"matrix|not those of|differ in shape"):
        fourfold.export(folder, tmp_path / "out", layout)


PEAK = """
import sys, threading, time
from pathlib import Path
import fourfold
from fourfold.adapters import factor_file
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
small, large, layout, out, gate_up = sys.argv[1:]
fourfold.export(small, out + "-small", layout, gate_up=gate_up)  # what is imported on the way
factor_file.HELD_BYTES = factor_file.CHUNK_BYTES = 2**20
before, peak, ended = resident(), 0, False
def watch():
    global peak
    while not ended:
        peak = max(peak, resident())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
fourfold.export(large, out, layout, gate_up=gate_up)
ended = True
watcher.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of 96 MiB, and a small one; fused, and (in ``-per-expert``) the same for servers."""
    folder = tmp_path_factory.mktemp("sizes")
    adapters.make(tiny.qwen3_moe(), folder, target_modules=["q_proj"])
    adapters.rewrite(folder / "adapter", base_model_name_or_path=None)
    (folder / "adapter").rename(folder / "small")
    # One layer of 64 experts, r=64: A [4096, 1024] and B [1024, 4096], of gate_up and of down (512 wide)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    shapes = {
        f"{prefix}.base_layer.lora_A.weight": (4096, 2048),
        f"{prefix}.base_layer.lora_B.weight": (1024, 4096),
        f"{prefix}.lora_A.weight": (4096, 512),
        f"{prefix}.lora_B.weight": (2048, 4096),
    }
    torch.manual_seed(0)
    (folder / "large").mkdir()
    config = (folder / "small" / adapters.CONFIG).read_text()
    (folder / "large" / adapters.CONFIG).write_text(config)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    adapters.rewrite(folder / "large", tensors, r=64, target_modules=[])
    for name in ("small", "large"):
        fourfold.export(folder / name, folder / f"{name}-per-expert", gate_up="concatenated")
    assert (folder / "large" / adapters.WEIGHTS).stat().st_size > 85 * 2**20
    return folder


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_the_adapter_is_never_in_memory(sizes: Path, tmp_path: Path, layout: str) -> None:
    suffix = "" if layout == "per-expert" else "-per-expert"
    folders = [str(sizes / f"{name}{suffix}") for name in ("small", "large")]
    command = [sys.executable, "-c", PEAK, *folders, layout, str(tmp_path / "out"), "concatenated"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert int(done.stdout) < 24 * 2**20  # (it was twice the 90 MiB)
