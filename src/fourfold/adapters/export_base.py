"""What the base model's configuration says about an adapter: layouts of experts, and the checkpoint's names.

Servers look modules up by the names of the base's checkpoint, which transformers converts while loading
(``block_sparse_moe.experts.0.w1`` becomes a slice of ``mlp.experts.gate_up_proj``). Its own conversions, run
backwards on tensors without storage, give those names; there is no table of models here. Nothing is read of
the base but its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fourfold.errors import AdapterError, FourfoldError
from fourfold.experts import ExpertsLayout, FoundExperts, find_experts
from fourfold.loading.skeleton import build_skeleton, read_config

# How files name the projections of one expert. (Names of projections, not of models.)
GATE_NAMES, UP_NAMES, DOWN_NAMES = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<name>[^.]+)")


@dataclass(frozen=True)
class Target:
    """One fused parameter of experts as the base has it.

    Attributes:
        experts: E.
        columns: K.
        rows: N.
        stored_transposed: the model stores it in-by-out.
        says_transposed: and the module says so, which is what PEFT looks at.
        gated: it holds gate and up.
        interleaved: their rows alternate; None where the module does not say (it is not decorated).
    """

    experts: int
    columns: int
    rows: int
    stored_transposed: bool
    says_transposed: bool
    gated: bool
    interleaved: bool | None


class Base:
    """Layouts and names of one base model.

    Attributes:
        targets: experts module -> its fused parameters in the order of registration.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._experts = {found.name: found for found in find_experts(model)}
        self.targets: dict[str, dict[str, Target]] = targets_of(self._experts.values())

    def is_module(self, name: str) -> bool:
        """Whether the base has a module of that name."""
        try:
            self._model.get_submodule(name)
        except AttributeError:
            return False
        return True

    def is_wrappable(self, name: str) -> bool:
        """Whether PEFT has a wrapper for that module, or else for its matrix alone."""
        known = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        return self.is_module(name) and isinstance(self._model.get_submodule(name), known)

    def linear_name(self, module: str) -> str:
        """Name of a plain module in the base's checkpoint.

        Raises:
            AdapterError: the checkpoint holds it in several pieces.
        """
        names = list(self._reverted(f"{module}.weight", torch.empty(8, 8, device="meta")))
        if len(names) != 1 or not names[0].endswith(".weight"):
            raise AdapterError(
                f"{module} lies in the base's checkpoint as {', '.join(names[:3])}, so that its LoRA "
                "cannot be written under one name; leave it out of target_modules"
            )
        return names[0].removesuffix(".weight")

    def expert_names(self, experts: str, parameter: str) -> list[list[str]] | None:
        """``[part][expert]`` names in the base's checkpoint; None where it holds the parameter fused, too."""
        found = self._experts[experts]
        assert found.layout is not None
        projection = found.layout.projection(parameter)
        assert projection is not None
        shape = found.layout.model_shape(projection)
        names = list(self._reverted(f"{experts}.{parameter}", torch.empty(shape, device="meta")))
        target = self.targets[experts][parameter]
        parts: dict[str, dict[int, str]] = {}
        for name in names:
            match = EXPERT.fullmatch(name.removesuffix(".weight"))
            if match is None:
                return None
            parts.setdefault(match["name"], {})[int(match["number"])] = match[0]
        if len(parts) != 1 + target.gated or any(len(p) != target.experts for p in parts.values()):
            return None
        return [[numbered[e] for e in range(target.experts)] for numbered in parts.values()]

    def _reverted(self, name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        result: Mapping[str, torch.Tensor] = revert_weight_conversion(self._model, {name: tensor})
        return result

    def linears(self) -> Iterator[str]:
        """Names of all modules with a weight."""
        for name, module in self._model.named_modules():
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                yield name


def targets_of(experts: Iterable[FoundExperts]) -> dict[str, dict[str, Target]]:
    """Experts module -> its fused parameters in the order of registration."""
    return {found.name: dict(_targets(found)) for found in experts}


def _targets(found: FoundExperts) -> Iterator[tuple[str, Target]]:
    layout = found.layout
    if layout is None:
        return
    registered = [name for name, _ in found.module.named_parameters(recurse=False)]
    for projection in sorted(layout.projections, key=lambda p: registered.index(p.name)):
        shape = projection.shape
        if len(layout.model_shape(projection)) != 3:
            continue  # PEFT gives a flattened parameter one A for all experts: no LoRA per expert
        interleaved: bool | None = None
        if isinstance(layout, ExpertsLayout):
            gated, interleaved = layout.has_gate and projection is layout.up, not layout.is_concatenated
        else:
            gated = projection.name == "gate_up_proj"
        yield (
            projection.name,
            Target(
                experts=shape.experts,
                columns=shape.columns,
                rows=shape.rows,
                stored_transposed=not layout.is_out_by_in(projection),
                says_transposed=bool(getattr(found.module, "is_transposed", False)),
                gated=gated,
                interleaved=interleaved,
            ),
        )


def read_base(base: str | Path | None, named: str | None) -> Base | None:
    """The base model without weights.

    Args:
        base: as the caller names it: a folder, a config.json or an id on the hub; None to look for ``named``.
        named: what the adapter calls its base.

    Returns:
        None where the caller names none, and what the adapter names is nowhere within reach.

    Raises:
        FourfoldError: what the caller names cannot be read.
    """
    if base is None and not named:
        return None
    try:
        config = read_config(base if base is not None else str(named))
    except FourfoldError:
        if base is not None:
            raise
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # names and shapes are those of the unquantized model
    return Base(build_skeleton(config))
