"""Several processes of one job on this machine, for tests: a list of checks runs in all of them at once."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WAIT = datetime.timedelta(seconds=90)  # after which a collective that one rank never joined is an error


def run(
    module: str, checks: list[str], folder: Path, world: int, limit: float, backend: str = "gloo"
) -> None:
    """Run ``module.check(job)`` for every name in ``checks``, in that order, on ``world`` ranks.

    What each check returned or raised is left in ``folder`` (`outcome`). The first that fails on any rank
    ends the job, and so does the time limit in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.spawn(_rank, (module, checks, str(folder), world, backend), nprocs=world, join=False)
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                (folder / "ended").write_text(f"not done after {limit} s")
                return
    except Exception as error:  # (of a rank; written down by itself, if it was Python's)
        (folder / "ended").write_text(str(error)[-4000:])
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()


def outcome(folder: Path, check: str) -> list[Any]:
    """What a check returned, by rank.

    Raises:
        AssertionError: it failed on a rank, or the job ended before it.
    """
    results = []
    for file in sorted(folder.glob(f"{check.replace(':', '-')}.rank*.json")):
        stored = json.loads(file.read_text())
        if "failure" in stored:
            raise AssertionError(f"{file.stem}:\n{stored['failure']}")
        results.append(stored["result"])
    world = int((folder / "world").read_text()) if (folder / "world").exists() else -1
    if len(results) != world or not results:
        ended = (folder / "ended").read_text() if (folder / "ended").exists() else "no rank began"
        raise AssertionError(f"{check} was not reached, or not finished, on every rank: {ended}")
    return results


class Job:
    """What a check is given: its rank, and where it may leave things."""

    def __init__(self, rank: int, world: int, folder: Path, device: str) -> None:
        self.rank, self.world, self.folder, self.device = rank, world, folder, device

    def shared(self, name: str) -> Path:
        """A path that all ranks see; rank 0 makes what lies there, and `wait` lets others see it."""
        return self.folder / "shared" / name

    @staticmethod
    def wait() -> None:
        dist.barrier()


def _rank(rank: int, module: str, checks: list[str], folder: str, world: int, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    place = Path(folder)
    (place / "shared").mkdir(exist_ok=True)
    if rank == 0:
        (place / "world").write_text(str(world))
    device = "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    dist.init_process_group(
        backend,
        init_method=f"file://{place / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=WAIT,
        device_id=torch.device(device) if backend == "nccl" else None,
    )
    job = Job(rank, world, place, device)
    functions = importlib.import_module(module)
    for check in checks:
        name, _, argument = check.partition(":")
        started = time.monotonic()
        file = place / f"{check.replace(':', '-')}.rank{rank}.json"
        try:
            torch.manual_seed(0)
            result = getattr(functions, name)(job, *argument.split(":") if argument else ())
        except BaseException:
            file.write_text(json.dumps({"failure": traceback.format_exc()}))
            raise
        file.write_text(json.dumps({"result": result, "seconds": time.monotonic() - started}))
    dist.destroy_process_group()
