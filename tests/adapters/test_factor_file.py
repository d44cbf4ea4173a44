"""Factors read one expert at a time: the same numbers, a bounded number of them in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import fourfold
import tiny
from fourfold.adapters import factor_file
from fourfold.adapters.factor_file import AdapterFile, FlatFactors
from fourfold.errors import AdapterError

M, R, N, C = 7, 3, 11, 5
A, B = "x.lora_A.weight", "x.lora_B.weight"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Two experts' B held, chunks of four rows; and what is read of which file, in bytes."""
    reads: list[tuple[str, int]] = []
    read = factor_file.read_numbers

    def counted(source, count, dtype):
        reads.append((Path(source.name).name, count * dtype.itemsize))
        return read(source, count, dtype)

    monkeypatch.setattr(factor_file, "read_numbers", counted)
    monkeypatch.setattr(factor_file, "HELD_BYTES", 2 * N * R * 2 + 1)
    monkeypatch.setattr(factor_file, "CHUNK_BYTES", 4 * R * M * 2)
    return reads


def write(path: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {A: torch.randn(M * R, C).to(dtype), B: torch.randn(N, R * M).to(dtype)}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("order", [(), (3, 0, 6), tuple(reversed(range(M)))])
def test_every_expert_has_its_numbers(
    tmp_path: Path, small: list[tuple[str, int]], grouped: bool, order: tuple[int, ...]
) -> None:
    tensors = write(tmp_path / "f.safetensors")
    file = AdapterFile(tmp_path / "f.safetensors")
    flat = FlatFactors(file, A, B, M, grouped=grouped, order=order)
    b_NRM = tensors[B].view(N, R, M)
    if grouped:
        b_NRM = tensors[B].view(N, M, R).transpose(1, 2)
    for e in (*order, *range(M), 2, 5):
        assert torch.equal(flat.a(e), tensors[A].view(M, R, C)[e])
        assert torch.equal(flat.b(e), b_NRM[:, :, e])
        assert sum(held.b_GNR.nbytes for held in file.held.values()) <= factor_file.HELD_BYTES
    assert max(size for _, size in small) <= factor_file.CHUNK_BYTES < tensors[B].nbytes


def test_in_the_order_of_asking_b_is_read_once_for_each_group(
    tmp_path: Path, small: list[tuple[str, int]]
) -> None:
    tensors = write(tmp_path / "f.safetensors")
    order = (0, 1, 5, 2, 6, 3, 4)  # as files sort names
    flat = FlatFactors(AdapterFile(tmp_path / "f.safetensors"), A, B, M, order=order)
    for e in order:
        flat.b(e)
    assert sum(size for _, size in small) == tensors[B].nbytes * 4  # of 7 experts two at a time


def test_what_is_held_of_others_goes(tmp_path: Path) -> None:
    keys = {f"{i}.{x}": None for i in range(4) for x in "ab"}
    save_file({key: torch.ones(M * R, M * R) for key in keys}, tmp_path / "f.safetensors")
    file = AdapterFile(tmp_path / "f.safetensors")
    for i in (0, 1, 0, 2, 3):
        FlatFactors(file, f"{i}.a", f"{i}.b", M).b(0)
        assert list(file.held)[-1] == f"{i}.b"
        assert len(file.held) <= factor_file.HELD_PARAMETERS


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.bfloat16), (float("inf"), torch.float32)])
def test_the_check_finds_what_is_no_number_and_tells_files_apart(tmp_path: Path, value, dtype, small) -> None:
    path = tmp_path / "f.safetensors"
    tensors = write(path, dtype)
    import hashlib

    assert AdapterFile(path).check() == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors[B][-1, -1] = value
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=f"{B} holds NaN or infinite"):
        AdapterFile(path).check()


@pytest.mark.parametrize("what", ["dtype", "shape", "short"])
def test_damaged_files(tmp_path: Path, what: str) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.zeros(8, dtype=torch.int32 if what == "dtype" else torch.float32)}, path)
    if what == "shape":
        path.write_bytes(path.read_bytes().replace(b'"shape":[8]', b'"shape":[9]'))
    elif what == "short":
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="a is I32" if what == "dtype" else "damaged"):
        AdapterFile(path)


def test_a_merge_reads_slices_and_no_fused_factor(tmp_path: Path, small: list[tuple[str, int]]) -> None:
    model = tiny.save(tiny.qwen3_moe(num_experts=24), tmp_path / "base")
    targets = fourfold.expert_targets(model)
    lora = LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    fourfold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    sizes = [size for name, size in small if name == "adapter_model.safetensors"]
    one_a = 4 * 64 * 4  # of an expert, fp32
    fused_a, fused_b, row_of_b = 24 * 4 * 32 * 4, 64 * 24 * 4 * 4, 24 * 4 * 4
    assert max(sizes) <= max(factor_file.CHUNK_BYTES, row_of_b, one_a) < min(fused_a, fused_b) / 4


def test_a_merge_asks_for_experts_in_the_order_of_its_files(
    tmp_path: Path, small: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0, 1, 10, 11, ...: B is read once for each four experts, which the order of numbers would exceed."""
    model = tiny.save(tiny.qwen3_moe(num_experts=24, num_hidden_layers=1), tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=[], target_parameters=fourfold.expert_targets(model))
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    one_b, a_up, a_down = 64 * 4 * 4, 24 * 4 * 64 * 4, 24 * 4 * 32 * 4  # gate and up, and down: 64 rows
    monkeypatch.setattr(factor_file, "HELD_BYTES", 4 * one_b)
    fourfold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    sizes = [size for name, size in small if name == "adapter_model.safetensors"]
    both_b = 2 * 24 * one_b
    checked, of_b = a_up + a_down + both_b, 6 * both_b
    assert sum(sizes) == checked + of_b + 2 * a_up + a_down  # (A for gate and for up)


# DeepSeek-V3: gate_up and down of 256 experts, at r=128, in bf16.
HIDDEN, INTERMEDIATE, EXPERTS, RANK = 7168, 2048, 256, 128
MEASURE = """
import sys, torch
from pathlib import Path
from fourfold.adapters.factor_file import AdapterFile, FlatFactors
from fourfold.adapters.updates import Factors
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
file = AdapterFile(Path(sys.argv[1]))
order = sorted(range(256), key=str)
both = [Factors(FlatFactors(file, f"{n}.A", f"{n}.B", 256, order=order), 1.0, True) for n in ("up", "down")]
for expert in order[:3]:
    for factors in both:
        factors.of(expert)
print(peak() - before)
"""


def test_deepseek_v3_at_rank_128(tmp_path: Path) -> None:
    """Sparse files: every number is zero, and read all the same."""
    shapes = {
        "down.A": (EXPERTS * RANK, INTERMEDIATE),
        "down.B": (HIDDEN, RANK * EXPERTS),
        "up.A": (EXPERTS * RANK, HIDDEN),
        "up.B": (2 * INTERMEDIATE, RANK * EXPERTS),
    }
    header, position = {}, 0
    for key, (rows, columns) in shapes.items():
        end = position + rows * columns * 2
        header[key] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (tmp_path / "f.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    held = factor_file.HELD_PARAMETERS * factor_file.HELD_BYTES
    one_in_fp32 = 4 * RANK * (HIDDEN + 2 * INTERMEDIATE)
    bound = held + 3 * factor_file.CHUNK_BYTES + 4 * one_in_fp32
    assert bound < 2**28 == torch.Size(shapes["up.B"]).numel() * 2  # (half of what it is in fp32)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "f.safetensors")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 2**26 < int(done.stdout) < bound


LARGEST = """
import sys, torch
from fourfold.adapters.merge_plan import Packing
from fourfold.formats import PackFormat
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
parts, linear, out_by_in = (int(text) for text in sys.argv[1:])
packing = Packing(PackFormat("nf4", 64, True), parts=parts, linear=bool(linear), out_by_in=bool(out_by_in))
packing.round_trip(torch.randn(128, 256).bfloat16(), "small")
before = peak()
packing.round_trip(torch.randn(4096, 4096, dtype=torch.bfloat16), "large")
print(peak() - before)
"""


@pytest.mark.parametrize("how", ["1 1 1", "2 0 1", "2 0 0"], ids=["Linear", "gate and up", "turned over"])
def test_a_matrix_takes_nine_bytes_a_weight(how: str) -> None:
    """The weights in bf16, once more where they are turned over, codes, and the result in fp32. The largest
    matrix of a published model (32,768 by 6,144) is then within 2 GB."""
    done = subprocess.run(
        [sys.executable, "-c", LARGEST, *how.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    constant = 2**21 * 25  # of what is quantized at a time
    assert 9 * 32768 * 6144 < 2e9
    assert int(done.stdout) < 9 * 4096 * 4096 + constant
