"""``W + BA`` written as a checkpoint, file by file, with a few matrices in memory.

Training sees ``dq(W) + BA``. Merged into the original weights, the model also gets ``W - dq(W)``, which
training never saw; usually that is the better checkpoint, but where the difference is far larger than BA it
may not be. ``base_weights="dequantized"`` writes the very model that was trained. Either way the sum is made
in fp32 and rounded once, to the dtype that the base's file has.

Output files have the headers of the base's files: the same keys, dtypes and places, so every tool that loads
the base loads the result. What the adapter does not touch is copied as bytes.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from fourfold.adapters.merge_files import copy_other_files, inputs_of
from fourfold.adapters.merge_plan import Block, MergePlan, Replacement, blocks_of, make_plan
from fourfold.adapters.merge_report import MergedCheckpoint, Sums, Tally, find_warnings
from fourfold.adapters.updates import Factors
from fourfold.errors import CheckpointError
from fourfold.experts.layout import name_suffix
from fourfold.loading.places import Conversion, Stored
from fourfold.loading.raw import DTYPES, RawFile, RawTensor, read_numbers, read_whole
from fourfold.loading.workplace import check_target, finish, finished, workplace

Progress = Callable[[int, int, str], None]
# Weights that are added to at a time: 1 MiB in fp32. With 16 MiB every temporary is fresh memory from the
# system, and most of the time goes into that (the sum alone 122 ms for 4 million weights).
_CHUNK_ELEMENTS = 2**18
_COPY_BYTES = 2**23


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    base_weights: str = "original",
    *,
    any_base: bool = False,
    source_layout: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergedCheckpoint:
    """Merge a LoRA adapter into its base, streaming, on the CPU.

    A run that was killed is gone on with by one of the same base, adapter and settings: files that were
    finished are kept.

    Args:
        base: local folder or hub id of the checkpoint that the adapter was trained on, in high precision.
        adapter: the adapter's folder.
        out: the folder to make; nothing is there until all of it is.
        base_weights: ``original`` adds to the base as it is; ``dequantized`` to what is left of it after
            packing as ``fourfold.json`` says, in every packed parameter.
        any_base: do not compare ``base`` with the one that ``fourfold.json`` names.
        source_layout: how the adapter packs fused experts, where its marks do not say: ``peft``,
            ``peft-0.18`` (0.17 to 0.19.0) or ``unsloth`` (before September 2026).
        force: replace the checkpoint that lies at ``out``.
        progress: is called with tensors done, their total, and the key of the next one.

    Returns:
        Figures and warnings.

    Raises:
        AdapterError: the adapter was trained on another base, does not fit key by key, or is of a kind that
            cannot be merged; nothing is written.
        CheckpointError: the base is packed, quantized, damaged or lacks a tensor; the sum is not finite.
        ConfigurationError: ``out`` exists, or ``base_weights`` is none of the two.
    """
    started = time.perf_counter()
    target = Path(out).expanduser().absolute()
    source = Path(base).expanduser()
    check_target(target, source, force)
    check_target(target, Path(adapter).expanduser(), force)
    plan = make_plan(base, adapter, base_weights, any_base=any_base, source_layout=source_layout)
    with (
        contextlib.closing(plan.adapter.file),
        workplace(target, plan.base, force, "merging", inputs_of(plan)) as folder,
    ):
        writer = _Writer(plan, progress or (lambda *_: None))
        for file in plan.files:
            writer.write(file, folder / file.path.name)
        writer.check_counts()
        copied, left_out = copy_other_files(plan, folder)
    roles = {role: sums.figures() for role, sums in writer.all.sums.items()}
    return MergedCheckpoint(
        folder=str(target),
        base=plan.origin.to_dict(),
        base_weights=base_weights,
        files=[file.path.name for file in plan.files],
        adapter_tensors=len(plan.adapter.shapes),
        planned=len(plan.parameters()),
        keys=len(writer.all.written),
        copied=copied,
        left_out=left_out,
        resumed=writer.resumed,
        roles=roles,
        warnings=find_warnings(roles, base_weights),
        seconds=time.perf_counter() - started,
    )


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


class _Writer:
    """Writes the files of a plan and counts what it did."""

    def __init__(self, plan: MergePlan, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.stored = {stored.tensor.key: stored for stored in plan.places.stored}
        self.conversions = {t.key: c for c in plan.places.conversions for t in c.tensors}
        self.total = sum(len(file.tensors) for file in plan.files)
        self.done = 0
        self.all, self.tally = Tally(), Tally()  # of all files so far, and of the one that is being written
        self.resumed: list[str] = []
        self.counts = True  # whether what is added now is counted
        self._factors = functools.lru_cache(maxsize=4)(self._find_factors)
        self.orders = plan.orders()
        self._converted = functools.lru_cache(maxsize=1)(self._convert)

    def write(self, file: RawFile, path: Path) -> None:
        """Write one file, unless a run that was killed has."""
        found = Tally.read(finished(path))
        if found is None:
            self.tally = Tally()
            part = path.with_name(f"{path.name}.part")
            self._write(file, part)
            finish(part, path, self.tally.to_dict())
        else:
            self.tally = found
            self.resumed.append(path.name)
            self.done += len(file.tensors)
        self.all.add(self.tally)
        self.tally = Tally()
        self.progress(self.done, self.total, "")

    def _write(self, file: RawFile, path: Path) -> None:
        with file.path.open("rb") as source, path.open("wb") as target:
            _copy(source, target, file.data_begin, file)
            for tensor in file.tensors:
                self.progress(self.done, self.total, tensor.key)
                source.seek(tensor.begin)
                if tensor.key in self.stored:
                    for values in self._sum(self.stored[tensor.key], source):
                        target.write(_bytes(values))
                    self.tally.written.add(tensor.key)
                elif tensor.key in self.plan.replaced:
                    for values in self._replace(tensor, self.plan.replaced[tensor.key]):
                        target.write(_bytes(values))
                    self.tally.written.add(tensor.key)
                elif tensor.key in self.conversions:
                    target.write(_bytes(self._converted(self.conversions[tensor.key])[tensor.key]))
                    self.tally.written.add(tensor.key)
                else:
                    _copy(source, target, tensor.size, file)
                if target.tell() != tensor.begin + tensor.size:
                    raise AssertionError(f"{tensor.key}: wrote to {target.tell()}, not its end")
                self.done += 1

    def check_counts(self) -> None:
        """Everything that was planned was done, to every weight, or nothing is kept."""
        missing, applied = self.plan.keys() ^ self.all.written, self.all.applied
        sizes = {name: torch.Size(shape).numel() for name, shape in self.plan.parameters().items()}
        wrong = [name for name, size in sizes.items() if applied.get(name) != size]
        if missing or wrong or applied.keys() - sizes.keys():
            first = (sorted(missing) or wrong or sorted(applied.keys() - sizes.keys()))[0]
            raise CheckpointError(
                f"{len(missing)} keys and {len(wrong)} parameters were not merged as planned ({first}); "
                "nothing was kept"
            )

    def _find_factors(self, parameter: str) -> Factors | None:
        update = self.plan.updates.get(parameter)
        return update.factors(self.plan.adapter, self.orders.get(parameter, ())) if update else None

    def _replace(self, tensor: RawTensor, replacement: Replacement) -> Iterator[torch.Tensor]:
        """The adapter's own rows, in the dtype that the file has."""
        columns = torch.Size(tensor.shape[1:]).numel()
        step = max(1, _CHUNK_ELEMENTS // max(1, columns))
        for start in range(0, tensor.shape[0] if tensor.shape else 1, step):
            rows = self.plan.adapter.file.rows(replacement.key, start, start + step)
            yield self._add(replacement.parameter, tensor.key, rows, None, DTYPES[tensor.dtype])

    def _sum(self, stored: Stored, source: BinaryIO) -> Iterator[torch.Tensor]:
        """The new rows of a stored tensor, a few at a time."""
        packing = self.plan.packings.get(stored.parameter)
        dtype = DTYPES[stored.tensor.dtype]
        for number, block in enumerate(blocks_of(stored, packing)):
            left = right = None
            factors = self._factors(stored.parameter)
            if factors is not None:
                left, right = factors.of(block.matrix, turned=stored.turned)
                left = left[block.first_row : block.first_row + block.rows]
            whole = None
            sample = packing is not None and number == 0 and stored.expert == 0
            if packing is not None and (self.plan.dequantized or sample):
                whole = read_numbers(source, block.rows * block.columns, dtype).view(block.rows, -1)
                decoded = packing.round_trip(
                    whole, stored.tensor.key, turned=stored.turned, keys=stored.parts
                )
                if sample and left is not None and right is not None:
                    self._sample(stored.parameter, whole, decoded, left, right)
                whole = decoded if self.plan.dequantized else whole
                del decoded
            yield from self._rows(stored, block, source, whole, left, right)

    def _rows(
        self,
        stored: Stored,
        block: Block,
        source: BinaryIO,
        whole: torch.Tensor | None,
        left: torch.Tensor | None,
        right: torch.Tensor | None,
    ) -> Iterator[torch.Tensor]:
        dtype, C = DTYPES[stored.tensor.dtype], block.columns
        step = max(1, _CHUNK_ELEMENTS // max(1, C))
        for start in range(0, block.rows, step):
            rows = min(step, block.rows - start)
            if whole is None:
                w_RC = read_numbers(source, rows * C, dtype).view(rows, C)
            else:
                w_RC = whole[start : start + rows]
            delta_RC = None
            if left is not None and right is not None:
                delta_RC = left[start : start + rows] @ right
            yield self._add(stored.parameter, stored.tensor.key, w_RC, delta_RC, dtype)

    def _add(
        self, parameter: str, key: str, w: torch.Tensor, delta: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """The sum in fp32, rounded once to ``dtype``; counted."""
        total = w.float() if delta is None else w.float() + delta
        out = total.to(dtype)
        low, high = torch.aminmax(out)  # (NaN where one is; ten times as fast as asking each number)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CheckpointError(f"{key}: base plus adapter is NaN or infinite in {dtype}; nothing was kept")
        if not self.counts:
            return out
        self.tally.applied[parameter] = self.tally.applied.get(parameter, 0) + w.numel()
        if delta is not None:
            sums = self._sums_of(parameter)
            sums.update += _square(delta)
            sums.rounding += _square(total - out)
            sums.moved += int(torch.count_nonzero(delta))
            sums.unchanged += int(torch.count_nonzero((out == w.to(dtype)) & (delta != 0)))
        return out

    def _sums_of(self, parameter: str) -> Sums:
        sums = self.tally.sums.setdefault(name_suffix(parameter), Sums())
        sums.parameters.add(parameter)
        return sums

    def _sample(
        self,
        parameter: str,
        w_RC: torch.Tensor,
        decoded_RC: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
    ) -> None:
        sums, step = self._sums_of(parameter), max(1, _CHUNK_ELEMENTS // max(1, w_RC.shape[1]))
        for start in range(0, len(w_RC), step):
            rows = slice(start, start + step)
            sums.sampled_quantization += _square(w_RC[rows].float() - decoded_RC[rows])
            sums.sampled_update += _square(left[rows] @ right)

    def _convert(self, conversion: Conversion) -> dict[str, torch.Tensor]:
        """Keys behind a conversion: over to the model's own tensors, the sum there, and back."""
        stored = {tensor.key: read_whole(tensor) for tensor in conversion.tensors}
        dtypes = {value.dtype for value in stored.values()}
        tensors = conversion.to_model(stored)
        back = conversion.to_files(tensors)
        if back.keys() != stored.keys() or not all(torch.equal(back[key], stored[key]) for key in stored):
            raise CheckpointError(
                f"{next(iter(stored))}: the conversion to the model and back does not give the same tensors, "
                "so the sum cannot be written in the base's layout"
            )
        del back
        # (done again where its keys lie in several files, or far from each other)
        done = self.all.applied.keys() | self.tally.applied.keys()
        self.counts = not done.intersection(conversion.parameters)
        (dtype,) = dtypes if len(dtypes) == 1 else (torch.float32,)
        for name in conversion.parameters:
            if self.plan.is_touched(name):
                tensors[name] = self._add_converted(name, tensors[name], dtype)
        self.counts = True
        made = conversion.to_files(tensors)
        return {key: value.to(stored[key].dtype).contiguous() for key, value in made.items()}

    def _add_converted(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The sum for a whole parameter in the model's own layout."""
        packing, factors = self.plan.packings.get(name), self._factors(name)
        like = RawTensor(Path(name), name, "", tuple(weight.shape), 0, weight.nbytes)
        rows, out = weight.reshape(-1, weight.shape[-1]), torch.empty(weight.shape, dtype=weight.dtype)
        for block in blocks_of(Stored(like, name), packing):
            where = slice(block.begin, block.begin + block.rows)
            w_RC, delta = rows[where], None
            if packing is not None and self.plan.dequantized:
                w_RC = packing.round_trip(w_RC, name)
            if factors is not None:
                left, right = factors.of(block.matrix)
                delta = left[block.first_row : block.first_row + block.rows] @ right
            out.view(rows.shape)[where] = self._add(name, name, w_RC, delta, dtype)
        return out


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _copy(source: BinaryIO, target: BinaryIO, size: int, file: RawFile) -> None:
    """Copy the next ``size`` bytes."""
    while size:
        chunk = source.read(min(size, _COPY_BYTES))
        if not chunk:
            raise CheckpointError(f"{file.path} became shorter while it was read")
        target.write(chunk)
        size -= len(chunk)


__all__ = ["MergedCheckpoint", "merge"]
