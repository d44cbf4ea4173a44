"""What contradicts FSDP (`fsdp_keys`) in other keys. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fourfold.training.fsdp_keys import asked_of_fsdp, fsdp_problems, is_off
from fourfold.training.yaml_file import Problem

# Their 8-bit state is in blocks of the whole tensor, or paged by the driver.
UNSHARDED = ("adamw_8bit", "adamw_bnb_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")
RECOMPUTED = "activation_checkpointing"
TWICE = "beside gradient_checkpointing, which recomputes the same: that one is used, once; the same results"


def card_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong in them, and what they contradict."""
    yield from fsdp_problems(values)
    sharded = asked_of_fsdp(values)
    if not is_off(values.get("deepspeed")) and sharded:
        yield Problem("deepspeed", "given beside FSDP", "Keep one of the two.")
    yield from _fsdp_contradictions(values, sharded)


def _fsdp_contradictions(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Problem]:
    """What FSDP cannot shard."""
    if not given:
        return
    optimizer = values.get("optimizer")
    if isinstance(optimizer, str) and (optimizer in UNSHARDED or optimizer.startswith("paged_")):
        what = f"{optimizer} keeps its state in a form that FSDP cannot shard"
        yield Problem("optimizer", what, "Write adamw_torch_8bit, or adamw_torch_fused.")


def given_differently(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what happens instead) of those whose work another key does already."""
    config = asked_of_fsdp(values).get("fsdp_config")
    if isinstance(config, Mapping) and values.get("gradient_checkpointing"):
        for name in (RECOMPUTED, f"fsdp_{RECOMPUTED}"):
            if config.get(name) is True:
                yield f"fsdp_config.{name}", TWICE
