"""An adapter on fused experts, rewritten for servers that know experts one by one; and back.

PEFT keeps LoRA on fused experts as two flat factors a parameter, under keys that name a wrapper and not the
parameter. vLLM takes those from models that it serves with fused experts, SGLang from none; both take
``experts.{e}.{gate,up,down}_proj.lora_{A,B}.weight`` of shapes ``(r, in)`` and ``(out, r)``, under the names of
the base's checkpoint. Neither the rank nor a number changes on the way, unless the result says so.

SGLang reads one ``r`` and one ``lora_alpha`` for the whole adapter, so per-expert files hold one rank (smaller
ones filled with zeros) and one scaling (what differs goes into B). vLLM takes all projections of an expert or
none, so one that was not trained is written as zeros; on the way back such a projection is left out again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fourfold.adapters import export_factors as maths
from fourfold.adapters.export_base import DOWN_NAMES, EXPERT, GATE_NAMES, UP_NAMES, Base, Target, read_base
from fourfold.adapters.export_factors import Factors
from fourfold.adapters.export_read import Adapter, Module, packing_of, read_adapter, swapped
from fourfold.adapters.export_write import check_target, write_folder
from fourfold.errors import AdapterError

LAYOUTS = ("per-expert", "fused")
GATE_UP = ("concatenated", "interleaved")
SERVER_RANK = 16  # vLLM's default of --max-lora-rank, and the ranks that it takes
_SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_PREFIX = "base_model.model."
_WRAPPED = ".base_layer"


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


@dataclass
class _Experts:
    """LoRA of one experts module: its fused parameters, in the order of registration."""

    fused: dict[str, Factors]
    scaling: dict[str, float]
    gated: bool
    interleaved: bool | None
    swapped: bool = False


def export(
    adapter: str | Path,
    out: str | Path,
    layout: str = "per-expert",
    *,
    base: str | Path | None = None,
    source_layout: str | None = None,
    gate_up: str | None = None,
    double_rank: bool = False,
    force: bool = False,
) -> Exported:
    """Write ``adapter`` in another layout.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors, fused or per-expert.
        out: the folder to make.
        layout: ``per-expert`` (vLLM, SGLang), or ``fused`` (PEFT, and servers of models with fused experts).
        base: folder, config.json or hub id of the base model; by default what the adapter names, if within reach.
        source_layout: how the adapter packs fused experts, where its marks do not say: ``peft``, ``peft-0.18``
            (0.17 to 0.19.0) or ``unsloth`` (before September 2026).
        gate_up: ``concatenated`` or ``interleaved``, where the base's configuration is not within reach.
        double_rank: to fused: accept a gate and an up of different A, at twice the rank.
        force: replace the adapter at ``out``.

    Returns:
        What was written.

    Raises:
        AdapterError: the adapter is damaged, of another model, holds what servers refuse, or can be read in more
            than one way; says what to pass.
    """
    if layout not in LAYOUTS:
        raise AdapterError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    if gate_up not in (None, *GATE_UP):
        raise AdapterError(f"gate_up={gate_up!r} is none of {', '.join(GATE_UP)}")
    source, target = Path(adapter).expanduser(), Path(out).expanduser()
    check_target(target, source, force)
    read = read_adapter(source)
    model = read_base(base, read.config.get("base_model_name_or_path"))
    plan = _Plan(read, model, source_layout, gate_up, double_rank)
    tensors, config = plan.per_expert() if layout == "per-expert" else plan.fused()
    write_folder(target, source, tensors, config, force)
    rank = max(int(config["r"]), *(int(r) for r in config["rank_pattern"].values()), 0)
    return Exported(
        folder=target,
        layout=layout,
        experts_modules=len(plan.experts),
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


class _Plan:
    """Everything that will be written, found before anything is."""

    def __init__(
        self,
        adapter: Adapter,
        base: Base | None,
        source_layout: str | None,
        gate_up: str | None,
        double_rank: bool,
    ) -> None:
        self.adapter, self.base, self.double_rank = adapter, base, double_rank
        self.gate_up = None if gate_up is None else gate_up == "interleaved"
        self.exact = True
        self.zero_filled: list[str] = []
        self.experts: dict[str, _Experts] = {}
        self.plain: dict[str, Module] = {}
        self._names: dict[str, list[list[str]]] = {}
        self._in_model = {} if base is None else {base.linear_name(n): n for n in _renamable(base)}
        fused, listed = self._sort_out()
        for name, levels in fused.items():
            self.experts[name] = self._read_fused(name, levels, source_layout)
        for name, parts in self._by_module(listed).items():
            if name in self.experts:
                raise AdapterError(f"{name} has LoRA both fused and per expert")
            self.experts[name] = self._read_per_expert(name, parts)
        if not self.experts:
            raise AdapterError(
                f"{adapter.folder} has no LoRA on routed experts, so there is nothing to convert; servers take it "
                "as it is"
            )

    def _sort_out(self) -> tuple[dict[str, list[Module]], dict[str, Module]]:
        """Modules of fused experts (innermost wrapper first), and those named per expert; the rest is plain."""
        fused: dict[str, dict[int, Module]] = {}
        listed: dict[str, Module] = {}
        for key, module in self.adapter.modules.items():
            name = key
            while name.endswith(_WRAPPED):
                name = name.removesuffix(_WRAPPED)
            if EXPERT.fullmatch(key):
                listed[key] = module
            elif self._holds_experts(name, name != key):
                fused.setdefault(name, {})[(len(key) - len(name)) // len(_WRAPPED)] = module
            else:
                self.plain[self._in_model.get(key, key)] = module
        return {n: [levels[d] for d in sorted(levels, reverse=True)] for n, levels in fused.items()}, listed

    def _holds_experts(self, name: str, wrapped: bool) -> bool:
        if self.base is not None:
            return name in self.base.targets
        return wrapped or name.endswith(".experts")

    def _read_fused(self, name: str, levels: list[Module], source_layout: str | None) -> _Experts:
        targets = None if self.base is None else self.base.targets[name]
        parameters = self._parameters(name, len(levels), targets)
        flat = dict(zip(parameters, levels, strict=True))
        for parameter, module in flat.items():
            rank = self.adapter.rank(f"{name}.{parameter}")
            experts = None if targets is None else targets[parameter].experts
            rows = module.a.shape[0]
            if rows != module.b.shape[1] or rows % rank or experts not in (None, rows // rank):
                raise AdapterError(
                    f"{name}.{parameter}: factors {list(module.a.shape)} and {list(module.b.shape)} are not those "
                    f"of {experts or 'some'} experts at rank {rank}; adapter_config.json is another adapter's"
                )
        packing = packing_of(self.adapter, source_layout)
        exchanged = swapped(packing, flat, targets, name)
        fused = {
            parameter: maths.from_peft(
                module.a,
                module.b,
                self.adapter.rank(f"{name}.{parameter}"),
                grouped=packing.grouped,
                swapped=exchanged,
            )
            for parameter, module in flat.items()
        }
        scaling = {p: self.adapter.scaling(f"{name}.{p}") for p in fused}
        return self._experts_of(name, fused, scaling)

    def _parameters(self, name: str, count: int, targets: dict[str, Target] | None) -> list[str]:
        """Which parameters the wrappers are of, innermost first: PEFT nests in the order of registration."""
        named = self.adapter.parameters(name)
        if targets is not None:
            known = [p for p in targets if p in named or not self.adapter.config.get("target_parameters")]
        else:
            order = ("gate_up_proj", "up_proj", "down_proj")
            known = sorted((p for p in named if p in order), key=order.index)
            if len(known) != len(named):
                raise AdapterError(
                    f"{name}: target_parameters names {', '.join(named)}, whose order only the base knows; name its "
                    "configuration (--base)"
                )
        if len(known) != count:
            raise AdapterError(
                f"{name}: the file holds LoRA of {count} of its parameters, adapter_config.json names "
                f"{', '.join(known) or 'none'} in target_parameters; which is which cannot be told"
            )
        return known

    def _experts_of(self, name: str, fused: dict[str, Factors], scaling: dict[str, float]) -> _Experts:
        gated, interleaved, exchanged = "gate_up_proj" in fused, self.gate_up, False
        if self.base is not None:
            targets = self.base.targets[name]
            gated = any(t.gated for t in targets.values())
            first = next(iter(targets.values()))
            known = next((t.interleaved for t in targets.values() if t.gated), None)
            if known is not None and interleaved not in (None, known):
                raise AdapterError(f"--gate-up contradicts the base, where {name} is the other way")
            interleaved = known if known is not None else interleaved
            exchanged = first.stored_transposed and not first.says_transposed
        elif set(fused) == {"down_proj"}:
            gated = True  # of no consequence but for what is filled with zeros
        return _Experts(fused, scaling, gated, interleaved, exchanged)

    def _interleaved(self, name: str, experts: _Experts) -> bool:
        if experts.interleaved is None:
            raise AdapterError(
                f"{name}: whether rows of gate and up lie one after the other or alternate is not in the adapter; "
                "name the base's configuration (--base, a config.json will do) or pass --gate-up (gate_up=): "
                f"{', '.join(GATE_UP)}"
            )
        return experts.interleaved

    # --- from per-expert ---

    def _by_module(self, listed: dict[str, Module]) -> dict[str, dict[str, dict[int, Module]]]:
        """Experts module -> name of the projection in the file -> expert -> factors."""
        known: dict[str, str] = {}
        if self.base is not None and listed:
            for name, targets in self.base.targets.items():
                known[name] = name
                for parameter in targets:
                    for part in self.base.expert_names(name, parameter) or ():
                        match = EXPERT.fullmatch(part[0])
                        assert match is not None
                        known[match["experts"]] = name
        result: dict[str, dict[str, dict[int, Module]]] = {}
        for key, module in listed.items():
            match = EXPERT.fullmatch(key)
            assert match is not None
            name = known.get(match["experts"]) if self.base is not None else match["experts"]
            if name is None:
                raise AdapterError(f"{key} is no expert of the base; the adapter is another model's")
            result.setdefault(name, {}).setdefault(match["name"], {})[int(match["number"])] = module
        return result

    def _read_per_expert(self, name: str, parts: dict[str, dict[int, Module]]) -> _Experts:
        count = 1 + max(number for part in parts.values() for number in part)
        if self.base is not None:
            count = next(iter(self.base.targets[name].values())).experts
        by_role: dict[str, tuple[Factors, float]] = {}
        for projection, numbered in parts.items():
            role = next((n[0] for n in (GATE_NAMES, UP_NAMES, DOWN_NAMES) if projection in n), None)
            if role is None or role in by_role:
                raise AdapterError(f"{name}: {projection} is neither gate, up nor down of an expert")
            missing = [e for e in range(count) if e not in numbered]
            if missing or len(numbered) != count:
                what = f"lacks expert {missing[0]}" if missing else f"has more than {count} experts"
                raise AdapterError(f"{name}: {projection} {what}, and a fused parameter holds all of them")
            where = f"{name}.{projection}"
            factors = maths.stack([(numbered[e].a, numbered[e].b) for e in range(count)], where)
            scalings = {self.adapter.scaling(f"{name}.{e}.{projection}") for e in range(count)}
            if len(scalings) != 1:
                raise AdapterError(f"{where}: experts have different alpha, and a fused parameter has one")
            if not factors.adds_nothing:
                by_role[role] = (factors, scalings.pop())
        fused: dict[str, Factors] = {}
        scaling: dict[str, float] = {}
        gate, up, down = (by_role.get(names[0]) for names in (GATE_NAMES, UP_NAMES, DOWN_NAMES))
        experts = self._experts_of(name, {"gate_up_proj": up[0]} if gate and up else {}, {})
        if gate and up:
            if gate[1] != up[1]:
                raise AdapterError(
                    f"{name}: gate and up have different alpha, and the fused parameter has one"
                )
            fused["gate_up_proj"] = maths.join(
                gate[0],
                up[0],
                interleaved=self._interleaved(name, experts),
                double_rank=self.double_rank,
                where=name,
            )
            scaling["gate_up_proj"] = up[1]
        elif gate or up:
            if gate or experts.gated:
                raise AdapterError(
                    f"{name}: LoRA on {'gate' if gate else 'up'} alone cannot be held by the fused gate_up_proj"
                )
            assert up is not None
            fused["up_proj"], scaling["up_proj"] = up
        if down:
            fused["down_proj"], scaling["down_proj"] = down
        self._check_fit(name, fused)
        return dataclasses.replace(experts, fused=fused, scaling=scaling)

    def _check_fit(self, name: str, fused: dict[str, Factors]) -> None:
        for parameter, factors in fused.items():
            target = None if self.base is None else self.base.targets[name].get(parameter)
            if self.base is not None and (
                target is None or (factors.columns, factors.rows) != (target.columns, target.rows)
            ):
                raise AdapterError(
                    f"{name}.{parameter} of the adapter does not fit the base; it is another model's"
                )

    # --- writing ---

    def per_expert(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and configuration, one rank and one scaling throughout."""
        modules: list[tuple[str, Module, float]] = []
        for name, module in self.plain.items():
            modules.append((self._checkpoint_name(name), module, self.adapter.scaling(name)))
        for name, experts in self.experts.items():
            modules.extend(self._pieces(name, experts))
        rank = max(module.a.shape[0] for _, module, _ in modules)
        scaling = next(iter(next(iter(self.experts.values())).scaling.values()))
        tensors: dict[str, torch.Tensor] = {}
        for name, module, own in modules:
            a, b = maths.at_rank(module.a, module.b, rank)
            b, exact = maths.scaled(b, own / scaling)
            self.exact &= exact
            kind = ("lora_embedding_A", "lora_embedding_B")
            if not module.embedding:
                kind = ("lora_A.weight", "lora_B.weight")
            tensors[f"{_PREFIX}{name}.{kind[0]}"], tensors[f"{_PREFIX}{name}.{kind[1]}"] = a, b
        targets = sorted({name.rpartition(".")[2] for name, _, _ in modules})
        config = self._config(rank, scaling * rank, targets, None)
        return tensors, config | {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}

    def _pieces(self, name: str, experts: _Experts) -> Iterator[tuple[str, Module, float]]:
        """Every expert's matrices under the names of the base's checkpoint."""
        fused = dict(experts.fused)
        missing = self._fill(name, experts, fused)
        for parameter, factors in fused.items():
            scaling = experts.scaling.get(parameter, next(iter(experts.scaling.values())))
            halves = [factors]
            if parameter == "gate_up_proj":
                interleaved = False if parameter in missing else self._interleaved(name, experts)
                halves = list(maths.split(factors, interleaved=interleaved))
            names = None if self.base is None else self.base.expert_names(name, parameter)
            if names is None:
                own = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
                module = self._checkpoint_name(name)
                names = [[f"{module}.{e}.{part}" for e in range(factors.experts)] for part in own]
            for half, numbered in zip(halves, names, strict=True):
                for e, full in enumerate(numbered):
                    yield full, Module(half.a_ERK[e], half.b_ENR[e]), scaling

    def _fill(self, name: str, experts: _Experts, fused: dict[str, Factors]) -> list[str]:
        """Zeros where one of the two parameters was not trained."""
        up_name = "gate_up_proj" if experts.gated else "up_proj"
        wanted = [p for p in (up_name, "down_proj") if p not in fused]
        if not wanted or len(fused) != 1 or not set(fused) <= {up_name, "down_proj"}:
            if set(fused) != {up_name, "down_proj"}:
                raise AdapterError(
                    f"{name}: {', '.join(fused)} are not gate, up and down of gated experts, or up and down of others"
                )
            return []
        there = next(iter(fused.values()))
        dtype, parts = there.a_ERK.dtype, 2 if experts.gated else 1
        if wanted == ["down_proj"]:
            columns, rows = there.rows // parts, there.columns
        else:
            columns, rows = there.rows, there.columns * parts
        fused[wanted[0]] = maths.zeros(there.experts, there.rank, columns, rows, dtype)
        self.zero_filled.append(f"{name}.{wanted[0]}")
        return wanted

    def _checkpoint_name(self, name: str) -> str:
        if self.base is None or not self.base.is_module(name):
            return name
        return self.base.linear_name(name)

    def fused(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and configuration as PEFT writes them."""
        tensors: dict[str, torch.Tensor] = {}
        ranks, alphas = (
            dict(self.adapter.config.get("rank_pattern") or {}),
            dict(self.adapter.config.get("alpha_pattern") or {}),
        )
        parameters: dict[str, None] = {}
        for name, module in self.plain.items():
            kind = (
                ("lora_embedding_A", "lora_embedding_B")
                if module.embedding
                else ("lora_A.weight", "lora_B.weight")
            )
            tensors[f"{_PREFIX}{name}.{kind[0]}"], tensors[f"{_PREFIX}{name}.{kind[1]}"] = module.a, module.b
        for name, experts in self.experts.items():
            for depth, (parameter, factors) in enumerate(reversed(experts.fused.items())):
                a, b = maths.to_peft(factors, swapped=experts.swapped)
                key = f"{_PREFIX}{name}{_WRAPPED * depth}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
                full = f"{name}.{parameter}"
                parameters[full] = None
                self._note(full, factors.rank, experts.scaling[parameter], ranks, alphas)
        names = {name.rpartition(".")[2] for name in self.plain}
        config = self._config(
            int(self.adapter.config["r"]),
            self.adapter.config["lora_alpha"],
            sorted(names),
            self.adapter.config.get("target_parameters") or self._targets(list(parameters)),
        )
        return tensors, config | {"rank_pattern": ranks, "alpha_pattern": alphas}

    def _note(
        self, full: str, rank: int, scaling: float, ranks: dict[str, Any], alphas: dict[str, Any]
    ) -> None:
        """Patterns for a parameter whose rank or scaling is not what the configuration gives it."""
        if rank == self.adapter.rank(full) and scaling == self.adapter.scaling(full):
            return
        key = re.escape(full)
        root = rank**0.5 if self.adapter.config.get("use_rslora") else rank
        ranks[key], alphas[key] = rank, _whole(scaling * root)

    def _targets(self, parameters: list[str]) -> list[str]:
        """Suffixes where they name these parameters and no other of the base; else full names."""
        from fourfold.experts.layout import name_suffix

        if self.base is not None:
            everywhere = [f"{n}.{p}" for n, targets in self.base.targets.items() for p in targets]
            suffixes = {name_suffix(p) for p in parameters}
            if {p for p in everywhere if name_suffix(p) in suffixes} != set(parameters):
                return parameters
        return list(dict.fromkeys(name_suffix(p) for p in parameters))

    def _config(
        self, rank: int, alpha: float, targets: list[str], parameters: list[str] | None
    ) -> dict[str, Any]:
        config = dict(self.adapter.config)
        config |= {"r": rank, "lora_alpha": _whole(alpha), "target_modules": targets}
        config |= {"target_parameters": parameters, "peft_version": importlib.metadata.version("peft")}
        if config.pop("lora_B_layout", None) is not None:
            config["lora_B_layout"] = "rank_major"
        return config


def _renamable(base: Base) -> Iterator[str]:
    """Modules that the base's checkpoint holds under one name."""
    for name in base.linears():
        try:
            base.linear_name(name)
        except AdapterError:
            continue
        yield name


def _whole(number: float) -> float | int:
    """Without a fraction where there is none: PEFT's alpha is an int."""
    rounded = round(number)
    return rounded if abs(number - rounded) < 1e-12 * max(1.0, abs(number)) else number
