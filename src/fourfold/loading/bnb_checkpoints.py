"""Checkpoints of transformers v4 with bitsandbytes: every expert a Linear, quantized by itself.

Such a Linear is stored as

- ``X.weight``: two codes a byte, uint8 ``[n, 1]`` (or the same bytes under another dtype);
- ``X.weight.absmax``: fp32, one for 64 (the block size) weights in row-major order; double-quantized uint8,
  with ``X.weight.nested_absmax`` fp32, one for 256 of them, and the code map ``X.weight.nested_quant_map``;
- ``X.weight.quant_map``: the 16 values of the codes;
- ``X.weight.quant_state.bitsandbytes__nf4`` (or ``fp4``): JSON as uint8: shape, block sizes, offset.

Fourfold's storage holds the same bytes expert by expert, so packed experts take them as they are; nothing is
decoded, nothing is rounded. Linears take them likewise. What the model has as a plain parameter (a router
that was a Linear then) and what is skipped on request is decoded.

Where a row is no multiple of the block size, blocks straddle rows in such files. Those of Fourfold never do:
quantizing a second time would add a second rounding to every weight, so such experts are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourfold.errors import CheckpointError, ConfigurationError, StoredFormatError
from fourfold.experts import PackedExperts, Projection
from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.codebooks import absmax_codes, four_bit_codes
from fourfold.formats.packed import ABSMAX_GROUP
from fourfold.loading.converters import packed_parameters
from fourfold.loading.stored import DecodingConverter, StoredTensors, Target, decoding

STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class State:
    """How one matrix is stored.

    Attributes:
        fmt: type, block size, double quantization.
        shape: of the matrix.
        offset: mean of its absmax (double-quantized).
    """

    fmt: PackFormat
    shape: tuple[int, ...]
    offset: float | None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.fmt.blocksize)


class PerExpertBitsAndBytes:
    """Reads the tensors above.

    Args:
        settings: the stored configuration.
        stored: the checkpoint's files.

    Raises:
        CheckpointError: a tensor is missing, has another shape than its state says, or the state is no JSON.
        ConfigurationError: the checkpoint is quantized to 8 bit.
    """

    leftovers = (
        r"\.(nested_)?absmax$",
        r"\.(nested_)?quant_map$",
        r"\.quant_state\.bitsandbytes__(nf4|fp4)$",
    )

    def __init__(self, settings: Mapping[str, Any], stored: StoredTensors) -> None:
        self.stored = stored
        if settings.get("load_in_8bit") or any(key.endswith(".SCB") for key in stored.headers):
            raise ConfigurationError(
                "the checkpoint holds Linears in bitsandbytes' INT8; only its 4-bit checkpoints are read. "
                "Take the model in bf16"
            )
        self.states: dict[str, State] = {}
        for key in list(stored.headers):
            weight, found, quant_type = key.partition(STATE)
            if found:
                self.states[weight] = self._read_state(weight, quant_type)
        for key, header in stored.headers.items():
            if key.endswith(".weight") and header.dtype == "U8" and key not in self.states:
                raise CheckpointError(
                    f"{header.file}: {key} is packed, but the checkpoint holds no {key}{STATE}nf4 or fp4; it "
                    "cannot be read without. Download the checkpoint again"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> PerExpertBitsAndBytes:
        return self

    def _read_state(self, key: str, quant_type: str) -> State:
        name = f"{key}{STATE}{quant_type}"
        where = self.stored.headers[name].file
        try:
            found = json.loads(bytes(self.stored.read(name, _CPU).tolist()))
            nested = "nested_blocksize" in found
            shape = tuple(int(size) for size in found["shape"])
            offset = float(found["nested_offset"]) if nested else None
            fmt = PackFormat(found["quant_type"], int(found["blocksize"]), nested)
            group = int(found["nested_blocksize"]) if nested else ABSMAX_GROUP
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{where}: {name} is no state of a 4-bit weight ({error!r})") from error
        if fmt.quant_type != quant_type or fmt.quant_type not in TYPES or group != ABSMAX_GROUP:
            raise CheckpointError(f"{where}: {name} says {fmt} in groups of {group}, which cannot be read")
        state = State(fmt, shape, offset)
        self._check_sizes(key, state)
        return state

    def _check_sizes(self, key: str, state: State) -> None:
        nested = state.fmt.double_quant
        wanted = {
            "": ("", -(-state.numel // 2)),
            ".absmax": ("U8" if nested else "F32", state.blocks),
            ".quant_map": ("F32", 16),
        }
        if nested:
            wanted[".nested_absmax"] = ("F32", -(-state.blocks // ABSMAX_GROUP))
            wanted[".nested_quant_map"] = ("F32", 256)
        for suffix, (dtype, count) in wanted.items():
            header = self.stored.headers.get(key + suffix)
            if header is None:
                raise CheckpointError(
                    f"the checkpoint holds no {key}{suffix}, without which {key} cannot be read. Download "
                    "it again"
                )
            size = torch.Size(header.shape).numel()
            if not dtype:  # packed bytes, under whatever dtype
                size *= {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}.get(header.dtype, 0)
            if size != count or (dtype and header.dtype != dtype):
                raise CheckpointError(
                    f"{header.file}: {key}{suffix} is {header.dtype} {list(header.shape)}, where "
                    f"{dtype or 'bytes'} [{count}] is expected for {list(state.shape)} in {state.fmt}"
                )

    # --- what `stored.Source` asks for

    def is_encoded(self, key: str) -> bool:
        return key in self.states

    def conversions(self, conversions: list[Any]) -> list[Any]:
        return decoding(conversions, self)

    def decode(self, key: str, target: Target) -> torch.Tensor:
        """The matrix in high precision. (As a stack of one-block rows: blocks may straddle its own rows.)"""
        state = self.states[key]
        b = state.fmt.blocksize
        tensors = {suffix: t.to(target.device()) for suffix, t in self.tensors(key).items()}
        data = tensors[""]
        data = torch.nn.functional.pad(data, (0, state.blocks * b // 2 - len(data))).view(1, -1, b // 2)
        shaped = {"": data, "_absmax": tensors["_absmax"].view(1, -1, 1)}
        if state.fmt.double_quant:
            shaped["_absmax_scale"] = tensors["_absmax_scale"].view(1, 1, -1)
            shaped["_absmax_offset"] = tensors["_absmax_offset"].view(1, 1)
        stack = PackedStack.from_tensors(state.fmt, StackShape(1, state.blocks, b), shaped)
        return decode_stack(stack, target.dtype).flatten()[: state.numel].view(state.shape)

    def place(
        self, converter: DecodingConverter, name: str, model: Any, quantizer: Any
    ) -> dict[str, Any] | None:
        """Bytes as they are, into packed experts and 4-bit Linears."""
        keys = converter.encoded_keys()
        flat = [key for of_pattern in keys for key in of_pattern]
        if converter.quantization_operation is None or not any(flat):
            return None
        found = quantizer.packing_target(model, name)
        device = converter.target.device()
        if found is not None:
            if not converter.is_plain_merge() or not found[0].fourfold_layout.is_out_by_in(found[1]):
                raise CheckpointError(
                    f"{name}: packed experts of this checkpoint are put together by more than stacking, "
                    "which packed bytes do not allow; take the model in bf16"
                )
            placed = self._experts(name, keys, *found)
            converter.collected_tensors.clear()
            return {
                n: nn.Parameter(p.data.to(device), requires_grad=False)
                for n, p in packed_parameters(name, placed).items()
            }
        if len(flat) != 1:
            raise CheckpointError(
                f"{name} is put together from {len(flat)} packed tensors ({', '.join(map(str, flat[:3]))}), "
                "which cannot be done without rounding twice; take the model in bf16"
            )
        (key,) = flat
        assert key is not None
        converter.collected_tensors.clear()
        return {name: self._linear(key, name, model, device, quantizer)}

    # --- bytes

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """The stored tensors of one matrix, flat, under Fourfold's suffixes.

        Raises:
            CheckpointError: its code maps are not those of its format.
        """
        self._check_code_maps(key)
        state = self.states[key]
        nested = state.fmt.double_quant
        absmax = self.stored.read(key + ".absmax", _CPU).flatten()
        found = {"": self.stored.read(key, _CPU).contiguous().view(torch.uint8).flatten()}
        if not nested:
            return found | {"_absmax": absmax.contiguous().view(torch.int32)}
        scale = self.stored.read(key + ".nested_absmax", _CPU).flatten().contiguous()
        offset = torch.tensor([state.offset], dtype=torch.float32)
        return found | {
            "_absmax": absmax,
            "_absmax_scale": scale.view(torch.int32),
            "_absmax_offset": offset.view(torch.int32),
        }

    def _check_code_maps(self, key: str) -> None:
        fmt = self.states[key].fmt
        maps = {".quant_map": four_bit_codes(fmt.quant_type, _CPU)}
        if fmt.double_quant:
            maps[".nested_quant_map"] = absmax_codes(_CPU)
        for suffix, table in maps.items():
            if not torch.equal(self.stored.read(key + suffix, _CPU).flatten(), table):
                raise CheckpointError(
                    f"{self.stored.headers[key].file}: {key}{suffix} is not the code map of {fmt}; such a "
                    "weight cannot be read"
                )

    def _experts(
        self, name: str, keys: list[list[str | None]], module: PackedExperts, projection: Projection
    ) -> PackedStack:
        shape, fmt = projection.shape, module.fourfold_format
        E, P = shape.experts, shape.parts
        counts = [len(of_pattern) for of_pattern in keys]
        if counts != [E] * P:
            raise CheckpointError(
                f"{name}: the checkpoint holds {counts} packed tensors of experts, where {P} times {E} are "
                "expected; files are missing"
            )
        stack = PackedStack.empty(fmt, shape, _CPU)
        for part, of_pattern in enumerate(keys):
            for expert, key in enumerate(of_pattern):
                if key is None:
                    raise CheckpointError(
                        f"{name}: expert {expert} is in high precision, others are packed; such a mixture "
                        "cannot be read"
                    )
                self._check_expert(key, fmt, shape)
                tensors = self.tensors(key)
                for suffix, storage in stack.tensors():
                    storage.view(E * P, -1)[expert * P + part].copy_(tensors[suffix])
        return stack

    def _check_expert(self, key: str, fmt: PackFormat, shape: StackShape) -> None:
        state, file = self.states[key], self.stored.headers[key].file
        wanted = (shape.rows // shape.parts, shape.columns)
        if state.shape != wanted:
            raise CheckpointError(
                f"{file}: {key} has shape {state.shape}, but the model's configuration asks for {wanted}"
            )
        if state.fmt != fmt:
            settings = {
                "experts_quant_type": state.fmt.quant_type,
                "experts_blocksize": state.fmt.blocksize,
                "bnb_4bit_use_double_quant": state.fmt.double_quant,
            }
            raise StoredFormatError(f"experts are {state.fmt} ({key})", str(fmt), settings)
        if shape.columns % fmt.blocksize:
            raise CheckpointError(
                f"{file}: {key} has rows of {shape.columns}, no multiple of the block size {fmt.blocksize}, "
                "so its blocks straddle rows and cannot be taken over without rounding twice. Quantize the "
                "model from bf16, or pass experts_quant_type='none' to have its experts in high precision"
            )

    def _linear(self, key: str, name: str, model: Any, device: torch.device, quantizer: Any) -> Any:
        import bitsandbytes as bnb

        module = model.get_submodule(name.rpartition(".")[0])
        state, config = self.states[key], quantizer.config
        wanted = (module.out_features, module.in_features)
        if state.shape != wanted:
            raise CheckpointError(
                f"{self.stored.headers[key].file}: {key} has shape {state.shape}, but the model's "
                f"configuration asks for {wanted}"
            )
        asked = (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
        if not isinstance(module, bnb.nn.Linear4bit) or asked != (
            state.fmt.quant_type,
            state.fmt.double_quant,
        ):
            settings = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": state.fmt.quant_type,
                "bnb_4bit_use_double_quant": state.fmt.double_quant,
            }
            raise StoredFormatError(f"Linears are {state.fmt} ({key})", "something else", settings)
        self._check_code_maps(key)  # bitsandbytes decodes with whatever is stored
        suffixes = [".absmax", ".quant_map", f"{STATE}{state.fmt.quant_type}"]
        suffixes += [".nested_absmax", ".nested_quant_map"] * state.fmt.double_quant
        made = bnb.nn.Params4bit.from_prequantized(
            data=self.stored.read(key, device),
            quantized_stats={"weight" + s: self.stored.read(key + s, device) for s in suffixes},
            requires_grad=False,
            device=device,
            module=module,
        )
        module._is_hf_initialized = True
        return made
