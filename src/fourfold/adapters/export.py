"""An adapter on fused experts, rewritten for servers that know experts one by one; and back.

PEFT keeps LoRA on fused experts as two flat factors a parameter, under keys that name a wrapper and not the
parameter. vLLM takes those from models that it serves with fused experts, SGLang from none; both take
``experts.{e}.{gate,up,down}_proj.lora_{A,B}.weight`` of shapes ``(r, in)`` and ``(out, r)``, under the names
of the base's checkpoint. Neither the rank nor a number changes on the way, unless the result says so.

SGLang reads one ``r`` and one ``lora_alpha`` for the whole adapter, so per-expert files hold one rank
(smaller ones filled with zeros) and one scaling (what differs goes into B). vLLM takes all projections of an
expert or none, so one that was not trained is written as zeros; on the way back such a projection is left
out again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.adapters import provenance
from fourfold.adapters.export_base import read_base
from fourfold.adapters.export_initial import ON_ORIGINAL, read_initial, subtract_
from fourfold.adapters.export_plan import Plan
from fourfold.adapters.export_read import read_adapter
from fourfold.adapters.export_source import GATE_UP, Source
from fourfold.adapters.export_write import check_target, write_folder
from fourfold.errors import AdapterError

LAYOUTS = ("per-expert", "fused")
SERVER_RANK = 16  # vLLM's default of --max-lora-rank, and the ranks that it takes
_SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        layout: ``per-expert`` or ``fused``.
        experts_modules: how many experts modules have LoRA.
        tensors: how many tensors were written.
        rank: the largest.
        names: ``base`` where modules are named as the base's checkpoint names them, else ``adapter``: its
            configuration was not within reach, and names are those that transformers uses.
        exact: whether every number is that of the source (a scaling that differs between modules is rounded
            once into B).
        zero_filled: projections that were not trained and are written as zeros.
        flags: what to pass to a server.
    """

    folder: Path
    layout: str
    experts_modules: int
    tensors: int
    rank: int
    names: str
    exact: bool
    zero_filled: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}


def export(
    adapter: str | Path,
    out: str | Path,
    layout: str = "per-expert",
    *,
    base: str | Path | None = None,
    source_layout: str | None = None,
    gate_up: str | None = None,
    double_rank: bool = False,
    base_weights: str = "original",
    initial: str | Path | None = None,
    force: bool = False,
) -> Exported:
    """Write ``adapter`` in another layout.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors, fused or per-expert.
        out: the folder to make.
        layout: ``per-expert`` (vLLM, SGLang), or ``fused`` (PEFT, and servers of models with fused experts).
        base: folder, config.json or hub id of the base model; by default what the adapter names, if within
            reach.
        source_layout: how the adapter packs fused experts, where its marks do not say: ``peft``,
            ``peft-0.18`` (0.17 to 0.19.0) or ``unsloth`` (before September 2026).
        gate_up: ``concatenated`` or ``interleaved``, where the base's configuration is not within reach.
        double_rank: to fused: accept a gate and an up of different A, at twice the rank.
        base_weights: what the server holds: the ``original`` weights, or the ``dequantized`` ones, on which
            alone adapters that began with `loftq_init` are right.
        initial: folder of the same adapter as `loftq_init` left it, saved before training. What it adds is
            taken off, at twice the rank, and the result belongs on original weights.
        force: replace the adapter at ``out``.

    Returns:
        What was written.

    Raises:
        AdapterError: the adapter is damaged, of another model, holds what servers refuse, or can be read in
            more than one way; says what to pass.
    """
    if layout not in LAYOUTS:
        raise AdapterError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    if gate_up not in (None, *GATE_UP):
        raise AdapterError(f"gate_up={gate_up!r} is none of {', '.join(GATE_UP)}")
    if base_weights not in provenance.BASE_WEIGHTS:
        raise AdapterError(f"base_weights={base_weights!r} is none of {', '.join(provenance.BASE_WEIGHTS)}")
    source, target = Path(adapter).expanduser(), Path(out).expanduser()
    check_target(target, source, force)
    read = read_adapter(source)
    model = read_base(base, read.config.get("base_model_name_or_path"))
    placed = Source(read, model, source_layout, gate_up, double_rank)
    began = None if initial is None else read_initial(source, initial, base_weights)
    if began is not None:
        subtract_(placed, Source(began, model, source_layout, gate_up, double_rank))
    elif base_weights == "original":
        provenance.refuse_on_original(source, ON_ORIGINAL)
    plan = Plan(placed)
    tensors, config = plan.per_expert() if layout == "per-expert" else plan.fused()
    write_folder(target, source, tensors, config, force, ordinary=initial is not None)
    rank = max(int(config["r"]), *(int(r) for r in config["rank_pattern"].values()), 0)
    for one in (read, began):
        if one is not None and one.file is not None:
            one.file.close()
    return Exported(
        folder=target,
        layout=layout,
        experts_modules=len(placed.experts),
        tensors=len(tensors),
        rank=rank,
        names="base" if model is not None else "adapter",
        exact=plan.exact,
        zero_filled=plan.zero_filled,
        flags=_flags(rank),
    )


def _flags(rank: int) -> list[str]:
    """What a server has to be told."""
    if rank <= SERVER_RANK:
        return []
    fitting = [r for r in _SERVER_RANKS if r >= rank]
    return [f"--max-lora-rank {fitting[0] if fitting else rank}"]
