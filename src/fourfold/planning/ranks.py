"""What each of several GPUs holds, and sends, in a training run: FSDP2 (`distributed.shard`) and DDP.

Weights are cut as `shard` cuts them: rows of the first axis, experts of packed ones, bytes of 4-bit Linears;
their scales and 8-bit Linears stay whole. A *unit* is what is gathered together: a layer, an embedding, the
output layer, and what is left over (norms, tied embeddings), which stays gathered from forward to backward.

While FSDP2 gathers a unit in forward, three lie there: the bytes as they arrive, the tensors that they are
copied into, and the bytes that had arrived of the unit before. In backward it is the tensors of one and what
has arrived of the next, and of the largest layer's gradients three, as they come, as they are sent, and as
those of the layer before were sent. Without resharding all layers stay. DDP holds all, and the adapters'
gradients once more, in the buckets that it sends.

A ring of N sends (N - 1)/N of what is gathered or scattered, and twice that of what is added up everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fourfold.distributed.blocks import bare, blocks, ends, is_whole_on_every_rank
from fourfold.distributed.cut import Part
from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.planning.optimizers import optimizer_bytes
from fourfold.planning.plan import Plan, Planner, Settings
from fourfold.planning.report import _bnb_logical

LOADING_BUFFERS = 256 * 2**20  # the most that reading and packing may take beside a shard and an expert


@dataclass
class Unit:
    """What is gathered together, in bytes.

    Attributes:
        name: of the module; empty for what is left over.
        kind: ``layer``, ``input`` (embeddings), ``output`` (the layer to the vocabulary) or ``rest``.
        frozen: of the whole unit.
        trained: its adapters in fp32, whole.
        shard: of the first rank, which has the most, adapters included.
    """

    name: str
    kind: str
    frozen: int = 0
    trained: int = 0
    shard: int = 0

    @property
    def gathered(self) -> int:
        return self.frozen + self.trained


@dataclass
class Shares:
    """How a model with adapters is cut among ranks.

    Attributes:
        gpus: the number of ranks.
        units: what is gathered together, in the model's order; the rest comes last.
        whole: bytes that every rank holds: scales of 4-bit Linears, 8-bit Linears, buffers.
        shapes: of the trained parameters of the first rank.
        expert: bytes of the largest expert in bf16, all its projections.
    """

    gpus: int
    units: list[Unit]
    whole: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    expert: int = 0

    def bytes_of(self, *kinds: str) -> int:
        """The largest unit of these kinds, gathered."""
        return max((unit.gathered for unit in self.units if unit.kind in kinds), default=0)

    @property
    def shard(self) -> int:
        """All that the first rank holds of weights and adapters."""
        return self.whole + sum(unit.shard for unit in self.units)

    @property
    def trained(self) -> int:
        """Adapters in fp32, whole."""
        return sum(unit.trained for unit in self.units)


@dataclass
class RankPlan:
    """One way of training on several GPUs, for the GPU that needs most.

    Attributes:
        way: ``FSDP2``, ``FSDP2, layers stay`` (``reshard_after_forward=False``) or ``DDP``.
        gpus: how many.
        loading: the most while the model is loaded; None where it is loaded whole.
        weights: of its shard, or all of them.
        adapters: of its shard, or all.
        optimizer: the same.
        gathered: the most that lies there of others' shards, and of gradients on their way.
        resident: between two steps.
        peak: the most that is allocated at a time.
        sent: bytes that it sends in a step of one micro batch.
    """

    way: str
    gpus: int
    loading: int | None
    weights: int
    adapters: int
    optimizer: int
    gathered: int
    resident: int
    peak: int
    sent: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cut_shares(model: nn.Module, gpus: int) -> Shares:
    """Cut a model with adapters, loaded or on the meta device, as `fourfold.distributed.shard` does."""
    root = bare(model)
    get_output: Any = getattr(root, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    layers = blocks(root)
    units = [Unit(name, "layer") for name, _ in layers]
    by_module = {id(layer): unit for (_, layer), unit in zip(layers, units, strict=True)}
    rest = Unit("", "rest")
    shares = Shares(gpus, units)
    names = {id(module): name for name, module in root.named_modules()}
    for end in ends(root):
        units.append(Unit(names[id(end)], "output" if end is output else "input"))
        by_module[id(end)] = units[-1]
    units.append(rest)
    part = Part(0, gpus)
    seen: set[int] = set()

    def walk(module: nn.Module, unit: Unit) -> None:
        unit = by_module.get(id(module), unit)
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rows, nbytes, whole = _cut(module, leaf, parameter)
            shares.whole += whole
            if not rows:
                continue
            here = part.of(rows)[1]
            if parameter.requires_grad:
                unit.trained += nbytes
                shares.shapes.append((here, *parameter.shape[1:]))
            else:
                unit.frozen += nbytes
            unit.shard += nbytes // rows * here
        shares.whole += sum(buffer.nbytes for buffer in module._buffers.values() if buffer is not None)
        if isinstance(module, PackedExperts):
            shapes = [projection.shape for projection in module.fourfold_layout.projections]
            shares.expert = max(shares.expert, sum(2 * shape.rows * shape.columns for shape in shapes))
        for child in module.children():
            walk(child, unit)

    walk(root, rest)
    return shares


def _cut(module: nn.Module, leaf: str, parameter: nn.Parameter) -> tuple[int, int, int]:
    """Rows that are dealt out, their bytes together, and bytes that every rank has; no rows: all of it."""
    known = _bnb_logical(module, parameter)
    if known is not None and type(parameter).__name__ == "Params4bit":
        logical, nbytes, _ = known
        rows = -(-logical // 2)
        return rows, rows, nbytes - rows
    if known is not None or is_whole_on_every_rank(module, leaf, parameter):
        return 0, 0, parameter.nbytes if known is None else known[1]
    itemsize = 4 if parameter.requires_grad else parameter.element_size()
    return parameter.shape[0], parameter.numel() * itemsize, 0


def plan_ranks(planner: Planner, settings: Settings, plan: Plan, gpus: int) -> list[RankPlan]:
    """The ways of training on ``gpus`` GPUs, for the one that needs most; each has a micro batch of its own.

    Args:
        planner: of the model.
        settings: as for one GPU; ``batch`` is of one GPU.
        plan: of these settings on one GPU.
        gpus: two or more.

    Raises:
        ConfigurationError: fewer than two, or experts in host memory or on disk.
    """
    if gpus < 2:
        raise ConfigurationError(f"gpus: {gpus}. Write 2 or more; without, one is planned for")
    if settings.quantization is not None and settings.quantization.experts_device is not None:
        raise ConfigurationError(
            "experts in host memory or on disk (experts_offload, experts_device) and shards exclude each "
            "other. Leave the offloading out, or plan for one GPU"
        )
    shares = cut_shares(planner.with_adapters(settings), gpus)
    return [*(_sharded(plan, shares, settings, stay) for stay in (False, True)), _replicated(plan, shares)]


def sent_sharded(shares: Shares, stay: bool = False) -> int:
    """Bytes that a rank sends in a step of one micro batch: what is gathered, and gradients, scattered.

    All is gathered in forward and in backward, embeddings too; but the output layer stays in between.
    """
    gathered = sum(unit.gathered * (1 if stay or unit.kind == "output" else 2) for unit in shares.units)
    return (gathered + shares.trained) * (shares.gpus - 1) // shares.gpus


def sent_replicated(shares: Shares) -> int:
    """Bytes that a rank sends in a step: gradients, added up on their way round, and the sums once more."""
    return 2 * shares.trained * (shares.gpus - 1) // shares.gpus


def _sharded(plan: Plan, shares: Shares, settings: Settings, stay: bool) -> RankPlan:
    on_gpu = plan.target.is_cuda
    bytes_ = optimizer_bytes(settings.optimizer, shares.shapes, on_gpu=on_gpu)
    adapters = 4 * sum(torch.Size(shape).numel() for shape in shares.shapes)
    gradients = adapters
    rest, layer, end = shares.bytes_of("rest"), shares.bytes_of("layer"), shares.bytes_of("input", "output")
    layers = sum(unit.gathered for unit in shares.units if unit.kind == "layer")
    trained = max((unit.trained for unit in shares.units), default=0)
    computing = layers if stay else layer
    resident = shares.shard + bytes_.states + plan.libraries
    moments = {"step": (0, gradients + bytes_.step)}
    if plan.activations is not None:
        found = plan.activations
        held = gradients if plan.accumulates else 0
        moments["forward"] = (rest + computing + layer + max(layer, end), held + found.forward)
        moments["loss"] = (rest + computing + 2 * end, held + found.kept + found.loss)
        moments["backward"] = (rest + computing + layer + 3 * trained, gradients + found.backward)
    gathered, _ = max(moments.values(), key=sum)
    return RankPlan(
        way="FSDP2, layers stay" if stay else "FSDP2",
        gpus=shares.gpus,
        loading=shares.shard - adapters + shares.expert + LOADING_BUFFERS,
        weights=shares.shard - adapters,
        adapters=adapters,
        optimizer=bytes_.states,
        gathered=gathered,
        resident=resident,
        peak=resident + max(map(sum, moments.values())),
        sent=sent_sharded(shares, stay),
    )


def _replicated(plan: Plan, shares: Shares) -> RankPlan:
    gradients = plan.gradients
    return RankPlan(
        way="DDP",
        gpus=shares.gpus,
        loading=None,
        weights=plan.weights.bytes,
        adapters=plan.adapters,
        optimizer=plan.optimizer,
        gathered=gradients,
        resident=plan.resident + gradients,
        peak=plan.peak + gradients,
        sent=sent_replicated(shares),
    )
