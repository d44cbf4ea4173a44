"""Programs under ``torchrun``: one machine, two by two launch agents on loopback, and ranks that die."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import sharded_checks
import tiny

pytestmark = [pytest.mark.slow]
SECONDS = 60  # after a kill, on a machine with more to do; alone it is five

BEGIN = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[2])
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
from pathlib import Path
from ranks import Job
import fourfold
import sharded_checks as checks
import fourfold.distributed.load as load
from fourfold.distributed import load_sharded, shard
job = Job(dist.get_rank(), dist.get_world_size(), Path(sys.argv[1]), "cpu")
folder = checks.checkpoint(job, "qwen3_moe")
config = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4")

def die(*_, **__):
    (Path(sys.argv[1]) / "died").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
"""
IN_TRAINING = """
model = shard(checks.adapted(checks.load(folder, checks.NF4, "cpu")))
checks.train(model, job, alone=False, steps=2)
if job.rank == 1:
    die()
checks.train(model, job, alone=False, steps=2)
"""
IN_LOADING = """
if job.rank == 1:
    load._ShardedStream._keep = die
load_sharded(folder, quantization_config=config, device="cpu")
"""
SHORT = """
def keep(*_, **__):
    torch.empty(2**60, dtype=torch.uint8)  # (more than there is)

if job.rank == 1:
    load._ShardedStream._keep = keep
load_sharded(folder, quantization_config=config, device="cpu")
"""


def launch(script: Path, arguments: list[str], machines: int) -> list[tuple[int, str]]:
    """Exit status and messages of each launch agent; together they start two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(2 // machines)]
    if machines == 1:
        command += ["--standalone"]
    else:  # both alike, as on two machines: who comes first waits for the other
        where = f"127.0.0.1:{free_port()}"
        command += ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", where, "--rdzv_id", "job"]
    agents = [
        subprocess.Popen(
            [*command, str(script), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(machines)
    ]
    try:
        said = [agent.communicate(timeout=200)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, text) for agent, text in zip(agents, said, strict=True)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(tmp_path: Path, program: str, machines: int) -> list[tuple[int, str]]:
    script = tmp_path / "program.py"
    script.write_text(BEGIN + program)
    (tmp_path / "shared").mkdir()
    return launch(script, [str(tmp_path), str(Path(sharded_checks.__file__).parent)], machines)


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("program", [IN_TRAINING, IN_LOADING], ids=["training", "loading"])
def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path, program: str, machines: int) -> None:
    """At once, on every machine, and with the rank's number."""
    ended = launched(tmp_path, program, machines)
    took = time.time() - float((tmp_path / "died").read_text())
    assert all(status != 0 for status, _ in ended), ended
    said = "\n".join(text for _, text in ended)
    assert re.search(r"rank +: 1 ", said), said[-3000:]
    assert "SIGKILL" in said
    assert took < SECONDS
    if machines == 2:  # the agent of the other machine cannot know; its rank noticed by itself
        (other,) = [text for _, text in ended if "SIGKILL" not in text]
        assert re.search(r"rank +: 0 ", other), other[-3000:]
        word = "another rank ended or does not answer" if program == IN_LOADING else "onnection"
        assert word in other, other[-3000:]


def test_a_rank_out_of_memory_is_named(tmp_path: Path) -> None:
    """By every rank, the one with room included; an allocation that no machine can serve."""
    ((status, said),) = launched(tmp_path, SHORT, 1)
    assert status != 0
    assert "was not loaded: rank 1 ran out of memory (RuntimeError" in said, said[-3000:]


@pytest.mark.parametrize("machines", [1, 2])
def test_the_program_of_the_docs(tmp_path: Path, machines: int) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
    program = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[0]
    script = tmp_path / "train.py"
    script.write_text(program)
    tiny.save(tiny.qwen3_moe(), tmp_path / "model")
    ended = launch(script, [str(tmp_path / "model"), str(tmp_path / "out")], machines)
    assert [status for status, _ in ended] == [0] * machines, ended[0][1][-3000:]
    assert (tmp_path / "out" / "checkpoint" / "checkpoint.json").is_file()
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in stored.values())
    assert len(stored) == 2 * 2 * 4


def test_the_program_with_experts_on_ranks(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
    _, program = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert "ep_size" in program
    script = tmp_path / "train.py"
    script.write_text(program)
    tiny.save(tiny.qwen3_moe(), tmp_path / "model")
    ((status, said),) = launch(script, [str(tmp_path / "model"), str(tmp_path / "out")], 1)
    assert status == 0, said[-3000:]
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in stored.values())
    assert len(stored) == 2 * 2 * 4
