"""What a model's experts are, from its configuration alone: nothing is downloaded or allocated."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fourfold.errors import NoExpertsError
from fourfold.experts import PackedExperts, expert_targets, find_experts
from fourfold.formats import PackFormat
from fourfold.loading.skeleton import build_skeleton

FORMATS = {
    "nf4": PackFormat("nf4"),
    "nf4_double_quant": PackFormat("nf4", double_quant=True),
    "int8": PackFormat("int8"),
}


@dataclass
class ExpertsGroup:
    """Experts modules of one kind and one shape.

    Attributes:
        pattern: their name, ``N`` for the layer.
        count: how many modules.
        kind: of layout, or why it cannot be packed.
        can_be_packed: whether the kind is supported.
        num_experts: in each module.
        shapes: of each fused parameter, in the model's orientation.
        bytes: of all modules of the group, by format (``bf16``, ``nf4``, ``nf4_double_quant``, ``int8``).
    """

    pattern: str
    count: int
    kind: str
    can_be_packed: bool
    num_experts: int
    shapes: dict[str, list[int]]
    bytes: dict[str, int]


@dataclass
class Inspection:
    """What `inspect_model` found."""

    model: str
    architecture: str
    total_params: int
    expert_params: int
    groups: list[ExpertsGroup] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(model: str | Path) -> Inspection:
    """Experts modules, shapes, bytes per format and LoRA targets of a model.

    Args:
        model: local folder, bare ``config.json`` or hub id.

    Raises:
        CheckpointError: nothing readable is there.
    """
    skeleton = build_skeleton(model)
    groups: dict[tuple[str, str], ExpertsGroup] = {}
    expert_params = 0
    packed_on_disk = 0
    for found in find_experts(skeleton):
        pattern = re.sub(r"\.\d+\.", ".N.", found.name)
        shapes: dict[str, list[int]] = {}
        nbytes: dict[str, int] = {}
        params = 0
        if found.layout is not None:
            projections = found.layout.projections
            shapes = {p.name: list(found.layout.model_shape(p)) for p in projections}
            params = sum(p.shape.experts * p.shape.rows * p.shape.columns for p in projections)
            nbytes = {name: sum(p.shape.nbytes(fmt) for p in projections) for name, fmt in FORMATS.items()}
            if isinstance(found.module, PackedExperts):
                # (its biases are ordinary parameters, and counted as such)
                tensors = [t for p in projections for _, t in found.module.stack(p).tensors()]
                packed_on_disk += params - sum(t.numel() for t in tensors)
        else:
            own = dict(found.module.named_parameters(recurse=False))
            shapes = {name: list(p.shape) for name, p in own.items()}
            params = sum(p.numel() for p in own.values())
        nbytes["bf16"] = 2 * params
        expert_params += params
        group = groups.setdefault(
            (pattern, str(shapes)),
            ExpertsGroup(
                pattern=pattern,
                count=0,
                kind=found.layout.kind if found.layout else found.reason,
                can_be_packed=found.layout is not None,
                num_experts=found.layout.num_experts if found.layout else 0,
                shapes=shapes,
                bytes=dict.fromkeys(nbytes, 0),
            ),
        )
        group.count += 1
        for name, value in nbytes.items():
            group.bytes[name] += value
    try:
        targets = expert_targets(skeleton)
    except NoExpertsError:
        targets = []
    return Inspection(
        model=str(model),
        architecture=type(skeleton).__name__,
        total_params=sum(p.numel() for p in skeleton.parameters()) + packed_on_disk,
        expert_params=expert_params,
        groups=list(groups.values()),
        targets=targets,
    )
