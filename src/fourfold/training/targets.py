"""LoRA targets of a run, given or found, checked against the model's skeleton."""

from __future__ import annotations

import re
from typing import Any

import torch

from fourfold.errors import AdapterError, ConfigurationError, NoExpertsError
from fourfold.planning.plan import attention_projections
from fourfold.training.schema import TrainConfig


def find_targets(config: TrainConfig, skeleton: Any) -> tuple[list[str] | str, list[str]]:
    """LoRA targets, given or found, checked against the model's skeleton."""
    import fourfold
    from fourfold.adapters.peft_lora import check_targets
    from fourfold.experts import find_experts

    parameters = config.lora_target_parameters or []
    if parameters == ["all"]:
        try:
            parameters = list(fourfold.expert_targets(skeleton))
        except NoExpertsError:
            untrainable = next(iter(find_experts(skeleton)), None)
            if untrainable is not None:
                raise ConfigurationError(
                    f"lora_target_parameters: LoRA on experts of the kind of {untrainable.name} "
                    f"({type(untrainable.module).__name__}) is not supported. Drop lora_target_parameters to "
                    "train lora_target_modules alone."
                ) from None
            raise ConfigurationError(
                f"lora_target_parameters: all is of experts, and {type(skeleton).__name__} is dense. Drop "
                "that key to train lora_target_modules alone."
            ) from None
    modules = config.target_modules
    if modules is None:
        modules = attention_projections(skeleton)
        if not modules and not parameters:  # (with experts alone, a model without attention is no mistake)
            raise ConfigurationError(
                f"lora_target_modules: no attention projection was found in {type(skeleton).__name__}. Name "
                "the modules."
            )
    modules = present(skeleton, modules)
    try:
        check_targets(skeleton, modules, parameters)
    except AdapterError as error:
        raise AdapterError(f"lora_{error}") from None  # (a message begins with PEFT's name of the key)
    return modules, parameters


# Files for many models list these together, whether or not a model has each (one with latent attention lacks
# the first three).
USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def present(skeleton: Any, modules: list[str] | str) -> list[str] | str:
    """The targets without usual names that the model lacks, as PEFT leaves them out, where others are left.

    Any other name that meets nothing is a mistake, and so is a list of which nothing is left.
    """
    if isinstance(modules, str):
        return modules
    names = [name for name, _ in skeleton.named_modules()]
    left = [
        target
        for target in modules
        if target not in USUAL or any(name == target or name.endswith(f".{target}") for name in names)
    ]
    return left or modules


def check_patterns(
    config: TrainConfig, skeleton: Any, modules: list[str] | str, parameters: list[str]
) -> None:
    """Each name or pattern that singles out targets must meet one; PEFT only warns.

    Raises:
        ConfigurationError: names the one that meets none.
    """
    wrapped = resolve(skeleton, modules)
    if isinstance(modules, list):
        wrapped = [name for name, module in skeleton.named_modules() if _is_target(name, module, modules)]
    excluded = config.lora_exclude_modules
    entries = [excluded] if isinstance(excluded, str) else excluded or []
    for entry in entries:
        pattern = entry if isinstance(excluded, str) else rf"(.*\.)?{re.escape(entry)}"
        hits = [name for name in wrapped if re.fullmatch(pattern, name)]
        if not hits:
            raise ConfigurationError(
                f"lora_exclude_modules: {entry} is no target anyway. {_some(wrapped)} Drop it, or mend it."
            )
    fused = [
        name
        for name, _ in skeleton.named_parameters()
        if any(name == target or name.endswith(f".{target}") for target in parameters)
    ]
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in getattr(config, key) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in (*wrapped, *fused)):
                raise ConfigurationError(
                    f"{key}: {pattern} matches no target. {_some([*wrapped, *fused])} Mend it, or drop it."
                )


def resolve(model: Any, targets: list[str] | str) -> list[str]:
    """Names for PEFT: a list as it is, a regular expression or "all-linear" as the full names it meets.

    PEFT resolves text against the model as transformers 4 had it, with a Linear for each expert, and then
    targets the fused parameters in their place: experts would be trained though `lora_target_parameters`
    says otherwise.
    """
    if isinstance(targets, list):
        return targets
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if _is_target(name, module, targets) and not (module is head and targets == "all-linear")
    ]


def _is_target(name: str, module: torch.nn.Module, targets: list[str] | str) -> bool:
    if not isinstance(module, torch.nn.Linear):
        return False
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _some(names: list[str]) -> str:
    return f"Targets are {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."
