"""An adapter, fused or per expert, with every factor at its place in the model.

Both kinds are read into factors of fused parameters (`export_factors`), under the names that transformers
gives the modules; where the base's configuration is within reach, shapes and names are checked against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from fourfold.adapters import export_factors as maths
from fourfold.adapters.export_base import DOWN_NAMES, EXPERT, GATE_NAMES, UP_NAMES, Base, Target
from fourfold.adapters.export_factors import Factors
from fourfold.adapters.export_read import Adapter, Module, packing_of, swapped
from fourfold.adapters.factor_file import FlatFactors
from fourfold.errors import AdapterError

GATE_UP = ("concatenated", "interleaved")
WRAPPED = ".base_layer"


@dataclass
class Experts:
    """LoRA of one experts module: its fused parameters, in the order of registration."""

    fused: dict[str, Factors]
    scaling: dict[str, float]
    gated: bool
    interleaved: bool | None
    swapped: bool = False


class Source:
    """An adapter whose every factor has found its place in a model; nothing is written yet.

    Attributes:
        experts: experts module, as transformers names it -> its LoRA.
        plain: any other module, as transformers names it -> its factors.
    """

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
        self.experts: dict[str, Experts] = {}
        self.plain: dict[str, Module] = {}
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
                f"{adapter.folder} has no LoRA on routed experts, so there is nothing to convert; servers "
                "take it as it is"
            )

    def _sort_out(self) -> tuple[dict[str, list[Module]], dict[str, Module]]:
        """Modules of fused experts (innermost wrapper first), and those named per expert; the rest is
        plain."""
        fused: dict[str, dict[int, Module]] = {}
        listed: dict[str, Module] = {}
        for key, module in self.adapter.modules.items():
            name = key
            while name.endswith(WRAPPED):
                name = name.removesuffix(WRAPPED)
            if EXPERT.fullmatch(key):
                listed[key] = module
            elif self._holds_experts(name, name != key):
                fused.setdefault(name, {})[(len(key) - len(name)) // len(WRAPPED)] = module
            else:
                self.plain[self._in_model.get(key, key)] = module
        return {n: [levels[d] for d in sorted(levels, reverse=True)] for n, levels in fused.items()}, listed

    def _holds_experts(self, name: str, wrapped: bool) -> bool:
        if self.base is not None:
            return name in self.base.targets
        return wrapped or name.endswith(".experts")

    def _read_fused(self, name: str, levels: list[Module], source_layout: str | None) -> Experts:
        targets = None if self.base is None else self.base.targets[name]
        parameters = self._parameters(name, len(levels), targets)
        flat = dict(zip(parameters, levels, strict=True))
        for parameter, module in flat.items():
            rank = self.adapter.rank(f"{name}.{parameter}")
            experts = None if targets is None else targets[parameter].experts
            rows = module.a.shape[0]
            flat_both = len(module.a.shape) == len(module.b.shape) == 2
            if (
                not flat_both
                or rows != module.b.shape[1]
                or rows % rank
                or experts not in (None, rows // rank)
            ):
                raise AdapterError(
                    f"{name}.{parameter}: factors {list(module.a.shape)} and {list(module.b.shape)} are "
                    f"not those of {experts or 'some'} experts at rank {rank}; adapter_config.json is "
                    "another adapter's"
                )
        packing = packing_of(self.adapter, source_layout)
        exchanged = swapped(packing, flat, targets, name)
        file = self.adapter.file
        assert file is not None
        fused: dict[str, Factors] = {}
        for parameter, module in flat.items():
            experts = module.a.shape[0] // self.adapter.rank(f"{name}.{parameter}")
            factors = FlatFactors(file, module.a.key, module.b.key, experts, grouped=packing.grouped)
            fused[parameter] = maths.from_peft(factors, swapped=exchanged)
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
                    f"{name}: target_parameters names {', '.join(named)}, whose order only the base knows; "
                    "name its configuration (--base)"
                )
        if len(known) != count:
            raise AdapterError(
                f"{name}: the file holds LoRA of {count} of its parameters, adapter_config.json names "
                f"{', '.join(known) or 'none'} in target_parameters; which is which cannot be told"
            )
        return known

    def _experts_of(self, name: str, fused: dict[str, Factors], scaling: dict[str, float]) -> Experts:
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
        return Experts(fused, scaling, gated, interleaved, exchanged)

    def interleaved(self, name: str, experts: Experts) -> bool:
        """Whether rows of gate and up alternate in the fused parameter.

        Raises:
            AdapterError: neither the base nor the caller says.
        """
        if experts.interleaved is None:
            raise AdapterError(
                f"{name}: whether rows of gate and up lie one after the other or alternate is not in the "
                "adapter; name the base's configuration (--base, a config.json will do) or pass "
                f"--gate-up (gate_up=): {', '.join(GATE_UP)}"
            )
        return experts.interleaved

    def plain_by_kind(self) -> tuple[list[str], list[str]]:
        """Names of plain modules that PEFT wraps, and of those whose bare matrix it targets (a router's)."""
        linears = [n for n in self.plain if self.base is None or self.base.is_wrappable(n)]
        return linears, [n for n in self.plain if n not in linears]

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
            name = match["experts"] if self.base is None else known.get(match["experts"], "")
            if not name:
                raise AdapterError(f"{key} is no expert of the base; the adapter is another model's")
            result.setdefault(name, {}).setdefault(match["name"], {})[int(match["number"])] = module
        return result

    def _read_per_expert(self, name: str, parts: dict[str, dict[int, Module]]) -> Experts:
        count = 1 + max(number for part in parts.values() for number in part)
        if self.base is not None:
            count = next(iter(self.base.targets[name].values())).experts
        by_role: dict[str, tuple[Factors, float]] = {}
        for projection, numbered in parts.items():
            role = next((n[0] for n in (GATE_NAMES, UP_NAMES, DOWN_NAMES) if projection in n), "")
            if not role or role in by_role:
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
                interleaved=self.interleaved(name, experts),
                double_rank=self.double_rank,
                where=name,
            )
            scaling["gate_up_proj"] = up[1]
        elif gate or up:
            if gate or experts.gated:
                raise AdapterError(
                    f"{name}: LoRA on {'gate' if gate else 'up'} alone cannot be held by the fused "
                    f"gate_up_proj"
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


def _renamable(base: Base) -> Iterator[str]:
    """Modules that the base's checkpoint holds under one name."""
    for name in base.linears():
        try:
            base.linear_name(name)
        except AdapterError:
            continue
        yield name
