"""What has to be done to which tensor of a base's files to merge an adapter, before anything is done.

A plan is complete or is not made: every tensor of the adapter belongs to a parameter, every such parameter
has its keys in the files. Which files and keys are touched is known from headers and skeletons alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourfold.adapters import provenance
from fourfold.adapters.merge_base import check_base, check_packing, local_folder, refuse_quantized
from fourfold.adapters.updates import Adapter, Found, Update, find_updates
from fourfold.errors import AdapterError, CheckpointError, ConfigurationError, FourfoldError
from fourfold.experts import PackedExperts, find_experts
from fourfold.formats import PackFormat
from fourfold.formats.roundtrip import round_trip
from fourfold.loading.headers import checkpoint_files
from fourfold.loading.origin import Origin, origin_of_files
from fourfold.loading.places import Conversion, Places, Stored, find_places
from fourfold.loading.raw import DTYPES, RawFile, read_numbers, read_raw
from fourfold.loading.skeleton import build_skeleton, read_config

_COMPARED = 2**22  # numbers at a time
_LINEARS_BLOCKSIZE = 64  # bitsandbytes' own


@dataclass(frozen=True)
class Packing:
    """How one parameter was packed while the adapter was trained.

    Attributes:
        fmt: of its numbers.
        parts: of a matrix that are quantized separately (gate and up one after the other).
        matrices: experts; 1 for a Linear.
        out_by_in: the model stores out-by-in matrices.
        linear: bitsandbytes' Linear, whose blocks straddle rows.
        dtype: what numbers were before they were packed; None leaves them in the file's.
    """

    fmt: PackFormat
    parts: int = 1
    matrices: int = 1
    out_by_in: bool = True
    linear: bool = False
    dtype: torch.dtype | None = None

    def round_trip(
        self, w_RC: torch.Tensor, name: str, *, turned: bool = False, keys: int = 1
    ) -> torch.Tensor:
        """``dq(q(W))`` in fp32 of a matrix as a file has it (``turned``: over, as compared with the model).

        ``keys``: how many of them hold the rows of one matrix together; the given one is of one key.
        """
        if self.parts % keys:
            raise CheckpointError(f"{name}: {keys} keys a matrix, where {self.parts} parts were packed")
        if self.dtype is not None:
            w_RC = w_RC.to(self.dtype)
        flip = turned == self.out_by_in
        w_NK = w_RC.T.contiguous() if flip else w_RC
        parts = w_NK.chunk(self.parts // keys)
        out_NK = torch.empty(w_NK.shape, dtype=torch.float32)
        for part, place in zip(parts, out_NK.chunk(len(parts)), strict=True):
            round_trip(part, self.fmt, name=name, flat=self.linear, out_NK=place)
        return out_NK.T if flip else out_NK


@dataclass(frozen=True)
class Replacement:
    """A parameter that was trained as a whole, and the adapter's key of its new numbers."""

    parameter: str
    key: str


@dataclass
class MergePlan:
    """What `fourfold.merge` does.

    Attributes:
        base: the base's folder.
        origin: what it is.
        files: its weights.
        adapter: to be merged.
        updates: parameter -> what is added.
        packings: parameter -> how it was packed; of every packed parameter, where the adapter says so.
        dequantized: base weights are replaced by what is left of them after packing.
        places: the keys that are added to.
        replaced: stored key -> what is written in its place.
        shapes: of all parameters of the model.
    """

    base: Path
    origin: Origin
    files: list[RawFile]
    adapter: Adapter
    updates: dict[str, Update]
    packings: dict[str, Packing]
    dequantized: bool
    places: Places
    replaced: dict[str, Replacement]
    shapes: dict[str, tuple[int, ...]]

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Every parameter that is changed, with its shape in the model."""
        return {name: shape for name, shape in self.shapes.items() if self.is_touched(name)}

    def keys(self) -> set[str]:
        """Every stored tensor that is rewritten."""
        whole = {tensor.key for conversion in self.places.conversions for tensor in conversion.tensors}
        return {stored.tensor.key for stored in self.places.stored} | whole | self.replaced.keys()

    def orders(self) -> dict[str, list[int]]:
        """Parameter -> its matrices in the order in which the files hold them."""
        found: dict[str, dict[int, None]] = {}
        stored = {stored.tensor.key: stored for stored in self.places.stored}
        for key in (tensor.key for file in self.files for tensor in file.tensors):
            if key in stored:
                parameter = stored[key].parameter
                for block in blocks_of(stored[key], self.packings.get(parameter)):
                    found.setdefault(parameter, {})[block.matrix] = None
        return {parameter: list(matrices) for parameter, matrices in found.items()}

    def is_touched(self, parameter: str) -> bool:
        if any(replacement.parameter == parameter for replacement in self.replaced.values()):
            return True
        return parameter in self.updates or (self.dequantized and parameter in self.packings)


def make_plan(
    base: str | Path,
    adapter: str | Path,
    base_weights: str,
    *,
    any_base: bool,
    source_layout: str | None = None,
) -> MergePlan:
    """Find the place of everything.

    Raises:
        AdapterError: the adapter cannot be merged, or not into this base.
        CheckpointError: the base is packed, quantized, damaged or lacks a tensor.
        ConfigurationError: ``base_weights`` is none of the two.
    """
    if base_weights not in provenance.BASE_WEIGHTS:
        valid = ", ".join(provenance.BASE_WEIGHTS)
        raise ConfigurationError(f"base_weights={base_weights!r}; valid are {valid}")
    loaded = Adapter(adapter)
    stored = provenance.read(loaded.folder)
    if stored is None and base_weights == "dequantized":
        raise AdapterError(
            f"{adapter} has no {provenance.FILE}, so how its base was packed is not known; merge into the "
            "original weights"
        )
    if base_weights == "original":
        provenance.refuse_on_original(
            loaded.folder,
            "merge into what it was trained on: --base-weights dequantized (base_weights='dequantized')",
        )
    folder = local_folder(base, stored)
    base_config = read_config(folder)
    refuse_quantized(base_config, base)
    paths = checkpoint_files(folder)
    files = [read_raw(path) for path in paths]
    origin = origin_of_files(str(base), paths)
    if stored is not None and not any_base:
        check_base(stored, origin, loaded, base_config)
    config, found = _fit(folder, loaded, source_layout)
    updates = {update.parameter: update for update in found.updates}
    if not updates and not found.replaced:
        raise AdapterError(f"{adapter} adds nothing to any parameter")
    dequantized = base_weights == "dequantized"
    packings = {}
    if stored is not None:
        packings = _packings(config, stored, loaded, dequantized, any_base)
    taken = updates.keys() | found.replaced.keys()
    wanted = [*updates, *(name for name in packings if dequantized and name not in taken)]
    tensors = [tensor for file in files for tensor in file.tensors]
    model = build_skeleton(config)
    places = find_places(model, tensors, wanted)
    _check_copies(loaded, found.copies, find_places(model, tensors, found.copies, tied=True))
    replaced = _replacements(loaded, found.replaced, find_places(model, tensors, found.replaced))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plan = MergePlan(folder, origin, files, loaded, updates, packings, dequantized, places, replaced, shapes)
    _check_dtypes(plan)
    return plan


def _fit(folder: Path, adapter: Adapter, source_layout: str | None) -> tuple[Any, Found]:
    """The configuration of the model that the adapter is of, and what it adds there.

    A checkpoint with images beside its text holds two models: the whole one, and its text alone, which is
    what `AutoModelForCausalLM` makes of some.
    """
    config = read_config(folder)
    try:
        return config, find_updates(build_skeleton(config), adapter, source_layout)
    except AdapterError:
        text = config.get_text_config()
        if text is config:
            raise
        with contextlib.suppress(FourfoldError):
            return text, find_updates(build_skeleton(text), adapter, source_layout)
        raise


def _packings(
    config: Any, stored: Mapping[str, Any], adapter: Adapter, dequantized: bool, any_base: bool
) -> dict[str, Packing]:
    """How each packed parameter was packed, from the skeleton that loading would have filled."""
    settings, dtype = provenance.settings_for(stored), provenance.dtype_of(stored)
    model = build_skeleton(config, settings)
    if not any_base:
        check_packing(stored, model, adapter, dequantized)
    found: dict[str, Packing] = {}
    for experts in find_experts(model):
        if not isinstance(experts.module, PackedExperts):
            continue
        layout = experts.module.fourfold_layout
        for p in layout.projections:
            flattened = len(layout.model_shape(p)) == 2
            out_by_in = flattened or layout.is_out_by_in(p)
            if flattened and p.name in getattr(layout, "transposed", ()):
                out_by_in = False
            found[f"{experts.name}.{p.name}"] = Packing(
                experts.module.fourfold_format, p.shape.parts, p.shape.experts, out_by_in, dtype=dtype
            )
    if settings.is_linear_quantized:
        fmt = PackFormat("int8")
        if settings.load_in_4bit:
            double = settings.bnb_4bit_use_double_quant
            fmt = PackFormat(settings.bnb_4bit_quant_type, _LINEARS_BLOCKSIZE, double)
        for name, module in model.named_modules():
            source: type[nn.Module] | None = getattr(module, "source_cls", None)
            if source is not None:
                plain = issubclass(source, nn.Linear)
                found[f"{name}.weight"] = Packing(fmt, out_by_in=plain, linear=True, dtype=dtype)
    return found


def _check_copies(adapter: Adapter, copies: Mapping[str, str], places: Places) -> None:
    """What an adapter holds of the base must be the base's: it would be another model otherwise."""
    for conversion in places.conversions:
        name = next(name for name in conversion.parameters if name in copies)
        raise AdapterError(
            f"{adapter.folder} holds {copies[name]}, which the base's files hold in another layout "
            f"({conversion.tensors[0].key}), so they are not compared. Save the adapter without it"
        )
    for stored in places.stored:
        tensor, key = stored.tensor, next(iter(copies.values()))
        key = copies.get(stored.parameter, key)
        rows, columns = tensor.shape[0], torch.Size(tensor.shape[1:]).numel()
        step = max(1, _COMPARED // max(1, columns))
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            for begin in range(0, rows, step):
                count = min(step, rows - begin) * columns
                ours = read_numbers(file, count, DTYPES[tensor.dtype])
                theirs = adapter.file.rows(key, begin, begin + step).reshape(-1)
                if not torch.equal(ours.to(theirs.dtype), theirs):
                    raise AdapterError(
                        f"{adapter.folder} holds {key} with other numbers than the base's {tensor.key}: it "
                        "was trained itself, or belongs to another base. Such whole tensors are not merged"
                    )


def _replacements(adapter: Adapter, replaced: Mapping[str, str], places: Places) -> dict[str, Replacement]:
    """Whole tensors are written in place; only where the files hold them as the model does."""
    for stored in places.stored:
        if not stored.is_whole or stored.parts > 1 or stored.turned:
            raise AdapterError(
                f"{adapter.folder} holds {replaced[stored.parameter]} as a whole (modules_to_save), and the "
                f"base's files hold it in another layout ({stored.tensor.key}); this is not merged"
            )
    if places.conversions:
        raise AdapterError(
            f"{adapter.folder} holds whole tensors (modules_to_save) that the base's files hold in another "
            f"layout ({places.conversions[0].tensors[0].key}); they are not merged"
        )
    return {s.tensor.key: Replacement(s.parameter, replaced[s.parameter]) for s in places.stored}


def _check_dtypes(plan: MergePlan) -> None:
    keys = plan.keys()
    for file in plan.files:
        for tensor in file.tensors:
            if tensor.key in keys and tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{file.path}: {tensor.key} is {tensor.dtype}; merging adds to {', '.join(DTYPES)}"
                )


@dataclass(frozen=True)
class Block:
    """One matrix of a stored tensor: rows ``begin`` to ``begin + rows`` of it, seen as a list of rows.

    Attributes:
        matrix: of the parameter.
        first_row: in that matrix (in the file's orientation).
    """

    begin: int
    rows: int
    columns: int
    matrix: int
    first_row: int


def blocks_of(stored: Stored, packing: Packing | None) -> Iterator[Block]:
    """The matrices of a stored tensor, in the order in which they lie there."""
    shape = stored.tensor.shape
    rows, columns = shape[-2], shape[-1]
    if len(shape) == 3:
        for e in range(shape[0]):
            yield Block(e * rows, rows, columns, stored.expert + e, stored.first_row)
        return
    if packing is not None and packing.matrices > 1 and stored.is_whole:  # all experts one below the other
        height = rows // packing.matrices
        for e in range(packing.matrices):
            yield Block(e * height, height, columns, 0, e * height)
        return
    yield Block(0, rows, columns, stored.expert, stored.first_row)


__all__ = [
    "Block",
    "Conversion",
    "MergePlan",
    "Packing",
    "Replacement",
    "blocks_of",
    "local_folder",
    "make_plan",
]
