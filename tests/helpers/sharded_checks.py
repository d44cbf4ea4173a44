"""What is checked on several ranks, and in which runs; the functions run in each of them (`ranks.run`)."""

from __future__ import annotations

from sharded_loading import foreign, loaded, peak, read_share
from sharded_memory import anonymous_peak, planned_peak, planned_shares
from sharded_models import CASES, NF4, STEPS, adapted, checkpoint, equal, load, train
from sharded_refusals import one_rank_fails, other_weights, refusals
from sharded_saving import merged, resumed, saved_adapter, saved_packed
from sharded_training import (
    bf16,
    ddp,
    every_way,
    fsdp,
    generated,
    int8_linears,
    mixed_precision,
    packing_matters,
    replicas_of_shards,
    sent_by_ddp,
)

# What the default run does, on two ranks: of loading one of each kind (the run with four does all).
REPLICATED = ("nf4", "fp4", "interleaved", "int8", "flattened", "packed_rows")
LOADED = (
    *("nf4:plain", "nf4:packed", "nf4_uneven:plain", "nf4_uneven:packed"),
    *("tied:packed", "interleaved:packed", "int8:plain", "latent:plain"),
    *("own_forward:plain", "modules:packed", "flattened:plain"),
)
OTHERS = (
    *(
        "packing_matters",
        "int8_linears",
        "mixed_precision",
        "sent_by_ddp",
        "other_weights",
        "read_share:plain",
        "read_share:packed",
    ),
    *("foreign", "generated", "saved_adapter", "merged", "resumed"),
    *(
        "saved_packed:nf4",
        "saved_packed:int8",
        "saved_packed:tied",
        "refusals",
        "one_rank_fails",
    ),
)
CHECKS = (
    *(f"fsdp:{case}" for case in CASES),
    *(f"ddp:{case}" for case in REPLICATED),
    *(f"loaded:{case}" for case in LOADED),
    *(f"planned_shares:{case}" for case in CASES),
    *OTHERS,
)
# Anonymous memory is the shard's only where shards lie on the CPU.
CPU_ONLY = ("anonymous_peak",)

__all__ = [
    "CASES",
    "CHECKS",
    "CPU_ONLY",
    "LOADED",
    "NF4",
    "REPLICATED",
    "STEPS",
    "adapted",
    "anonymous_peak",
    "bf16",
    "checkpoint",
    "ddp",
    "equal",
    "every_way",
    "foreign",
    "fsdp",
    "generated",
    "int8_linears",
    "load",
    "loaded",
    "merged",
    "mixed_precision",
    "one_rank_fails",
    "other_weights",
    "packing_matters",
    "peak",
    "planned_peak",
    "planned_shares",
    "read_share",
    "refusals",
    "replicas_of_shards",
    "resumed",
    "saved_adapter",
    "saved_packed",
    "sent_by_ddp",
    "train",
]
