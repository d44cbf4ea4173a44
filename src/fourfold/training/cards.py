"""Keys of DeepSpeed: accepted, refused by name when a run starts; and what contradicts FSDP (`fsdp_keys`).

`fourfold validate` takes a file with them, so that an editor and a look at the rest of the file work; `train`
does not begin. What contradicts itself in them is an error at once. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fourfold.training.fsdp_keys import asked_of_fsdp, fsdp_problems, is_off
from fourfold.training.yaml_file import Problem

# Key -> what it is; a null or one of OFF asks for nothing.
CARDS: dict[str, str] = {
    "deepspeed": "the path of a DeepSpeed configuration, or a mapping",
}
KINDS: dict[str, tuple[type, ...]] = {
    "deepspeed": (str, Mapping),
}
# Their 8-bit state is in blocks of the whole tensor, or paged by the driver.
UNSHARDED = ("adamw_8bit", "adamw_bnb_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")
RECOMPUTED = "activation_checkpointing"
TWICE = "beside gradient_checkpointing, which recomputes the same: that one is used, once; the same results"
WHAT = "a model sharded over several cards"
REMEDY = (
    "Drop the key; `torchrun --nproc_per_node N -m fourfold train` gives each card the whole packed model."
)


def asked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keys that ask for something."""
    return {key: values[key] for key in CARDS if key in values and not is_off(values[key])}


def refusals(values: Mapping[str, Any]) -> list[Problem]:
    """What `train` says of them."""
    return [Problem(key, WHAT, REMEDY, not_yet=True) for key in asked(values)]


def card_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong in them, and what they contradict."""
    given = asked(values)
    for key, value in given.items():
        if not isinstance(value, KINDS[key]) or isinstance(value, bool):
            yield Problem(key, f"a {type(value).__name__} is none of its values", f"Give {CARDS[key]}.")
    yield from fsdp_problems(values)
    sharded = asked_of_fsdp(values)
    if "deepspeed" in given and sharded:
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
