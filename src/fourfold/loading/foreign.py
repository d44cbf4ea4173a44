"""Reading checkpoints that are quantized otherwise: MXFP4 (gpt-oss), block-FP8 (DeepSeek-V3, Qwen3-FP8).

The loader casts what it reads to the model's dtype, by value, which rounds scales. So the encoded tensors are
read from their files here, in their own dtype, matrix by matrix, and decoded on their device; the loader's
own reading is asked once per parameter, for the device. What comes out is in high precision and goes the way
of every other weight: experts are packed, Linears go to bitsandbytes or stay.

Everything that can be wrong with scales and shapes is found in the files' headers, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.experts import find_experts
from fourfold.experts.layout import read_layout
from fourfold.formats import PackedStack
from fourfold.formats.foreign import MX_BLOCK, decode_fp8, decode_mxfp4, e8m0
from fourfold.formats.quantize import Packer
from fourfold.loading.bnb_checkpoints import PerExpertBitsAndBytes
from fourfold.loading.converters import packed_parameters
from fourfold.loading.headers import Header
from fourfold.loading.stored import DecodingConverter, StoredTensors, Target, Unchanged, decoding

SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


class Fp8:
    """Tiles of FP8 with one scale each, under ``<key>_scale_inv``."""

    leftovers = (rf"{SCALE}$", r"activation_scale$", r"input_scale$")

    def __init__(self, settings: Mapping[str, Any], stored: StoredTensors) -> None:
        self.stored = stored
        block = settings.get("weight_block_size", (128, 128))
        self.bytes_are_exponents = settings.get("scale_fmt") == "ue8m0"
        if block is not None and not (
            isinstance(block, list | tuple)
            and len(block) == 2
            and all(isinstance(size, int) and size > 0 for size in block)
        ):
            raise ConfigurationError(
                f"weight_block_size={block!r} in config.json; rows and columns of a tile, as "
                "[128, 128], or null are expected"
            )
        self.block = None if block is None else (block[0], block[1])
        if settings.get("expert_dtype", "fp8") != "fp8":
            raise ConfigurationError(
                f"experts stored as {settings['expert_dtype']!r} inside an FP8 checkpoint cannot be read; "
                "take the bf16 version of the model"
            )
        for key, header in stored.headers.items():
            if header.dtype in _FP8:
                self._check(key, header)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8:
        return self

    def tiles(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a tile of a matrix (without block size: one tile is all of it)."""
        return self.block or (max(1, shape[0]), max(1, shape[1]))

    def _check(self, key: str, header: Header) -> None:
        if len(header.shape) != 2:
            raise CheckpointError(f"{header.file}: {key} is FP8 of shape {list(header.shape)}, no matrix")
        scale = self.stored.headers.get(key + SCALE)
        if scale is None:
            raise CheckpointError(
                f"{header.file}: {key} is FP8, but the checkpoint holds no {key}{SCALE}; it cannot be read "
                "without its scales. Download the checkpoint again"
            )
        if scale.dtype not in _SCALE_DTYPES and not (scale.dtype == "U8" and self.bytes_are_exponents):
            raise CheckpointError(
                f"{scale.file}: {key}{SCALE} is {scale.dtype}, where a scale in "
                f"{', '.join(_SCALE_DTYPES)} is expected"
            )
        rows, columns = self.tiles(header.shape)
        wanted = (-(-header.shape[0] // rows), -(-header.shape[1] // columns))
        one = self.block is None and torch.Size(scale.shape).numel() == 1
        if scale.shape != wanted and not one:
            raise CheckpointError(
                f"{scale.file}: {key}{SCALE} has shape {list(scale.shape)}, where {list(wanted)} is expected "
                f"for a weight of {list(header.shape)} in tiles of {rows} x {columns}"
            )

    def is_encoded(self, key: str) -> bool:
        return key in self.stored.headers and self.stored.headers[key].dtype in _FP8

    def decode(self, key: str, target: Target) -> torch.Tensor:
        codes = self.stored.read(key, target.device())
        scales = self.stored.read(key + SCALE, target.device())
        if scales.dtype == torch.uint8:
            scales = e8m0(scales)
        tiles = self.tiles(tuple(codes.shape))
        shape = [-(-size // tile) for size, tile in zip(codes.shape, tiles, strict=True)]
        return decode_fp8(codes, scales.view(shape), tiles, target.dtype)

    def place(self, converter: DecodingConverter, name: str, model: Any, quantizer: Any) -> None:
        return None  # always decoded

    def conversions(self, conversions: list[Any]) -> list[Any]:
        return decoding(conversions, self)


class Mxfp4:
    """Fused experts as ``<parameter>_blocks`` and ``<parameter>_scales``, out-by-in."""

    leftovers: tuple[str, ...] = ()

    def __init__(self, settings: Mapping[str, Any], stored: StoredTensors, leaves: Iterable[str]) -> None:
        self.stored, self._leaves = stored, list(leaves)
        for key, header in stored.headers.items():
            if key.endswith(tuple(leaf + BLOCKS for leaf in self._leaves)):
                self._check(key, header)
            if key.endswith(tuple(leaf + SCALES for leaf in self._leaves)):
                self._partner(key, SCALES, BLOCKS)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mxfp4:
        return self

    def _partner(self, key: str, suffix: str, other: str) -> Header:
        partner = key.removesuffix(suffix) + other
        if partner not in self.stored.headers:
            raise CheckpointError(
                f"{self.stored.headers[key].file}: {key} is MXFP4, but the checkpoint holds no {partner}; it "
                "cannot be read without. Download the checkpoint again"
            )
        return self.stored.headers[partner]

    def _check(self, key: str, header: Header) -> None:
        scales = self._partner(key, BLOCKS, SCALES)
        for name, dtype in ((key, header.dtype), (key.removesuffix(BLOCKS) + SCALES, scales.dtype)):
            if dtype != "U8":  # as F8_E8M0 or BF16, say, a scale is read by value and not as an exponent
                raise CheckpointError(f"{header.file}: {name} is {dtype}, where the bytes of MXFP4 are U8")
        if len(header.shape) != 4 or header.shape[-1] != MX_BLOCK // 2 or scales.shape != header.shape[:-1]:
            raise CheckpointError(
                f"{header.file}: {key} has shape {list(header.shape)} and its scales {list(scales.shape)}, "
                "where [experts, rows, columns/32, 16] and [experts, rows, columns/32] are expected"
            )

    def conversions(self, conversions: list[Any]) -> list[Any]:
        made = []
        for leaf in self._leaves:
            # One operation is required; `convert` is overridden, so it is never called.
            converter = Mxfp4Converter([leaf + BLOCKS, leaf + SCALES], [leaf], [Unchanged(self)])
            converter.source = self
            made.append(converter)
        return [*made, *conversions]


class Mxfp4Converter(WeightConverter):
    """Decodes the experts of one projection one by one; packs them where the target is packed."""

    __slots__ = ("blocks_key", "source")

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        if source_pattern.endswith(BLOCKS):
            self.blocks_key = source_key
        super().add_tensor(target_key, source_key, source_pattern, future)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        (scales_slice,) = self.collected_tensors.pop(self.source_patterns[1])
        self.collected_tensors.clear()  # the loader's blocks: never read
        device = Target(torch.uint8, scales_slice).device()
        found = None
        if self.quantization_operation is not None:
            found = hf_quantizer.packing_target(model, layer_name)
        if found is None:
            return {layer_name: self._whole(layer_name, model, device)}
        module, projection = found
        shape = projection.shape
        packer = Packer(PackedStack.empty(module.fourfold_format, shape, device), layer_name)
        for expert, w_NK in enumerate(self._experts(device, module.fourfold_dtype, shape.experts)):
            if w_NK.shape != (shape.rows, shape.columns):
                raise CheckpointError(
                    f"{self.source.stored.headers[self.blocks_key].file}: {self.blocks_key} holds experts of "
                    f"shape {tuple(w_NK.shape)}, but the model's configuration asks for "
                    f"{(shape.rows, shape.columns)}"
                )
            for part, matrix in enumerate(w_NK.chunk(shape.parts)):
                packer.pack_(expert, part, matrix)
        return packed_parameters(layer_name, packer.finish())

    def _experts(self, device: torch.device, dtype: torch.dtype, experts: int) -> Iterable[torch.Tensor]:
        """Each expert out-by-in, ``[N, K]``."""
        stored, key = self.source.stored, self.blocks_key
        if stored.headers[key].shape[0] != experts:
            raise CheckpointError(
                f"{stored.headers[key].file}: {key} holds {stored.headers[key].shape[0]} experts, but the "
                f"model's configuration asks for {experts}"
            )
        blocks = stored.slice(key)
        scales = stored.slice(key.removesuffix(BLOCKS) + SCALES)
        for e in range(experts):
            yield decode_mxfp4(blocks[e : e + 1].to(device), scales[e : e + 1].to(device), dtype)[0]

    def _whole(self, name: str, model: Any, device: torch.device) -> nn.Parameter:
        """In high precision, in the model's own orientation."""
        parameter = model.get_parameter(name)
        found = read_layout(model.get_submodule(name.rpartition(".")[0]))
        transposed = found is not None and found[0] is not None and found[0].is_transposed
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        for e, w_NK in enumerate(self._experts(device, parameter.dtype, len(whole))):
            if (w_NK.T if transposed else w_NK).shape != whole[e].shape:
                raise CheckpointError(
                    f"{self.source.stored.headers[self.blocks_key].file}: {self.blocks_key} holds experts of "
                    f"shape {tuple(w_NK.shape)}, which does not fit {name} of shape {tuple(whole.shape)}"
                )
            whole[e].copy_(w_NK.T if transposed else w_NK)
        return nn.Parameter(whole, requires_grad=False)


class ForeignCheckpoint:
    """What the quantizer asks of a checkpoint in another format.

    Args:
        method: ``quant_method`` of the stored configuration.
        settings: the stored configuration.
        model: on the meta device.
        headers: of the checkpoint's safetensors files.
        dtype: of the model.

    Raises:
        CheckpointError: scales are missing or have a wrong shape; there are no safetensors.
        ConfigurationError: a variant of the format that cannot be read.
    """

    def __init__(
        self,
        method: str,
        settings: Mapping[str, Any],
        model: PreTrainedModel,
        headers: Mapping[str, Header],
        dtype: torch.dtype,
    ) -> None:
        if not headers:
            raise CheckpointError(
                f"a checkpoint in {method} format is read from safetensors only; there are none"
            )
        self.stored = StoredTensors(headers, dtype)
        self._format: Fp8 | Mxfp4 | PerExpertBitsAndBytes
        if method == "mxfp4":
            self._format = Mxfp4(settings, self.stored, _projection_names(model))
        elif method == "fp8":
            self._format = Fp8(settings, self.stored)
        else:
            self._format = PerExpertBitsAndBytes(settings, self.stored)
        # Scales are read beside their weights, so no parameter takes them; they are not to be reported.
        self._ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(self._ignored or ()), *self._format.leftovers}

    @property
    def leftovers(self) -> tuple[str, ...]:
        """Patterns of keys that are read beside the weights they belong to."""
        return self._format.leftovers

    def conversions(self, conversions: list[Any]) -> list[Any]:
        """The model's converters, reading this format."""
        return self._format.conversions(conversions)

    def finish(self, model: PreTrainedModel) -> None:
        """Close the files."""
        self.stored.close()
        model._keys_to_ignore_on_load_unexpected = self._ignored


def _projection_names(model: PreTrainedModel) -> list[str]:
    names = (p.name for found in find_experts(model) if found.layout for p in found.layout.projections)
    return list(dict.fromkeys(names))
