"""The tensors and the configuration that an export writes, found before anything is written.

Shapes and names are found here; numbers are read while they are written.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any

import torch

from fourfold.adapters import export_factors as maths
from fourfold.adapters.export_factors import Factors
from fourfold.adapters.export_read import Module
from fourfold.adapters.export_source import WRAPPED, Experts, Source
from fourfold.adapters.factor_file import Lazy, Stream
from fourfold.errors import AdapterError
from fourfold.experts.layout import name_suffix

_PREFIX = "base_model.model."


class Plan:
    """What will be written.

    Attributes:
        exact: every number that was written so far is that of the source.
        zero_filled: parameters written as zeros.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.exact = True
        self.zero_filled: list[str] = []

    def per_expert(self) -> tuple[dict[str, Stream], dict[str, Any]]:
        """Tensors and configuration, one rank and one scaling throughout."""
        modules: list[tuple[str, Module, float]] = []
        for name, module in self.source.plain.items():
            modules.append((self._checkpoint_name(name), module, self.source.adapter.scaling(name)))
        for name, experts in self.source.experts.items():
            modules.extend(self._pieces(name, experts))
        rank = max(module.a.shape[0] for _, module, _ in modules)
        scaling = next(iter(next(iter(self.source.experts.values())).scaling.values()))
        tensors: dict[str, Stream] = {}
        for name, module, own in modules:
            a, b = maths.at_rank(module.a, module.b, rank)
            b = self._scaled(b, own / scaling)
            kind = ("lora_embedding_A", "lora_embedding_B")
            if not module.embedding:
                kind = ("lora_A.weight", "lora_B.weight")
            tensors[f"{_PREFIX}{name}.{kind[0]}"] = a.stream()
            tensors[f"{_PREFIX}{name}.{kind[1]}"] = b.stream()
        leaves = sorted({name.rpartition(".")[2] for name, _, _ in modules})
        targets = self._listed_targets()
        targets += [leaf for leaf in leaves if not any(leaf == t.rpartition(".")[2] for t in targets)]
        config = self._config(rank, scaling * rank, targets, None)
        return tensors, config | {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}

    def _scaled(self, b: Lazy, ratio: float) -> Lazy:
        def read() -> torch.Tensor:
            made, exact = maths.scaled(b.read(), ratio)
            self.exact &= exact
            return made

        return Lazy(b.shape, b.dtype, read)

    def _pieces(self, name: str, experts: Experts) -> Iterator[tuple[str, Module, float]]:
        """Every expert's matrices under the names of the base's checkpoint."""
        fused = dict(experts.fused)
        missing = self._fill(name, experts, fused)
        for parameter, factors in fused.items():
            scaling = experts.scaling.get(parameter, next(iter(experts.scaling.values())))
            halves = [factors]
            if parameter == "gate_up_proj":
                interleaved = False if parameter in missing else self.source.interleaved(name, experts)
                halves = list(maths.split(factors, interleaved=interleaved))
            names = None if self.source.base is None else self.source.base.expert_names(name, parameter)
            if names is None:
                own = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
                module = self._checkpoint_name(name)
                names = [[f"{module}.{e}.{part}" for e in range(factors.experts)] for part in own]
            for e in range(factors.experts):  # (in the order in which B is read)
                for half, numbered in zip(halves, names, strict=True):
                    yield numbered[e], Module(*half.of(e)), scaling

    def _fill(self, name: str, experts: Experts, fused: dict[str, Factors]) -> list[str]:
        """Zeros where one of the two parameters was not trained."""
        up_name = "gate_up_proj" if experts.gated else "up_proj"
        wanted = [p for p in (up_name, "down_proj") if p not in fused]
        if not wanted or len(fused) != 1 or not set(fused) <= {up_name, "down_proj"}:
            if set(fused) != {up_name, "down_proj"}:
                raise AdapterError(
                    f"{name}: {', '.join(fused)} are not gate, up and down of gated experts, or up and "
                    f"down of others"
                )
            return []
        there = next(iter(fused.values()))
        dtype, parts = there.dtype, 2 if experts.gated else 1
        if wanted == ["down_proj"]:
            columns, rows = there.rows // parts, there.columns
        else:
            columns, rows = there.rows, there.columns * parts
        fused[wanted[0]] = maths.zeros(there.experts, there.rank, columns, rows, dtype)
        self.zero_filled.append(f"{name}.{wanted[0]}")
        return wanted

    def _checkpoint_name(self, name: str) -> str:
        if self.source.base is None or not self.source.base.is_module(name):
            return name
        return self.source.base.linear_name(name)

    def fused(self) -> tuple[dict[str, Stream], dict[str, Any]]:
        """Tensors and configuration as PEFT writes them."""
        tensors: dict[str, Stream] = {}
        ranks, alphas = (
            dict(self.source.adapter.config.get("rank_pattern") or {}),
            dict(self.source.adapter.config.get("alpha_pattern") or {}),
        )
        parameters: dict[str, None] = {}
        for name, module in self.source.plain.items():
            kind = (
                ("lora_embedding_A", "lora_embedding_B")
                if module.embedding
                else ("lora_A.weight", "lora_B.weight")
            )
            tensors[f"{_PREFIX}{name}.{kind[0]}"] = module.a.stream()
            tensors[f"{_PREFIX}{name}.{kind[1]}"] = module.b.stream()
        for name, experts in self.source.experts.items():
            for depth, (parameter, factors) in enumerate(reversed(experts.fused.items())):
                a, b = maths.to_peft(factors, swapped=experts.swapped)
                key = f"{_PREFIX}{name}{WRAPPED * depth}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
                full = f"{name}.{parameter}"
                parameters[full] = None
                self._note(full, factors.rank, experts.scaling[parameter], ranks, alphas)
        source = self.source.adapter.config
        modules: Any = source.get("target_modules")
        targets = source.get("target_parameters")
        if not targets:  # it was per expert
            linears, matrices = self.source.plain_by_kind()
            leaves = {name.rpartition(".")[2] for name in linears}
            listed = [t for t in self._listed_targets() if t.rpartition(".")[2] in leaves]
            # (a pattern that meant experts as well is replaced by the names that it meant)
            modules = linears if isinstance(modules, str) else listed
            targets = [*self._targets(list(parameters)), *(f"{name}.weight" for name in matrices)]
        config = self._config(int(source["r"]), source["lora_alpha"], modules, targets)
        return tensors, config | {"rank_pattern": ranks, "alpha_pattern": alphas}

    def _note(
        self, full: str, rank: int, scaling: float, ranks: dict[str, Any], alphas: dict[str, Any]
    ) -> None:
        """Patterns for a parameter whose rank or scaling is not what the configuration gives it."""
        if rank == self.source.adapter.rank(full) and scaling == self.source.adapter.scaling(full):
            return
        key = re.escape(full)
        if any(re.match(rf"(.*\.)?({own})$", full) for own in (*ranks, *alphas)):
            # Of keys that match, PEFT takes the first of the file, where they are sorted.
            key = f"(?:{key})"
        root = rank**0.5 if self.source.adapter.config.get("use_rslora") else rank
        ranks[key], alphas[key] = rank, _whole(scaling * root)

    def _listed_targets(self) -> list[str]:
        """`target_modules` where it is a list; a pattern, which servers do not read, gives none."""
        targets = self.source.adapter.config.get("target_modules") or ()
        return [] if isinstance(targets, str) else sorted(targets)

    def _targets(self, parameters: list[str]) -> list[str]:
        """Suffixes where they name these parameters and no other of the base; else full names."""
        if self.source.base is not None:
            everywhere = [f"{n}.{p}" for n, targets in self.source.base.targets.items() for p in targets]
            suffixes = {name_suffix(p) for p in parameters}
            if {p for p in everywhere if name_suffix(p) in suffixes} != set(parameters):
                return parameters
        return list(dict.fromkeys(name_suffix(p) for p in parameters))

    def _config(self, rank: int, alpha: float, targets: Any, parameters: list[str] | None) -> dict[str, Any]:
        config = dict(self.source.adapter.config)
        config |= {"r": rank, "lora_alpha": _whole(alpha), "target_modules": targets}
        config |= {"target_parameters": parameters, "peft_version": importlib.metadata.version("peft")}
        if config.pop("lora_B_layout", None) is not None:
            config["lora_B_layout"] = "rank_major"
        return config


def _whole(number: float) -> float | int:
    """Without a fraction where there is none: PEFT's alpha is an int."""
    rounded = round(number)
    return rounded if abs(number - rounded) < 1e-12 * max(1.0, abs(number)) else number
