"""Keys of models sharded over several cards: accepted, and refused by name when a run starts.

`fourfold validate` takes a file with them, so that an editor and a look at the rest of the file work; `train`
does not begin. What contradicts itself in them is an error at once. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fourfold.training.yaml_file import Problem, nearest, short

# Key -> what it is; a null or one of OFF asks for nothing.
CARDS: dict[str, str] = {
    "fsdp": "options of FSDP, a list of texts",
    "fsdp_config": "a mapping of FSDP's settings",
    "fsdp_version": "1 or 2",
    "fsdp_final_state_dict_type": "how FSDP saves a state at the end",
    "deepspeed": "the path of a DeepSpeed configuration, or a mapping",
}
KINDS: dict[str, tuple[type, ...]] = {
    "fsdp": (list, str),
    "fsdp_config": (Mapping,),
    "fsdp_version": (int,),
    "fsdp_final_state_dict_type": (str,),
    "deepspeed": (str, Mapping),
}
OFF: tuple[Any, ...] = (None, False, "", [], {})
# Of fsdp_config; each may begin with fsdp_ too.
FSDP_SETTINGS = (
    "version",
    "offload_params",
    "cpu_ram_efficient_loading",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
    "state_dict_type",
    "final_state_dict_type",
    "sharding_strategy",
    "reshard_after_forward",
    "activation_checkpointing",
    "sync_module_states",
    "use_orig_params",
    "backward_prefetch",
    "backward_prefetch_policy",
    "forward_prefetch",
    "limit_all_gathers",
    "mixed_precision_policy",
)
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
    return {key: values[key] for key in CARDS if key in values and not _is_off(values[key])}


def refusals(values: Mapping[str, Any]) -> list[Problem]:
    """What `train` says of them."""
    return [Problem(key, WHAT, REMEDY, not_yet=True) for key in asked(values)]


def card_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong in them, and what they contradict."""
    given = asked(values)
    for key, value in given.items():
        if not isinstance(value, KINDS[key]) or isinstance(value, bool):
            yield Problem(key, f"a {type(value).__name__} is none of its values", f"Give {CARDS[key]}.")
    config = given.get("fsdp_config")
    config = config if isinstance(config, Mapping) else {}
    for name in config:
        if not isinstance(name, str) or name.removeprefix("fsdp_") not in FSDP_SETTINGS:
            remedy = nearest(str(name), FSDP_SETTINGS)
            yield Problem(f"fsdp_config.{short(str(name))}", "unknown setting", remedy)
    if "deepspeed" in given and ("fsdp" in given or config):
        yield Problem("deepspeed", "given beside FSDP", "Keep one of the two.")
    yield from _fsdp_contradictions(values, given, config)


def _fsdp_contradictions(
    values: Mapping[str, Any], given: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[Problem]:
    """What FSDP cannot shard."""
    where = next((key for key in ("fsdp_version", "fsdp_config", "fsdp") if key in given), None)
    if where is None:
        return
    versions = [given.get("fsdp_version"), config.get("fsdp_version"), config.get("version")]
    named = [version for version in versions if version is not None]
    if values.get("load_in_4bit") is True and any(version == 1 and version is not True for version in named):
        what = f"{short(str(named[0]))}, which flattens parameters of one type; packed ones are bytes"
        yield Problem(where, what, "Set fsdp_version: 2.")
    optimizer = values.get("optimizer")
    if isinstance(optimizer, str) and (optimizer in UNSHARDED or optimizer.startswith("paged_")):
        what = f"{optimizer} keeps its state in a form that FSDP cannot shard"
        yield Problem("optimizer", what, "Write adamw_torch_8bit, or adamw_torch_fused.")


def given_differently(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what happens instead) of those whose work another key does already."""
    config = asked(values).get("fsdp_config")
    if isinstance(config, Mapping) and values.get("gradient_checkpointing"):
        for name in (RECOMPUTED, f"fsdp_{RECOMPUTED}"):
            if config.get(name) is True:
                yield f"fsdp_config.{name}", TWICE


def _is_off(value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in OFF)
