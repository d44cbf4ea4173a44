"""Where the parameters of a model lie in the files of its checkpoint.

Keys in files are not names in models: transformers renames them, stacks experts, joins gate and up, turns
matrices over. Its own mapping, applied to the checkpoint's keys on the model's skeleton, says which keys make
up which parameter; there is no second mapping here that could differ. Three shapes of the answer can be read
and written matrix by matrix: the parameter as it is, the parameter with matrices turned over, one key per
expert. Every other conversion (`Conversion`) is done by transformers' own operations, there and back.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fourfold.errors import CheckpointError
from fourfold.loading.raw import RawTensor

# What a conversion may hold in memory, several times over in fp32.
CONVERSION_ELEMENTS = 2**26


@dataclass(frozen=True)
class Stored:
    """One key that holds matrices of one parameter.

    Attributes:
        tensor: in its file; ``[rows, columns]``, or ``[experts, rows, columns]``.
        parameter: its full name in the model.
        expert: which of the parameter's matrices the first of the key's is.
        first_row: where the key's rows begin in the parameter's matrix (gate and up under two keys).
        part: how many keys before it hold rows of the same matrix.
        parts: how many keys hold a matrix together.
        one_expert: the key holds (a part of) one matrix of several.
        turned: matrices lie in the file turned over, as compared with the parameter.
    """

    tensor: RawTensor
    parameter: str
    expert: int = 0
    first_row: int = 0
    part: int = 0
    parts: int = 1
    one_expert: bool = False
    turned: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the key holds all of the parameter."""
        return not self.one_expert


@dataclass(frozen=True)
class Conversion:
    """Keys and parameters that only transformers' own operations lead to each other.

    Attributes:
        tensors: of the files.
        parameters: full names in the model.
    """

    tensors: tuple[RawTensor, ...]
    parameters: tuple[str, ...]
    _model: PreTrainedModel = field(repr=False, compare=False)
    _converter: WeightConverter = field(repr=False, compare=False)
    _pattern_of: Mapping[str, str] = field(repr=False, compare=False)

    def to_model(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What loading makes of the stored tensors: full name -> tensor."""
        converter = copy.deepcopy(self._converter)
        for key, tensor in stored.items():
            converter.add_tensor(self.parameters[0], key, self._pattern_of[key], lambda t=tensor: t)
        made = converter.convert(self.parameters[0], model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def to_files(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What saving makes of the model's tensors: key -> tensor."""
        made: dict[str, torch.Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return made


@dataclass
class Places:
    """Answer of `find_places`: every key of the asked-for parameters is in one of both lists."""

    stored: list[Stored] = field(default_factory=list)
    conversions: list[Conversion] = field(default_factory=list)


def find_places(
    model: PreTrainedModel, tensors: Iterable[RawTensor], wanted: Iterable[str], *, tied: bool = False
) -> Places:
    """Find the keys of ``wanted`` parameters.

    Args:
        model: in high precision, on the meta device.
        tensors: all of the checkpoint.
        wanted: full names of parameters.
        tied: they may be tied to others, under whose name they then are in the files (to be read only).

    Raises:
        CheckpointError: a parameter is not in the files, not in its shape, tied to another, or behind a
            conversion that is too large to be done in memory.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
    converters = [c for c in mapping if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, list[tuple[RawTensor, str | None]]] = defaultdict(list)
    for tensor in sorted(tensors, key=lambda t: dot_natural_key(t.key)):
        name, pattern = rename_source_key(tensor.key, renamings, converters, prefix, state)
        if name not in state and tensor.key in state:
            name, pattern = rename_source_key(tensor.key, [], [], prefix, state)
        if name in state:
            groups[name].append((tensor, pattern))
    # (only conversions that this checkpoint uses are reversed, as `save_pretrained` does)
    model._weight_conversions = [c for c in mapping if c.was_used()]
    group_of = {
        parameter: first
        for first, keys in groups.items()
        for parameter in _targets(first, by_pattern[keys[0][1]] if keys[0][1] else None)
    }
    places, ties = Places(), getattr(model, "all_tied_weights_keys", None) or {}
    if tied:
        wanted, ties = [name if name in group_of else ties.get(name, name) for name in wanted], {}
    for first in dict.fromkeys(_group(name, group_of, ties) for name in wanted):
        keys = groups[first]
        pattern = keys[0][1]
        found = _place(first, keys, by_pattern[pattern] if pattern else None, state[first].shape, model)
        if isinstance(found, Conversion):
            places.conversions.append(found)
        else:
            places.stored += found
    return places


def _targets(first: str, converter: WeightConverter | None) -> list[str]:
    """All parameters that come out of the conversion whose first one is ``first``."""
    if converter is None or len(converter.target_patterns) == 1:
        return [first]
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _group(name: str, group_of: Mapping[str, str], ties: Mapping[str, str]) -> str:
    if name in ties or name in ties.values():
        raise CheckpointError(
            f"{name} shares its numbers with another parameter of the model; what is added to one would be "
            "added to both. Leave it out of the adapter's targets"
        )
    if name not in group_of:
        raise CheckpointError(f"the checkpoint holds no tensor for {name}; download it again")
    return group_of[name]


def _place(
    name: str,
    keys: list[tuple[RawTensor, str | None]],
    converter: WeightConverter | None,
    shape: torch.Size,
    model: PreTrainedModel,
) -> list[Stored] | Conversion:
    tensors = [tensor for tensor, _ in keys]
    kinds = [type(op) for op in converter.operations] if converter else []
    if converter is None:
        return [_whole(tensors, name, shape, turned=False)]
    first = converter.operations[0]
    if kinds == [Transpose] and len(keys) == 1 and len(shape) == 3 and {first.dim0, first.dim1} == {1, 2}:
        return [_whole(tensors, name, shape, not (first.check_dims and tensors[0].shape == tuple(shape)))]
    if _is_plain_merge(converter, kinds):
        return _per_expert(name, keys, converter, shape)
    if kinds == [Concatenate] and len(shape) == 3 and first.dim == 1 and len(converter.target_patterns) == 1:
        return _stacks(name, keys, converter, shape)
    if sum(torch.Size(tensor.shape).numel() for tensor in tensors) > CONVERSION_ELEMENTS:
        raise CheckpointError(
            f"{name} is stored as {tensors[0].key} and {len(tensors) - 1} more behind a conversion "
            f"({', '.join(kind.__name__ for kind in kinds)}) that cannot be done in pieces; save the base "
            "with `save_pretrained(..., save_original_format=False)` and merge into that"
        )
    patterns = {tensor.key: str(pattern) for tensor, pattern in keys}
    return Conversion(tuple(tensors), tuple(_targets(name, converter)), model, converter, patterns)


def _whole(tensors: list[RawTensor], name: str, shape: torch.Size, turned: bool) -> Stored:
    if len(tensors) > 1:
        raise CheckpointError(
            f"{tensors[0].key} and {tensors[1].key} are both {name} in the model; the checkpoint is damaged"
        )
    (tensor,) = tensors
    seen = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]) if turned else tensor.shape
    if seen != tuple(shape):
        raise _wrong_shape(tensor, name, shape)
    return Stored(tensor, name, turned=turned)


def _is_plain_merge(converter: WeightConverter, kinds: list[type]) -> bool:
    """Whether it stacks experts, and joins rows, and does nothing else."""
    operations = converter.operations
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or operations[0].dim != 0:
        return False
    return len(kinds) == 1 or operations[1].dim == 1


def _per_expert(
    name: str, keys: list[tuple[RawTensor, str | None]], converter: WeightConverter, shape: torch.Size
) -> list[Stored]:
    by_pattern: dict[str, list[RawTensor]] = defaultdict(list)
    for tensor, pattern in keys:
        by_pattern[str(pattern)].append(tensor)
    found: list[Stored] = []
    rows, patterns = 0, converter.source_patterns
    for part, pattern in enumerate(patterns):
        tensors = by_pattern[pattern]
        if len(tensors) != shape[0]:
            raise CheckpointError(
                f"{name}: the checkpoint holds {len(tensors)} of {shape[0]} tensors `{pattern}`; files are "
                "missing, or the configuration names another number of experts"
            )
        height = tensors[0].shape[0]
        for expert, tensor in enumerate(tensors):
            if len(tensor.shape) != 2 or tensor.shape != (height, shape[2]):
                raise _wrong_shape(tensor, name, shape)
            found.append(Stored(tensor, name, expert, rows, part, len(patterns), one_expert=True))
        rows += height
    if rows != shape[1]:
        raise _wrong_shape(keys[0][0], name, shape)
    return found


def _stacks(
    name: str, keys: list[tuple[RawTensor, str | None]], converter: WeightConverter, shape: torch.Size
) -> list[Stored]:
    """Gate and up of all experts under one key each."""
    by_pattern = {str(pattern): tensor for tensor, pattern in keys}
    missing = [pattern for pattern in converter.source_patterns if pattern not in by_pattern]
    if missing or len(keys) != len(by_pattern):
        raise CheckpointError(
            f"{name}: the checkpoint holds {len(keys)} tensors, where one of each of "
            f"{converter.source_patterns} is expected; download it again"
        )
    found: list[Stored] = []
    rows, parts = 0, len(converter.source_patterns)
    for part, pattern in enumerate(converter.source_patterns):
        tensor = by_pattern[pattern]
        if len(tensor.shape) != 3 or (tensor.shape[0], tensor.shape[2]) != (shape[0], shape[2]):
            raise _wrong_shape(tensor, name, shape)
        found.append(Stored(tensor, name, 0, rows, part, parts))
        rows += tensor.shape[1]
    if rows != shape[1]:
        raise _wrong_shape(keys[0][0], name, shape)
    return found


def _wrong_shape(tensor: RawTensor, name: str, shape: torch.Size) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: {tensor.key} is {list(tensor.shape)}, which does not fit {name} of shape "
        f"{list(shape)}; the configuration is of another model"
    )
