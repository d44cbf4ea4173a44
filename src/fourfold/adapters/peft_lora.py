"""Adding LoRA, loading adapters, and checking targets before anything slow happens."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from fourfold.adapters import provenance
from fourfold.adapters.patch import install, install_provenance
from fourfold.errors import AdapterError
from fourfold.experts import find_experts
from fourfold.experts.layout import clean_name, name_suffix

install()
install_provenance()


# What PEFT has LoRA layers for.
_WRAPPABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def _nearest(target: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(target, known, n=3, cutoff=0.4)
    shown = close or list(known)[:6]
    return f"{'nearest are' if close else 'there are'} {', '.join(shown)}" if shown else "there are none"


def check_targets(
    model: nn.Module, target_modules: Sequence[str] | str | None, target_parameters: Sequence[str] | None
) -> None:
    """Every target must match something; PEFT is content when any one of them does.

    Args:
        model: loaded or on the meta device.
        target_modules: suffixes of module names, or one regular expression.
        target_parameters: suffixes of parameter names.

    Raises:
        AdapterError: naming the target that matches nothing, and the nearest names that exist.
    """
    modules = [clean_name(n) for n, m in model.named_modules() if n and not list(m.children())]
    wrappable = [clean_name(n) for n, m in model.named_modules() if isinstance(m, _WRAPPABLE)]
    if isinstance(target_modules, str):
        if target_modules != "all-linear" and not any(re.fullmatch(target_modules, name) for name in modules):
            raise AdapterError(f"target_modules={target_modules!r} (a regular expression) matches no module")
        target_modules = None
    for target in target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in wrappable))
            raise AdapterError(f"target_modules: {target!r} matches no module; {_nearest(target, leaves)}")
        hits = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not any(name in wrappable for name in hits):
            leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in wrappable))
            kind = type(model.get_submodule(hits[0])).__name__
            raise AdapterError(
                f"target_modules: {target!r} names {hits[0]}, a {kind}, which LoRA cannot wrap; "
                f"{_nearest(target, leaves)}"
            )
    _check_target_parameters(model, target_parameters or ())


def _check_target_parameters(model: nn.Module, targets: Sequence[str]) -> None:
    """Each must be a fused parameter of experts, or a matrix that no module wrapper takes (a router's)."""
    experts = list(find_experts(model))
    known = list(dict.fromkeys(name_suffix(t) for e in experts if e.layout for t in e.tensors()))
    fused = {t for e in experts for t in e.tensors()}
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    in_modules = {f"{clean_name(n)}.weight" for n, m in model.named_modules() if isinstance(m, _WRAPPABLE)}

    def is_matrix(name: str) -> bool:
        parameter = parameters[name]
        return name not in in_modules and parameter.ndim in (2, 3) and parameter.is_floating_point()

    for target in targets:
        hits = [name for name in parameters if name == target or name.endswith(f".{target}")]
        if not hits and not experts:
            raise AdapterError(
                f"target_parameters: {target!r} matches nothing, for {type(model).__name__} is dense: "
                "it has no fused experts. Leave target_parameters out"
            )
        if not hits:
            near = _nearest(target, known)
            raise AdapterError(f"target_parameters: {target!r} matches no parameter; {near}")
        unfit = [name for name in hits if name not in fused and not is_matrix(name)]
        if unfit:
            raise AdapterError(
                f"target_parameters: {target!r} names {unfit[0]}, which LoRA cannot wrap as a parameter; "
                f"{_nearest(target, known)}. Linears belong into target_modules"
            )


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    target_modules: Sequence[str] | str | None,
    target_parameters: Sequence[str] | None,
    dropout: float = 0.0,
    **lora_arguments: Any,
) -> PeftModel:
    """An ordinary `get_peft_model`, with every target checked first.

    Args:
        model: after `fourfold.prepare`.
        r: rank.
        alpha: LoRA's alpha; the update is scaled by ``alpha / r``.
        target_modules: as in `LoraConfig`; None targets no module.
        target_parameters: as in `LoraConfig`; see `fourfold.expert_targets`.
        dropout: on target modules; not offered on expert parameters.
        lora_arguments: anything else that `LoraConfig` takes.

    Raises:
        AdapterError: a target matches nothing, or a setting has no meaning for expert parameters.
    """
    check_targets(model, target_modules, target_parameters)
    if dropout and target_parameters:
        raise AdapterError(
            "lora_dropout is not offered on expert parameters; set it to 0 or target modules only"
        )
    if not target_modules and not target_parameters:
        raise AdapterError("neither target_modules nor target_parameters is set, so LoRA would train nothing")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules or []),
        target_parameters=list(target_parameters) if target_parameters else None,
        task_type="CAUSAL_LM",
        **lora_arguments,
    )
    patterns = {**config.rank_pattern, **config.alpha_pattern}
    with _applied_patterns_are_not_called_ignored(model, patterns, config.target_parameters):
        return get_peft_model(model, config)


@contextlib.contextmanager
def _applied_patterns_are_not_called_ignored(
    model: nn.Module, patterns: Iterable[str], target_parameters: Sequence[str] | None
) -> Iterator[None]:
    """PEFT looks for the keys of rank_pattern and alpha_pattern among modules alone, and warns that it
    ignored those of parameters, which it applies. The warning stays where a key meets neither."""
    targets = tuple(f".{target}" for target in target_parameters or ())
    parameters = [clean_name(name) for name, _ in model.named_parameters()]
    names = [name for name in parameters if f".{name}".endswith(targets)]
    names += [clean_name(name) for name, _ in model.named_modules()]
    with warnings.catch_warnings():
        if all(any(re.match(rf"(.*\.)?({key})$", name) for name in names) for key in patterns):
            message = r"The following (rank|alpha)_pattern keys did not match any targeted module"
            warnings.filterwarnings("ignore", message=message, category=RuntimeWarning)
        yield


def load_adapter(
    model: PreTrainedModel, directory: str | Path, is_trainable: bool = False, any_base: bool = False
) -> PeftModel:
    """Put a saved adapter on ``model``.

    Args:
        model: packed, or in high precision.
        directory: of the adapter.
        is_trainable: whether it is to be trained further.
        any_base: do not compare with the base that its ``fourfold.json`` names.

    Raises:
        AdapterError: the folder holds no adapter, one that does not fit the model key by key, or one that was
            trained on another base or format.
    """
    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        raise AdapterError(f"{directory} holds no adapter (no adapter_config.json in it)")
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        raise AdapterError(f"{directory} holds no adapter_model.safetensors; other formats are not read")
    try:
        with safe_open(weights, framework="pt") as reader:
            stored = set(reader.keys())
    except SafetensorError as error:
        raise AdapterError(f"{weights} is truncated or damaged ({error}); copy it again") from error
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        config = {}  # PEFT says what is wrong with it
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    with (
        provenance.any_base() if any_base else contextlib.nullcontext(),
        _applied_patterns_are_not_called_ignored(model, patterns, config.get("target_parameters")),
    ):
        loaded = PeftModel.from_pretrained(model, str(directory), is_trainable=is_trainable)
    wanted = set(get_peft_model_state_dict(loaded, adapter_name=loaded.active_adapter))
    # PEFT warns of both; either means that another model answers than the one that was trained.
    for names, what in ((wanted - stored, "lacks"), (stored - wanted, "holds what the model lacks:")):
        if names:
            first = sorted(names)[0]
            raise AdapterError(
                f"{weights} {what} {first} and {len(names) - 1} more; it belongs to another model or is "
                "damaged"
            )
    return loaded


def try_on(skeleton: PreTrainedModel, adapter: str | Path | None = None, **arguments: Any) -> PeftModel:
    """Adapters on a model without weights, as they would be on the loaded one; whatever fails, fails here.

    Args:
        skeleton: from `build_skeleton`; it is changed.
        adapter: the folder of a saved adapter, whose names and shapes are compared; its weights are not read.
        arguments: of `LoraConfig`, where there is no ``adapter``.

    Raises:
        AdapterError: PEFT refuses the settings, or the saved adapter does not fit.
    """
    config = LoraConfig(task_type="CAUSAL_LM", **arguments) if adapter is None else saved_settings(adapter)
    try:
        model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise AdapterError(f"lora_*: PEFT cannot put these adapters on the model ({error}).") from error
    if adapter is not None:
        _compare_shapes(model, Path(adapter))
    return model


def saved_settings(directory: str | Path) -> LoraConfig:
    """The settings of a saved LoRA adapter.

    Raises:
        AdapterError: the folder holds none, or settings that cannot be read.
    """
    path = Path(directory).expanduser() / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{directory} holds no adapter (no adapter_config.json in it)")
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{path} is of a {type(config).__name__}, not of LoRA")
    return config


def _compare_shapes(model: PeftModel, directory: Path) -> None:
    weights = directory.expanduser() / "adapter_model.safetensors"
    if not weights.is_file():
        raise AdapterError(f"{directory} holds no adapter_model.safetensors; other formats are not read")
    try:
        with safe_open(weights, framework="pt") as reader:
            stored = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{weights} is truncated or damaged ({error}); copy it again") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    for name in sorted({*stored, *wanted}):
        if stored.get(name) != wanted.get(name):
            raise AdapterError(
                f"{weights}: {name} is {_shape(stored.get(name))} there and {_shape(wanted.get(name))} on "
                "this base model; it belongs to another one"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def loraplus_optimizer(
    model: PeftModel,
    cls: Any,
    arguments: dict[str, Any],
    ratio: float,
    embedding_rate: float | None,
    weight_decay: float,
) -> Any:
    """LoRA+ (Hayou et al. 2024): the factors B learn ``ratio`` times as fast as the factors A.

    Args:
        model: with adapters.
        cls: the optimizer's class.
        arguments: its arguments, ``lr`` among them.
        ratio: how many times ``lr``.
        embedding_rate: of adapters on embeddings; None for PEFT's own.
        weight_decay: of all of them.
    """
    from peft.optimizers import create_loraplus_optimizer

    further = {} if embedding_rate is None else {"loraplus_lr_embedding": embedding_rate}
    return create_loraplus_optimizer(
        model=model,
        optimizer_cls=cls,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=weight_decay,
        **further,
        **arguments,
    )
