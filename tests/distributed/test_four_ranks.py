"""Four ranks: every kind loaded in shards, more ranks than shares, replicas of shards; and ranks that die."""

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

import ranks
import sharded_checks
import tiny
from sharded_checks import CASES

pytestmark = [pytest.mark.slow]
LOADED = [f"{case}:{stored}" for case in CASES for stored in ("plain", "packed")]
TRAINED = ("nf4", "nf4_uneven", "int8", "flattened")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    checks = [f"fsdp:{case}" for case in TRAINED] + [f"loaded:{case}" for case in LOADED]
    checks += ["replicas_of_shards", "saved_adapter", "resumed", "saved_packed:nf4", "merged", "every_way"]
    ranks.run("sharded_checks", checks, folder, 4, 900)
    return folder


@pytest.mark.parametrize("case", TRAINED)
def test_fsdp_equals_one_process(job: Path, case: str) -> None:
    sharded_checks.equal(ranks.outcome(job, f"fsdp:{case}"))


@pytest.mark.parametrize("case", LOADED)
def test_loaded_in_shards_is_the_model_and_trains_as_it(job: Path, case: str) -> None:
    sharded_checks.equal(ranks.outcome(job, f"loaded:{case}"))


def test_replicas_of_shards_equal_one_process(job: Path) -> None:
    sharded_checks.equal(ranks.outcome(job, "replicas_of_shards"))


@pytest.mark.parametrize("check", ["saved_adapter", "saved_packed:nf4"])
def test_saved_on_four_ranks(job: Path, check: str) -> None:
    assert len(ranks.outcome(job, check)) == 4


def test_resumed_on_four_ranks_and_in_one_process(job: Path) -> None:
    for found in ranks.outcome(job, "resumed"):
        assert found["sharded"] == 0
        assert found["alone"] < 1e-5
        assert found["wider"] < 1e-5


def test_every_combination_of_ways_equals_one_process(job: Path) -> None:
    for found in ranks.outcome(job, "every_way"):
        assert len(found) == 48
        sharded_checks.equal(list(found.values()))


@pytest.mark.parametrize("way", ["let_go", "stay"])
def test_the_peak_of_training_is_as_planned(tmp_path: Path, way: str) -> None:
    """All storages that live at a time, on two ranks."""
    ranks.run("sharded_checks", [f"planned_peak:{way}"], tmp_path, 2, 300)
    for found in ranks.outcome(tmp_path, f"planned_peak:{way}"):
        assert found["resident"] < 0.35 * found["counted"]
        assert found["counted"] <= found["planned"] < 1.03 * found["counted"], found


DYING = """
import datetime, os, signal, sys
sys.path.insert(0, sys.argv[2])
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
from pathlib import Path
from ranks import Job
import sharded_checks as checks
from fourfold.distributed import shard
job = Job(dist.get_rank(), dist.get_world_size(), Path(sys.argv[1]), "cpu")
model = shard(checks.adapted(checks.load(checks.checkpoint(job, "qwen3_moe"), checks.NF4, "cpu")))
checks.train(model, job, alone=False, steps=2)
if job.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
checks.train(model, job, alone=False, steps=2)
"""


def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    """Under ``torchrun``: at once, and with the rank's name."""
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    (tmp_path / "shared").mkdir()
    helpers = Path(sharded_checks.__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, str(script), str(tmp_path), str(helpers)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert "rank      : 1" in done.stderr
    assert "SIGKILL" in done.stderr
    assert time.monotonic() - started < 120


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("machines", [1, 2])
def test_the_program_of_the_docs(tmp_path: Path, machines: int) -> None:
    """Two ranks, started by one agent; and by two, as on two machines."""
    page = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    script = tmp_path / "train.py"
    script.write_text(program)
    tiny.save(tiny.qwen3_moe(), tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(2 // machines)]
    if machines == 1:
        command += ["--standalone"]
    else:
        command += ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    agents = [
        subprocess.Popen(
            [
                *command,
                *(["--node_rank", str(machine)] if machines > 1 else []),
                *(str(script), str(tmp_path / "model"), str(tmp_path / "out")),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for machine in range(machines)
    ]
    try:
        said = [agent.communicate(timeout=200)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * machines, said[0][-3000:]
    assert (tmp_path / "out" / "checkpoint" / "checkpoint.json").is_file()
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in stored.values())
    assert len(stored) == 2 * 2 * 4
