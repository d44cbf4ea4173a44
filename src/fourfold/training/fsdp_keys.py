"""Keys of a model that is sharded over several processes by FSDP2, as axolotl writes them.

What they come to is a `Sharding`. A setting that FSDP2 has no use for and that changes no number is taken,
and said; one that would change something and is not done is refused by name. Imports neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fourfold.training.key_types import Strict
from fourfold.training.yaml_file import Problem, nearest, short

if TYPE_CHECKING:
    from fourfold.training.schema import TrainConfig

FSDP: dict[str, tuple[str, tuple[type, ...]]] = {
    "fsdp": ("options of FSDP, a list of texts", (list, str)),
    "fsdp_config": ("a mapping of FSDP's settings", (Mapping,)),
    "fsdp_version": ("2", (int,)),
    "fsdp_final_state_dict_type": ("FULL_STATE_DICT or SHARDED_STATE_DICT", (str,)),
}
OFF: tuple[Any, ...] = (None, False, "", [], {})
# Settings of fsdp_config that are followed; each may begin with fsdp_ too.
_SWITCHES = ("offload_params", "reshard_after_forward", "activation_checkpointing")
# Setting -> values that are taken (None: any switch), and what is done whatever they say.
_ANYWAY: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "cpu_ram_efficient_loading": (None, "each process reads and packs its own share only"),
    "sync_module_states": (None, "adapters begin alike on all processes"),
    "use_orig_params": (None, "FSDP2 has no other parameters than the model's own"),
    "limit_all_gathers": (None, "FSDP2 needs no limit"),
    "backward_prefetch": (("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"), "FSDP2 fetches ahead by itself"),
    "state_dict_type": (
        ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
        "checkpoints are sharded, with the whole adapter beside",
    ),
    "final_state_dict_type": (("FULL_STATE_DICT", "SHARDED_STATE_DICT"), "the adapter is saved whole"),
}
_OTHERS = (
    "version",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
    "sharding_strategy",
    "forward_prefetch",
    "mixed_precision_policy",
)
FSDP_SETTINGS = (*_SWITCHES, *_ANYWAY, *_OTHERS, "backward_prefetch_policy")
_STRATEGIES = {"FULL_SHARD": True, "SHARD_GRAD_OP": False, "1": True, "2": False}


class FsdpKeys(Strict):
    """The model sharded over the processes of the run (torchrun, accelerate launch)."""

    fsdp_version: int | None = Field(
        None, description="2: weights, adapters and optimizer sharded over the run's processes by FSDP2"
    )
    fsdp_config: dict[str, Any] | None = Field(
        None,
        description="a mapping of FSDP2's settings: offload_params, reshard_after_forward, "
        "activation_checkpointing, transformer_layer_cls_to_wrap, ... (docs/distributed.md)",
    )
    fsdp: list[str] | str | None = Field(
        None, description="older way to write them: full_shard or shard_grad_op, auto_wrap, offload"
    )
    fsdp_final_state_dict_type: str | None = Field(
        None, description="FULL_STATE_DICT or SHARDED_STATE_DICT: the adapter is saved whole either way"
    )


@dataclass
class Sharding:
    """How a model is sharded.

    Attributes:
        reshard_after_forward: let a layer go between its forward and its backward.
        offload: keep shards, adapters and optimizer in CPU memory.
        activation_checkpointing: recompute each layer in backward.
        layers: classes of layers as the file names them; they have to be those that the model has.
    """

    reshard_after_forward: bool = True
    offload: bool = False
    activation_checkpointing: bool = False
    layers: list[str] = field(default_factory=list)


def is_off(value: Any) -> bool:
    """Whether a key of FSDP asks for nothing."""
    return any(type(value) is type(off) and value == off for off in OFF)


def asked_of_fsdp(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keys that ask for something."""
    return {key: values[key] for key in FSDP if key in values and not is_off(values[key])}


def sharding(config: TrainConfig) -> Sharding | None:
    """How the run's model is sharded; None where each process holds all of it."""
    given = _given(config)
    return _read(given)[0] if given else None


def recomputes(config: TrainConfig) -> bool:
    """Whether layers are computed again in backward, by whichever key."""
    wanted = sharding(config)
    return bool(config.gradient_checkpointing) or (wanted is not None and wanted.activation_checkpointing)


def _given(config: TrainConfig) -> dict[str, Any]:
    return asked_of_fsdp(
        {
            "fsdp": config.fsdp,
            "fsdp_config": config.fsdp_config,
            "fsdp_version": config.fsdp_version,
            "fsdp_final_state_dict_type": config.fsdp_final_state_dict_type,
        }
    )


def fsdp_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong in the keys themselves."""
    given = asked_of_fsdp(values)
    sound = dict(given)
    for key, value in given.items():
        what, kinds = FSDP[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            yield Problem(key, f"a {type(value).__name__} is none of its values", f"Give {what}.")
            del sound[key]
    yield from _read(sound)[1]


def fsdp_instead(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is done whatever it says) of settings that change no number."""
    given = asked_of_fsdp(values)
    for name, value in _settings(given).items():
        if name in _ANYWAY and value is not None:
            yield _where(given), f"{name}: {_ANYWAY[name][1]}"


def _where(given: Mapping[str, Any]) -> str:
    return next((key for key in ("fsdp_config", "fsdp_version", "fsdp") if key in given), "fsdp_config")


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """`fsdp_config` by its short names."""
    config = given.get("fsdp_config")
    found: dict[str, Any] = {}
    for name, value in config.items() if isinstance(config, Mapping) else ():
        short_name = name.removeprefix("fsdp_") if isinstance(name, str) else name
        found["backward_prefetch" if short_name == "backward_prefetch_policy" else short_name] = value
    return found


def _read(given: Mapping[str, Any]) -> tuple[Sharding, list[Problem]]:
    """What the keys come to, and what is wrong in them."""
    result, problems = Sharding(), []
    where = _where(given)

    def wrong(key: str, what: str, remedy: str) -> None:
        problems.append(Problem(key, what, remedy))

    settings = _settings(given)
    for name, value in settings.items():
        key = f"{where}.{short(str(name))}"
        if name not in FSDP_SETTINGS:
            wrong(key, "unknown setting", nearest(str(name), FSDP_SETTINGS))
        elif value is None:
            continue
        elif name in _SWITCHES or (name in _ANYWAY and _ANYWAY[name][0] is None):
            if not isinstance(value, bool):
                wrong(key, f"{short(str(value))} is neither true nor false", "Give one of the two.")
        elif name in _ANYWAY:
            wanted = _ANYWAY[name][0] or ()
            if str(value).upper() not in wanted:
                wrong(key, f"{short(str(value))} is none of its values", f"Give {' or '.join(wanted)}.")
    for key, value in (("fsdp_version", given.get("fsdp_version")), (where, settings.get("version"))):
        if value is not None and (value != 2 or isinstance(value, bool)):
            what = f"{short(str(value))}, which flattens parameters of one type; packed ones are bytes"
            wrong(key, what, "Set fsdp_version: 2.")
            break
    final = given.get("fsdp_final_state_dict_type")
    if final is not None and str(final).upper() not in (_ANYWAY["final_state_dict_type"][0] or ()):
        wrong(
            "fsdp_final_state_dict_type",
            f"{short(str(final))} is none of its values",
            "Give FULL_STATE_DICT.",
        )
    for text in _words(given.get("fsdp")):
        name = text.lower()
        if name in ("full_shard", "shard_grad_op"):
            result.reshard_after_forward = name == "full_shard"
        elif name == "offload":
            result.offload = True
        elif name != "auto_wrap":
            known = ("full_shard", "shard_grad_op", "offload", "auto_wrap")
            wrong("fsdp", f"{short(text)} is not done", f"Give {', '.join(known)}.")
    _follow(settings, result, where, wrong)
    return result, problems


def _words(value: Any) -> list[str]:
    return [str(word) for word in (value.split() if isinstance(value, str) else value or ())]


def _follow(settings: Mapping[str, Any], result: Sharding, where: str, wrong: Any) -> None:
    """Settings that decide something."""
    strategy, reshard = settings.get("sharding_strategy"), settings.get("reshard_after_forward")
    if strategy is not None:
        wanted = _STRATEGIES.get(str(strategy).upper())
        if wanted is None:
            remedy = "Give FULL_SHARD or SHARD_GRAD_OP, or reshard_after_forward."
            wrong(f"{where}.sharding_strategy", f"{short(str(strategy))} is not done", remedy)
        elif isinstance(reshard, bool) and reshard is not wanted:
            wrong(
                f"{where}.sharding_strategy",
                f"{short(str(strategy))} contradicts reshard_after_forward: {str(reshard).lower()}",
                "Keep reshard_after_forward.",
            )
        else:
            result.reshard_after_forward = wanted
    if isinstance(reshard, bool):
        result.reshard_after_forward = reshard
    result.offload = settings.get("offload_params") is True or result.offload
    result.activation_checkpointing = settings.get("activation_checkpointing") is True
    policy = settings.get("auto_wrap_policy")
    if policy is not None and str(policy).upper() != "TRANSFORMER_BASED_WRAP":
        what = f"{short(str(policy))}, and a packed model is sharded layer by layer"
        wrong(f"{where}.auto_wrap_policy", what, "Give TRANSFORMER_BASED_WRAP, or drop it.")
    if settings.get("min_num_params"):
        what = "a packed model is sharded layer by layer, whatever their size"
        wrong(f"{where}.min_num_params", what, "Drop it.")
    layers = settings.get("transformer_layer_cls_to_wrap")
    if isinstance(layers, (str, list)):
        texts = layers.split(",") if isinstance(layers, str) else layers
        result.layers = [str(text).strip() for text in texts]
    elif layers is not None:
        what = f"a {type(layers).__name__} is none of its values"
        wrong(f"{where}.transformer_layer_cls_to_wrap", what, "Give the name of a class.")
    if settings.get("forward_prefetch"):
        wrong(f"{where}.forward_prefetch", "is FSDP1's; FSDP2 fetches ahead by itself", "Drop it.")
    if settings.get("mixed_precision_policy"):
        what = "packed bytes are never cast, and the rest computes in the run's number format"
        wrong(f"{where}.mixed_precision_policy", what, "Drop it, and set bf16 or fp16.")


def fsdp_contradictions(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """What does not go together with a sharded model."""
    given = _given(config)
    if not given:
        return
    where = _where(given)

    def found(key: str, what: str, remedy: str) -> tuple[tuple[str, ...], Problem]:
        return (key, *given), Problem(key, what, remedy)

    if list(given) == ["fsdp_final_state_dict_type"]:
        remedy = "Set fsdp_version: 2 to shard the model, or drop it."
        yield found("fsdp_final_state_dict_type", "has no effect on a model that is not sharded", remedy)
        return
    for problem in _read(given)[1]:  # (of a file they have been said already; it is read without them then)
        yield tuple(given), problem
    if not config.quantized:
        remedy = "Set load_in_4bit: true or load_in_8bit: true, or drop this key."
        yield found(where, "shards packed models, and this one is held in high precision", remedy)
    if config.experts_offload is not None:
        remedy = "Drop experts_offload; fsdp_config: {offload_params: true} keeps shards in CPU memory."
        yield found("experts_offload", "whole experts in host memory contradict shards (fsdp_config)", remedy)
    if config.peft_init_lora_weights == "loftq":
        what = "loftq needs each expert whole, of which a process holds a share (fsdp_config)"
        yield found("peft_init_lora_weights", what, "Drop it, or the keys of FSDP.")
    if config.torch_compile is True:
        what = "true is not done for a model that FSDP shards"
        yield found("torch_compile", what, "Set it to false, or to auto.")
    if config.fp16:
        what = "true is not done for a model that FSDP shards: its scaler looks at a process's own shards"
        yield found("fp16", what, "Set bf16: true.")
