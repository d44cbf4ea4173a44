"""The plan of a configured run: its settings as `planning` takes them, and what it says before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fourfold.errors import ConfigurationError
from fourfold.planning.fit import CONTEXT_BYTES, Suggestion, room, suggest
from fourfold.planning.plan import Plan, Planner, Settings, here
from fourfold.planning.ranks import plan_ranks
from fourfold.planning.standins import Target
from fourfold.planning.units import format_bytes
from fourfold.training import processes
from fourfold.training.fsdp_keys import Sharding, recomputes, sharding
from fourfold.training.schema import TrainConfig
from fourfold.training.targets import resolve

# Memory ran out although the plan said it would do: aim for this part of what was planned.
SUFFICES = 0.9
EVERYTHING_ELSE = (
    "Lower micro_batch_size (and raise gradient_accumulation_steps), lower sequence_len, or set "
    "gradient_checkpointing: true."
)


def settings_of(
    config: TrainConfig,
    quantization_config: Any,
    target_modules: Sequence[str] | str,
    target_parameters: Sequence[str],
    *,
    bf16: bool,
    card: int | None = None,
) -> Settings:
    """What the memory of a run depends on, of its configuration and what was found out about it.

    Args:
        config: the configuration.
        quantization_config: as `preflight.make_quantization_config` makes it.
        target_modules: LoRA targets, as `targets.find_targets` finds them.
        target_parameters: likewise.
        bf16: whether the run computes in bf16.
        card: bytes of the card, where they are known.
    """

    def fixed(names: Sequence[str] | str | None) -> Any:
        return names if isinstance(names, str) or names is None else tuple(names)

    return Settings(
        quantization=quantization_config,
        target_modules=fixed(target_modules),
        target_parameters=fixed(target_parameters),
        r=config.lora_r,
        rank_pattern=tuple((config.lora_rank_pattern or {}).items()),
        exclude_modules=fixed(config.lora_exclude_modules),
        modules_to_save=tuple(config.lora_modules_to_save or ()),
        batch=config.micro_batch_size,
        length=config.sequence_len,
        accumulation=config.gradient_accumulation_steps,
        bf16=bf16,
        checkpointing=recomputes(config),
        optimizer=config.optimizer,
        padded=config.micro_batch_size > 1 and not config.sample_packing,
        experts_offload=config.experts_offload,
        gpu_budget=config.gpu_budget if isinstance(config.gpu_budget, int) else None,
        card=card,
    )


def planner_of(
    config: TrainConfig, target: Target | None = None, card: int | None = None
) -> tuple[Planner, Settings]:
    """Planner and settings of a run, from its configuration and the model's alone.

    Args:
        config: the configuration.
        target: what it would run on; None is this machine.
        card: bytes of the card, where they are known.

    Raises:
        FourfoldError: the model is not there, or cannot be loaded or trained like that.
    """
    from fourfold.training.preflight import (
        check_model_folder,
        make_quantization_config,
        make_skeleton,
        resolve_bf16,
    )
    from fourfold.training.targets import check_patterns, find_targets

    check_model_folder(config.base_model)
    target = target or here()
    quantization_config = make_quantization_config(config)
    skeleton = make_skeleton(config, quantization_config)
    modules, parameters = find_targets(config, skeleton)
    check_patterns(config, skeleton, modules, parameters)
    bf16 = resolve_bf16(config)
    if config.bf16 == "auto" and target != here():
        bf16 = target.is_cuda and (target.capability or (0, 0)) >= (8, 0)
    planner = Planner(config.base_model, target)
    settings = settings_of(config, quantization_config, modules, parameters, bf16=bf16, card=card)
    return planner, _resolved(planner, settings)


def _resolved(planner: Planner, settings: Settings) -> Settings:
    """A regular expression of targets as the names that it meets."""
    if not isinstance(settings.target_modules, str):
        return settings
    names = resolve(planner.skeleton(settings), settings.target_modules)
    return replace(settings, target_modules=tuple(names))


def remark_on(planner: Planner, settings: Settings, card: int) -> str | None:
    """The same for a card of so many bytes."""
    plan = planner.plan(settings)
    resident, peak = plan.resident, plan.peak
    if resident > card - CONTEXT_BYTES:
        raise ConfigurationError(
            f"base_model: weights, adapters and optimizer are {format_bytes(resident)}, and the GPU has "
            f"{format_bytes(card)}. {advice(suggest(planner, settings, room(card)))}"
        )
    if peak <= room(card):
        return None
    return (
        f"planned peak {format_bytes(peak)}, and the GPU has {format_bytes(card)}: it may not suffice. "
        f"{advice(suggest(planner, settings, room(card)))}"
    )


def remark_on_share(
    planner: Planner, settings: Settings, card: int, gpus: int, wanted: Sharding
) -> str | None:
    """The same for a model sharded over so many GPUs; of shards in CPU memory nothing is said."""
    if wanted.offload:
        return None
    ways = plan_ranks(planner, settings, planner.plan(settings), gpus)
    share = ways[0] if wanted.reshard_after_forward else ways[1]
    if share.resident > card - CONTEXT_BYTES:
        raise ConfigurationError(
            f"fsdp_config: a GPU's share of weights, adapters and optimizer is {format_bytes(share.resident)}"
            f", and it has {format_bytes(card)}. Start more processes, on more GPUs, or set "
            "offload_params: true."
        )
    if share.peak <= room(card):
        return None
    return (
        f"planned peak of a GPU's share {format_bytes(share.peak)}, and it has {format_bytes(card)}: it may "
        f"not suffice. {EVERYTHING_ELSE}"
    )


def advice(suggestions: list[Suggestion]) -> str:
    """Suggestions in a sentence."""
    if not suggestions:
        return (
            "No change of batch, sequence, rank, targets, optimizer or place of experts makes it fit: take a "
            "larger card."
        )
    each = [f"{suggestion} ({format_bytes(suggestion.plan.peak)})" for suggestion in suggestions]
    return f"It is planned to fit with {'; or '.join(each)}."


def advice_below(planner: Planner, settings: Settings, available: int) -> str:
    """Changes that bring the peak below ``available`` bytes, and below what evidently was too much."""
    plan: Plan = planner.plan(settings)
    suggestions = suggest(planner, settings, min(available, int(SUFFICES * plan.peak)))
    return advice(suggestions) if suggestions else EVERYTHING_ELSE


class Memory:
    """What the plan says of a run on this machine's GPU; without one, nothing."""

    def __init__(self, config: TrainConfig, checked: Any) -> None:
        self.card: int | None = None
        # (a model's own code is not run to plan it)
        if torch.cuda.is_available() and not config.trust_remote_code:
            self.card = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if self.card is None:
            return
        self.sharding = sharding(config)
        self.planner = Planner(config.base_model)
        settings = settings_of(
            config,
            checked.quantization_config,
            checked.target_modules,
            checked.target_parameters,
            bf16=checked.bf16 or config.fp16,
            card=self.card if processes.count() == 1 else None,  # (of several, none brings experts)
        )
        self.settings = _resolved(self.planner, settings)

    def remark(self) -> str | None:
        """To be said before loading.

        Raises:
            ConfigurationError: what stays there throughout is more than the card has.
        """
        if self.card is None:
            return None
        if self.sharding is not None:
            return remark_on_share(self.planner, self.settings, self.card, processes.count(), self.sharding)
        return remark_on(self.planner, self.settings, self.card)

    def besides_experts(self) -> int | None:
        """Bytes that the run is planned to need on top of the loaded model; None without a plan."""
        if self.card is None:
            return None
        return self.planner.plan(self.settings).beside_experts(self.card)

    def advice(self) -> str:
        """What to change now that memory ran out."""
        if self.card is None or self.sharding is not None:
            return EVERYTHING_ELSE
        try:
            return advice_below(self.planner, self.settings, room(self.card))
        except Exception:  # (an answer to one error must not be another)
            return EVERYTHING_ELSE
