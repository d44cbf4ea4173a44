"""What ranks of a job check of experts in host memory: each brings its own."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fourfold
from fourfold.distributed.replicas import replicate
from fourfold.distributed.sharding import shard
from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts
from ranks import Job
from sharded_models import CASES, adapted, checkpoint, compared, load, train, trained

CASE = next(iter(CASES))


def ddp(job: Job, kind: str) -> dict[str, Any]:
    """DDP over streamed experts against one process with resident ones."""
    model_kind, settings, _ = CASES[CASE]
    folder = checkpoint(job, model_kind)
    alone = adapted(load(folder, settings, job.device), "")
    begun = trained(alone)
    wanted = train(alone, job, alone=True, accumulation=1)
    inner = adapted(load(folder, settings, job.device), "", seed=job.rank)
    report = fourfold.offload(inner, buffers=1)
    model = replicate(inner) if kind == "replicate" else DistributedDataParallel(inner)
    losses = train(model, job, alone=False, accumulation=1)
    fills = report.counts()["fills"]
    return compared(alone, inner, wanted, losses, begun) | {"fills": fills, "streamed": len(report.streamed)}


def shards(job: Job) -> dict[str, str]:
    """Shards and whole modules in host memory exclude each other, whichever comes first."""
    model_kind, settings, _ = CASES[CASE]
    folder = checkpoint(job, model_kind)
    found = {}

    def refused(name: str, act: Any) -> None:
        try:
            act()
        except ConfigurationError as error:
            found[name] = str(error)

    model = load(folder, settings, job.device)
    fourfold.offload(model)
    refused("offloaded, then sharded", lambda: shard(model))
    fourfold.onload(model)
    shard(model)
    refused("sharded, then offloaded", lambda: fourfold.offload(model))
    other = load(folder, settings, job.device)
    fourfold.offload(other)
    module = next(m for m in other.modules() if isinstance(m, PackedExperts))
    fully_shard(module)
    # (called past the hooks that gather, as code that calls experts by itself does)
    host: Any = module.fourfold_host
    refused("sharded by another hand", lambda: host.hold(host.device))
    return found
