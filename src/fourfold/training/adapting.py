"""The adapters of a run: tried on the model's skeleton first, then put on the loaded model.

New ones as the configuration says, or those of ``lora_model_dir``, whose own settings hold.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fourfold.adapters.peft_lora import add_lora, load_adapter, saved_settings, try_on
from fourfold.errors import AdapterError, ConfigurationError
from fourfold.training.schema import TrainConfig
from fourfold.training.targets import resolve

# Key of the file -> name in adapter_config.json.
OF_ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_use_rslora": "use_rslora",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
}


def lora_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of ``LoraConfig`` beside rank, alpha and targets."""
    start: bool | str = config.peft_init_lora_weights
    return {
        "exclude_modules": config.lora_exclude_modules,
        "rank_pattern": config.lora_rank_pattern or {},
        "alpha_pattern": config.lora_alpha_pattern or {},
        "use_rslora": config.peft_use_rslora,
        "init_lora_weights": True if start == "loftq" else start,
        "modules_to_save": config.lora_modules_to_save,
    }


def check_adapters(
    config: TrainConfig, skeleton: Any, modules: list[str] | str, parameters: list[str]
) -> None:
    """Put the adapters on the model's skeleton, which is changed.

    Raises:
        ConfigurationError: a key contradicts the saved adapter, a module cannot be trained as a whole, or
            nothing is left to train.
        AdapterError: PEFT refuses the adapters, or the saved one does not fit.
    """
    if config.lora_model_dir is not None:
        saved = saved_settings(config.lora_model_dir)
        _check_agreement(config, saved)
        check_whole_modules(skeleton, list(saved.modules_to_save or ()))
        try_on(skeleton, config.lora_model_dir)
        return
    check_whole_modules(skeleton, config.lora_modules_to_save or [])
    names = resolve(skeleton, modules)
    left = [
        (name, module)
        for name, module in skeleton.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in names)
        and not _excluded(config, name)
    ]
    if names and not left and not parameters:
        raise ConfigurationError(
            "lora_exclude_modules: nothing is left of lora_target_modules, so no adapter would be trained. "
            "Exclude less, or name more targets."
        )
    head = skeleton.get_output_embeddings()
    for name, module in left:
        if module is head:
            raise ConfigurationError(
                f"lora_target_modules: {name} is the head, whose weight the loss multiplies with in chunks, "
                "past any adapter on it. Take it out, or train it as a whole: lora_modules_to_save: "
                f"[{name.rpartition('.')[2]}]."
            )
    try_on(
        skeleton,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
        target_parameters=parameters or None,
        **lora_arguments(config),
    )


def _excluded(config: TrainConfig, name: str) -> bool:
    excluded = config.lora_exclude_modules
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in excluded or ())


def _check_agreement(config: TrainConfig, saved: Any) -> None:
    """Keys that the file gives must be what the saved adapter has: they would be ignored otherwise."""
    wrong = []
    for key, name in OF_ADAPTER.items():
        given, there = getattr(config, key), getattr(saved, name)
        if key in config.model_fields_set and (given or None) != (_plain(there) or None):
            wrong.append(f"{key} ({there} there)")
    for key in ("lora_target_modules", "lora_target_parameters"):
        name = key.removeprefix("lora_")
        given, there = getattr(config, key), _plain(getattr(saved, name))
        if key in config.model_fields_set and isinstance(given, list) and given != ["all"] and given:
            there = there if isinstance(there, list) else []
            if not all(any(name == each or name.endswith(f".{each}") for name in there) for each in given):
                wrong.append(f"{key} ({there} there)")
    if wrong:
        raise ConfigurationError(
            f"lora_model_dir: the adapter in {config.lora_model_dir} has other settings: {', '.join(wrong)}. "
            "They are part of it: drop those keys, or set them to its values."
        )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def check_whole_modules(skeleton: Any, names: list[str]) -> None:
    """Modules to train as a whole must be there, in high precision.

    Raises:
        ConfigurationError: names the module, and the nearest remedy.
    """
    for name in names:
        hits = [
            (path, module)
            for path, module in skeleton.named_modules()
            if path == name or path.endswith(f".{name}")
        ]
        if not hits:
            known = dict.fromkeys(path.rpartition(".")[2] for path, _ in skeleton.named_modules() if path)
            raise ConfigurationError(
                f"lora_modules_to_save: {name} is no module of {type(skeleton).__name__}. Its modules are "
                f"called {', '.join(list(known)[:12])}."
            )
        for path, module in hits:
            packed = [leaf for leaf, p in module.named_parameters() if not p.is_floating_point()]
            if packed:
                raise ConfigurationError(
                    f"lora_modules_to_save: {path} is held in 4 or 8 bit ({packed[0]}), and bytes cannot be "
                    "trained. Name it in lora_target_modules or lora_target_parameters, or leave it in high "
                    f"precision: bnb_config_kwargs: {{llm_int8_skip_modules: [lm_head, {name}]}}."
                )
            if not any(True for _ in module.parameters()):
                raise ConfigurationError(f"lora_modules_to_save: {path} has no parameters. Drop it.")


def put_on(model: Any, config: TrainConfig, modules: list[str] | str, parameters: list[str]) -> Any:
    """The loaded and prepared model with its adapters, each trained number in fp32.

    Raises:
        AdapterError: an adapter of ``lora_model_dir`` was trained on another base or format.
    """
    if config.lora_model_dir is not None:
        adapted = load_adapter(model, config.lora_model_dir, is_trainable=True)
    else:
        adapted = add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            target_modules=resolve(model, modules),
            target_parameters=parameters,
            dropout=config.lora_dropout,
            **lora_arguments(config),
        )
    _widen_whole_modules(adapted)
    return adapted


def _widen_whole_modules(model: nn.Module) -> None:
    """Whole modules are trained in fp32, as adapters are, and answer in the dtype of the model around them.

    PEFT copies them in the base model's dtype; in bf16 an update below 1/256 of a weight is rounded away.
    """
    for module in model.modules():
        for copy in getattr(module, "modules_to_save", {}).values() if _is_wrapper(module) else ():
            narrow = {p.dtype for p in copy.parameters()} & {torch.bfloat16, torch.float16}
            if narrow:
                copy.float()
                copy.register_forward_hook(_Answering(narrow.pop()))


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


class _Answering:
    """A forward hook: floating-point results in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output.to(self.dtype) if output.is_floating_point() else output
        if isinstance(output, tuple):
            return tuple(self(module, inputs, each) for each in output)
        return output


def saved_targets(config: TrainConfig) -> tuple[list[str] | str, list[str]] | None:
    """The targets of the adapter in ``lora_model_dir``, where there is one.

    Raises:
        AdapterError: the folder holds no adapter.
    """
    if config.lora_model_dir is None:
        return None
    try:
        saved = saved_settings(config.lora_model_dir)
    except AdapterError as error:
        raise AdapterError(f"lora_model_dir: {error}. Name the folder that a run wrote.") from error
    modules = _plain(saved.target_modules)
    return (modules if isinstance(modules, str) else list(modules or ())), list(saved.target_parameters or ())
