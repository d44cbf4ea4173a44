"""Packing while the checkpoint is read.

transformers maps checkpoint keys to model parameters with converters: for a per-expert checkpoint it collects
the slices of all experts, stacks gate and up, concatenates them, and hands the fused bf16 tensor to the
quantizer, so that twice that tensor is in memory (Qwen3-30B 1.5 GiB, DeepSeek-V3 28 GiB). `PackingConverter`
takes the collected slices one by one, packs them into preallocated storage a few megabytes at a time and lets
go of them. Files that hold experts fused already come through `QuantizeOperation`, one projection of one
layer at a time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from fourfold.errors import CheckpointError
from fourfold.experts import PackedExperts, Projection
from fourfold.formats import PackedStack
from fourfold.formats.quantize import Packer, pack_stack
from fourfold.loading.reading import THREADS, Slice, read_slices, staged
from fourfold.loading.spread import own_projection
from fourfold.loading.staging import read_groups

if TYPE_CHECKING:
    from fourfold.loading.quantizer import FourfoldQuantizer


def packed_parameters(full_name: str, stack: PackedStack) -> dict[str, nn.Parameter]:
    """The stored tensors of a projection under their full names, frozen.

    (A plain tensor that is returned to the loader becomes a trainable parameter if it is floating point.)
    """
    return {full_name + suffix: nn.Parameter(t, requires_grad=False) for suffix, t in stack.tensors()}


_Converter = TypeVar("_Converter", bound=WeightConverter)


def copy_of(converter: _Converter) -> _Converter:
    """The loader copies a converter for every key (18,000 in Qwen3-30B-A3B), and keeps one a projection.

    What is collected is the copy's own; patterns and operations never change and are shared (a full copy
    took a fifth of loading).
    """
    made = object.__new__(type(converter))
    for cls in type(made).__mro__:
        for name in getattr(cls, "__slots__", ()):
            if hasattr(converter, name):
                object.__setattr__(made, name, getattr(converter, name))
    object.__setattr__(made, "collected_tensors", defaultdict(list))
    object.__setattr__(made, "layer_targets", defaultdict(set))
    return made


class PackingConverter(WeightConverter):
    """A per-expert merge of the model's own mapping that packs instead of merging where the target is packed.

    Patterns hold for the whole model, packing is decided per module: targets that are not packed (skipped
    modules) and chains of operations that are not a plain merge go through the original operations.
    """

    __slots__ = ()

    @classmethod
    def wrap(cls, converter: WeightConverter) -> PackingConverter:
        """A copy of ``converter`` that packs. Pattern by pattern, so scopes and prefixes are the same."""
        copy = cls(
            source_patterns=list(converter._original_source_patterns),
            target_patterns=list(converter._original_target_patterns),
            operations=converter.operations,
        )
        copy.scope_prefix, copy.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        if hasattr(converter, "force_cpu"):
            copy.force_cpu = converter.force_cpu
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> PackingConverter:
        return copy_of(self)

    def is_plain_merge(self) -> bool:
        """Whether it stacks experts, and gate on up, and does nothing else."""
        kinds = [type(op) for op in self.operations]
        merge = kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and self.operations[0].dim == 0
        return merge and (len(kinds) == 1 or self.operations[1].dim == 1)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        found = (
            hf_quantizer.packing_target(model, layer_name)
            if self.quantization_operation is not None
            else None
        )
        if found is not None and self.is_plain_merge() and found[0].fourfold_layout.is_out_by_in(found[1]):
            return self._convert_streaming(layer_name, *found)
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)

    def _convert_streaming(
        self, layer_name: str, module: PackedExperts, projection: Projection
    ) -> dict[str, nn.Parameter]:
        whole = projection.shape.experts
        projection, own = own_projection(module, projection)
        shape = projection.shape
        sources: list[list[Slice]] = []
        for pattern in self.source_patterns:
            slices = list(self.collected_tensors.pop(pattern, []))
            if len(slices) != whole:
                raise CheckpointError(
                    f"{layer_name}: the checkpoint holds {len(slices)} of {whole} tensors "
                    f"`{pattern}`; files are missing, or the configuration names another number of experts"
                )
            sources.append(slices if own is None else slices[slice(*own.of(whole))])
        count = len(sources)
        flat = list(itertools.chain.from_iterable(zip(*sources, strict=True)))
        packer: Packer | None = None
        known = staged(flat) if count == shape.parts else None
        if known is not None:  # neighbours in a batch arrive, and are packed, together
            stack = PackedStack.empty(module.fourfold_format, shape, known[0].device)
            packer = Packer(stack, layer_name)
            del sources, slices, flat
            for w_MnK in read_groups(known, THREADS):
                packer.pack_batch_(w_MnK)
                del w_MnK
            return packed_parameters(layer_name, packer.finish())
        matrices = read_slices(iter(flat))
        del sources, slices, flat  # every slice is let go of when it is packed
        for expert in range(shape.experts):
            parts: Iterable[torch.Tensor | None] = itertools.islice(matrices, count)
            if count != shape.parts:  # the file cuts gate and up otherwise
                parts = torch.cat([m for m in parts if m is not None]).chunk(shape.parts)
            for part, matrix in enumerate(parts):
                if matrix is None:
                    raise CheckpointError(
                        f"{layer_name}: expert {expert} was not read; sharded loading is not supported"
                    )
                if packer is None:
                    stack = PackedStack.empty(module.fourfold_format, shape, matrix.device)
                    packer = Packer(stack, layer_name)
                packer.pack_(expert, part, matrix)
                del matrix
        assert packer is not None
        return packed_parameters(layer_name, packer.finish())


class QuantizeOperation(ConversionOps):
    """What the loader calls with each merged tensor: packs experts, leaves Linears to bitsandbytes."""

    def __init__(self, quantizer: FourfoldQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizeOperation:
        return self  # the loader copies operations for every checkpoint key

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            found = self.quantizer.packing_target(model, name)
            if found is None:
                result |= self.quantizer.quantize_linear({name: value}, model=model, **kwargs)
                continue
            module, projection = found[0], own_projection(*found)[0]
            weight = value[0] if isinstance(value, list) else value
            stack = PackedStack.empty(module.fourfold_format, projection.shape, weight.device)
            try:
                pack_stack(stack, module.fourfold_layout.to_stack(weight, projection), name)
            except CheckpointError as error:
                self.quantizer.failure = self.quantizer.failure or error
                continue
            result |= packed_parameters(name, stack)
        return result


# bitsandbytes' names of a packed Linear are patterns that match anywhere in a key, so in a module's name
# as well (`inject_weight.weight.absmax`): here they match whole components.
_BEGIN, _END = r"(?<=\.)", r"(?!\w)"


class ReadLinearOperation(ConversionOps):
    """bitsandbytes' own reading of a packed Linear, behind patterns that match whole names."""

    def __init__(self, operation: Any) -> None:
        self.operation, self.hf_quantizer = operation, operation.hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadLinearOperation:
        return self

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        plain = {
            key.removeprefix(_BEGIN).removesuffix(_END).replace(r"\.", "."): value
            for key, value in input_dict.items()
        }
        result: dict[str, Any] = self.operation.convert(plain, **kwargs)
        return result


def whole_names(converter: WeightConverter) -> WeightConverter:
    """A converter that reads packed Linears, matching whole components of a key only."""
    names = sorted(converter._original_source_patterns, key=len, reverse=True)
    return WeightConverter(
        source_patterns=[_BEGIN + name.replace(".", r"\.") + _END for name in names],
        target_patterns=list(converter._original_target_patterns),
        operations=[ReadLinearOperation(op) for op in converter.operations],
    )
