"""Adding LoRA, loading adapters, and checking targets before anything slow happens."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fourfold.adapters.patch import install
from fourfold.errors import AdapterError
from fourfold.experts import find_experts
from fourfold.experts.layout import clean_name

install()


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
    if isinstance(target_modules, str):
        if target_modules != "all-linear" and not any(re.fullmatch(target_modules, name) for name in modules):
            raise AdapterError(f"target_modules={target_modules!r} (a regular expression) matches no module")
        target_modules = None
    for target in target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            raise AdapterError(f"target_modules: {target!r} matches no module; {_nearest(target, leaves)}")
    experts = list(find_experts(model))
    packable = {t for e in experts if e.layout and e.layout.routed for t in e.tensors()}
    parameters = [clean_name(name) for name, _ in model.named_parameters()]
    for target in target_parameters or ():
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            suffixes = list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", t) for t in packable))
            if not suffixes:
                raise AdapterError(
                    f"target_parameters: {target!r} matches nothing, for {type(model).__name__} is dense: "
                    "it has no "
                    "fused experts. Leave target_parameters out"
                )
            raise AdapterError(
                f"target_parameters: {target!r} matches no parameter; {_nearest(target, suffixes)}"
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
    return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, directory: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on ``model``.

    Raises:
        AdapterError: the folder holds no adapter.
    """
    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        raise AdapterError(f"{directory} holds no adapter (no adapter_config.json in it)")
    return PeftModel.from_pretrained(model, str(directory), is_trainable=is_trainable)
