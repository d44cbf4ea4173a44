"""`verify` and the report: what lies in which format, counted in logical parameters and stored bytes.

PEFT's own total counts stored elements, which for packed weights is half or less of what they stand for; here
a packed tensor counts the weights it encodes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fourfold.errors import UnquantizedExpertsError
from fourfold.experts import PackedExperts, find_experts
from fourfold.experts.layout import clean_name, high_precision_tensors
from fourfold.loading.skips import is_skipped

ROLES = ("experts", "linears", "embeddings", "head", "router", "norms", "adapters", "other")


@dataclass
class Row:
    """Parameters of one role and dtype.

    Attributes:
        role: one of `ROLES`.
        dtype: as stored, or the name of the packed format.
        logical_params: weights, not stored elements.
        bytes: as stored, scales included.
        bytes_before: the same weights in the model's own dtype.
    """

    role: str
    dtype: str
    logical_params: int = 0
    bytes: int = 0
    bytes_before: int = 0


@dataclass
class ExpertsEntry:
    """One experts module: where it is, what it is, how it is held."""

    name: str
    kind: str
    format: str
    num_experts: int
    shapes: dict[str, list[int]]


@dataclass
class Report:
    """What `verify` returns; ``str(report)`` is a table, `to_dict` is for machines."""

    rows: list[Row] = field(default_factory=list)
    experts: list[ExpertsEntry] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)
    left_on_request: list[str] = field(default_factory=list)
    linears_only_settings: list[str] = field(default_factory=list)

    @property
    def logical_params(self) -> int:
        return sum(row.logical_params for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "logical_params": self.logical_params,
            "bytes": self.bytes,
            "bytes_before": self.bytes_before,
        }
        return asdict(self) | totals

    def __str__(self) -> str:
        lines = [f"{'role':<12}{'held as':<28}{'parameters':>16}{'bytes':>16}{'before':>16}"]
        for row in self.rows:
            lines.append(
                f"{row.role:<12}{row.dtype:<28}{row.logical_params:>16,}{row.bytes:>16,}{row.bytes_before:>16,}"
            )
        lines.append(f"{'total':<40}{self.logical_params:>16,}{self.bytes:>16,}{self.bytes_before:>16,}")
        lines.append(
            f"{len(self.experts)} experts modules, {len(self.unquantized)} expert tensors unquantized"
        )
        if self.left_on_request:
            lines.append(f"left in high precision on request: {', '.join(self.left_on_request)}")
        if self.linears_only_settings:
            lines.append(f"settings that concern Linears only: {', '.join(self.linears_only_settings)}")
        return "\n".join(lines)


def _bnb_logical(module: nn.Module, parameter: nn.Parameter) -> tuple[int, int, str] | None:
    """``(weights, bytes, format)`` of a bitsandbytes weight; None for ordinary parameters."""
    kind = type(parameter).__name__
    if kind == "Params4bit":
        logical = module.in_features * module.out_features
        packed = parameter.numel() != logical or parameter.is_meta
        block, double = parameter.blocksize or 64, parameter.compress_statistics
        if not packed:
            return None
        absmax = -(-logical // block)
        scales = absmax + 4 * -(-absmax // 256) + 4 if double else 4 * absmax
        name = f"{parameter.quant_type.upper()} /{block}" + (" double-quantized" if double else "")
        return logical, -(-logical // 2) + scales, name
    if kind == "Int8Params":
        return parameter.numel(), parameter.numel() + 4 * parameter.shape[0], "INT8"
    return None


def _role(name: str, module: nn.Module, model: nn.Module, routers: set[str]) -> str:
    if "lora_" in name:
        return "adapters"
    if clean_name(name).rpartition(".")[0] in routers:
        return "router"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and module is head:
        return "head"
    if isinstance(module, nn.Linear):
        return "linears"
    return "norms" if "norm" in type(module).__name__.lower() else "other"


def _routers(model: nn.Module) -> set[str]:
    """Modules beside an experts module with a weight of one row per expert."""
    names: set[str] = set()
    modules = list(model.named_modules())
    for found in find_experts(model):
        if found.layout is None:
            continue
        block = found.block
        for name, module in modules:
            clean = clean_name(name)
            weight = getattr(module, "weight", None)
            inside = clean.startswith(f"{block}.") and not clean.startswith(f"{found.name}.")
            if not inside or not isinstance(weight, torch.Tensor) or hasattr(module, "lora_A"):
                continue
            if weight.ndim == 2:
                rows = getattr(module, "out_features", weight.shape[0])
                if rows in (1, found.layout.num_experts):
                    names.add(clean)
    return names


def make_report(model: nn.Module) -> Report:
    """Count a model, loaded or on the meta device, with or without adapters; raises nothing."""
    report = Report()
    rows: dict[tuple[str, str], Row] = {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def add(role: str, held_as: str, logical: int, nbytes: int, before: int) -> None:
        row = rows.setdefault((role, held_as), Row(role, held_as))
        row.logical_params += logical
        row.bytes += nbytes
        row.bytes_before += before

    expert_tensors: set[str] = set()
    quantizer = getattr(model, "hf_quantizer", None)
    requested = set(getattr(quantizer, "left_on_request", ()))
    skips = getattr(getattr(quantizer, "quantization_config", None), "llm_int8_skip_modules", None)
    for found in find_experts(model):
        module = found.module
        packed = isinstance(module, PackedExperts)
        held_as = str(module.fourfold_format) if packed else str(dtype).removeprefix("torch.")
        shapes: dict[str, list[int]] = {}
        if found.layout is not None:
            shapes = {p.name: list(found.layout.model_shape(p)) for p in found.layout.projections}
        kind = found.layout.kind if found.layout else found.reason
        count = found.layout.num_experts if found.layout else 0
        report.experts.append(ExpertsEntry(found.name, kind, held_as, count, shapes))
        if packed:
            for projection in module.fourfold_layout.projections:
                shape = projection.shape
                logical = shape.experts * shape.rows * shape.columns
                nbytes = shape.nbytes(module.fourfold_format)
                add("experts", held_as, logical, nbytes, logical * module.fourfold_dtype.itemsize)
                suffixes = shape.tensors(module.fourfold_format)
                expert_tensors |= {f"{found.name}.{projection.name}{suffix}" for suffix in suffixes}
            continue
        tensors = high_precision_tensors(found)
        expert_tensors |= set(tensors)
        for tensor in tensors:
            parameter = getattr(module, tensor.rpartition(".")[2])
            nbytes = parameter.numel() * parameter.element_size()
            add("experts", str(parameter.dtype).removeprefix("torch."), parameter.numel(), nbytes, nbytes)
        if found.name in requested or is_skipped(found.name, skips):
            report.left_on_request.append(found.name)
        else:
            report.unquantized += tensors

    modules = dict(model.named_modules())
    routers = _routers(model)
    for name, parameter in model.named_parameters():
        clean = clean_name(name)
        if clean in expert_tensors:
            continue
        module = modules[name.rpartition(".")[0]]
        role = _role(name, module, model, routers)
        known = _bnb_logical(module, parameter)
        if known is not None:
            logical, nbytes, held_as = known
            add(role, held_as, logical, nbytes, logical * dtype.itemsize)
        else:
            nbytes = parameter.numel() * parameter.element_size()
            add(role, str(parameter.dtype).removeprefix("torch."), parameter.numel(), nbytes, nbytes)
    report.rows = sorted(rows.values(), key=lambda row: (ROLES.index(row.role), row.dtype))
    config: Any = getattr(quantizer, "config", None)
    report.linears_only_settings = (
        config.linears_only_settings() if hasattr(config, "linears_only_settings") else []
    )
    return report


def verify(model: nn.Module) -> Report:
    """Report what a model holds, and insist that its experts are quantized.

    Args:
        model: loaded or on the meta device, with or without adapters.

    Returns:
        Bytes and logical parameters by role and format.

    Raises:
        UnquantizedExpertsError: naming every expert tensor in high precision that was not left so on request.
    """
    report = make_report(model)
    if report.unquantized:
        shown = "\n  ".join(report.unquantized)
        raise UnquantizedExpertsError(
            f"{len(report.unquantized)} expert tensors of {type(model).__name__} are in high precision:\n  "
            f"{shown}\n"
            "Load the model with quantization_config=fourfold.MoeBitsAndBytesConfig(load_in_4bit=True, "
            "...), or say llm_int8_skip_modules / experts_quant_type='none' if that is on purpose",
            report.unquantized,
        )
    return report
