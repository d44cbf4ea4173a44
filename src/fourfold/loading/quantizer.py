"""The quantizer: Linears go to transformers' own bitsandbytes quantizer, experts are packed.

It is reached through `register_quantizer`. What is patched in transformers is in `loading.patch`.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import expand_device_map
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from fourfold.errors import CheckpointError, ConfigurationError, NoExpertsError, UnsupportedExpertsError
from fourfold.experts import (
    FoundExperts,
    PackedExperts,
    Projection,
    find_experts,
    prepare_module_,
    prepare_reader_,
    release_readers_,
    unpack_module_,
)
from fourfold.experts.layout import name_suffix
from fourfold.experts.part import refuse_spread
from fourfold.formats import COMPANION_SUFFIXES
from fourfold.formats.quantize import FP16_MAX
from fourfold.loading import spread
from fourfold.loading.ahead import AheadReader, packed_tensors
from fourfold.loading.complete import (
    check_complete,
    check_finite,
    check_nothing_is_missing,
    refuse_offloading,
    refuse_spreading,
)
from fourfold.loading.config import MODEL_NAMES, MoeBitsAndBytesConfig
from fourfold.loading.converters import PackingConverter, QuantizeOperation, whole_names
from fourfold.loading.cpu_linears import flatten_inputs, keep_trainable, refuse_wrong_widths
from fourfold.loading.foreign import ForeignCheckpoint
from fourfold.loading.headers import Header, check_files, check_packed, check_plain
from fourfold.loading.mapping import MappedReader, refuse_unmapped
from fourfold.loading.origin import origin_of
from fourfold.loading.patch import stored_method
from fourfold.loading.shapes import check_shapes, expected_shapes
from fourfold.loading.skips import is_skipped, model_dtype, modules_to_skip
from fourfold.loading.stored import StoredTensors
from fourfold.offloading.api import (
    OffloadReport,
    receive_in_host_memory,
    stay_in_host_memory,
    stay_on_disk,
)
from fourfold.offloading.disk import keep_from_saving_over
from fourfold.offloading.host import HostMemory

IN_SHARDS = "_fourfold_in_shards"  # attribute of a class whose weights `distributed.load` reads


class FourfoldQuantizer(HfQuantizer):
    """Quantizes a model with a `MoeBitsAndBytesConfig`.

    Attributes:
        linears: transformers' bitsandbytes quantizer for Linears, or None where experts alone are quantized.
        packed: names of the packed experts modules.
        left_on_request: names of experts modules in high precision because the configuration says so.
        read_ahead_bytes: of what an `AheadReader` read of a packed checkpoint.
        in_shards: each rank of several reads its part of every tensor, and checks it (its class says so).
        spread: each rank of several holds some of the experts (expert parallelism).
        offloaded: where experts lie that were loaded with an ``experts_device``; else None.
    """

    requires_calibration = False
    quantization_config: MoeBitsAndBytesConfig

    def __init__(self, quantization_config: MoeBitsAndBytesConfig, **kwargs: Any) -> None:
        # (a copy: the base is noted in it, and one configuration may load several models)
        quantization_config = copy.copy(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.foreign: ForeignCheckpoint | None = None
        if quantization_config.read_from is not None:  # quantized, but not by us
            self.pre_quantized = False
        self.linears: HfQuantizer | None = None
        if quantization_config.is_linear_quantized:
            kind = Bnb8BitHfQuantizer if quantization_config.load_in_8bit else Bnb4BitHfQuantizer
            plain = quantization_config.linears_config(torch.float32)
            self.linears = kind(plain, pre_quantized=self.pre_quantized)
        self.packed: list[str] = []
        self.left_on_request: list[str] = []
        self._tied: dict[str, str] = {}
        self._original_conversions: list[Any] | None = None
        self._device_map: dict[str, Any] | None = None
        self._headers: Mapping[str, Header] = {}
        self._loading: weakref.ref[PreTrainedModel] | None = None
        self._ahead: AheadReader | MappedReader | None = None
        self.read_ahead_bytes = 0
        self.in_shards = False
        self.spread = False
        self._host: HostMemory | None = None
        self.offloaded: OffloadReport | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        # transformers logs what a conversion raises and goes on; the first error is kept and raised at the
        # end.
        self.failure: CheckpointError | None = None

    # --- before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):  # (called again when "auto" has become a map, after conversions)
            self._device_map = device_map
            if self._ahead is not None:
                self._ahead.device_map = device_map
        import bitsandbytes  # noqa: F401  (a dependency; registers the quantization operators)

        if self.linears is not None:
            self.linears.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        device_map = Bnb4BitHfQuantizer.update_device_map(self, device_map)
        if isinstance(device_map, dict):
            self._device_map = device_map
        return device_map

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        return {key: value * 0.90 for key, value in max_memory.items()}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        headers = check_files(model.name_or_path, kwargs.get("checkpoint_files") or ())
        self._headers, self._loading = headers, weakref.ref(model)
        self.in_shards = getattr(model, IN_SHARDS, False)
        spread.refuse_shards(model)
        if not self.pre_quantized:
            self.config.base = origin_of(model, kwargs.get("checkpoint_files") or ())
        requested = self.config.llm_int8_skip_modules
        experts = list(find_experts(model))
        self._refuse_unsupported(experts, requested)
        dtype = model_dtype(model)
        if self.config.read_from is not None:
            method = stored_method(self.config.read_from) or ""
            self.foreign = ForeignCheckpoint(method, self.config.read_from, model, headers, dtype)
        if self.linears is not None:
            plain = self.config.linears_config(dtype)
            plain.llm_int8_skip_modules = modules_to_skip(model, requested, experts)
            self.linears.quantization_config = plain
            self.linears._process_model_before_weight_loading(model, **kwargs)
            if not self.config.only_written:
                refuse_wrong_widths(model, kwargs.get("device_map"))
        fmt = self.config.experts_format()
        for found in experts:
            if fmt is None or is_skipped(found.name, requested):
                self.left_on_request.append(found.name)
                continue
            prepare_module_(
                found.module,
                fmt,
                name=found.name,
                dtype=dtype,
                compute_dtype=self.config.bnb_4bit_compute_dtype
                if self.config.compute_dtype_is_set
                else None,
                packed_on_disk=self.pre_quantized,
                layout=found.layout,
            )
            if found.reader != found.name:
                prepare_reader_(model.get_submodule(found.reader))
            self.packed.append(found.name)
        refuse_offloading(self.packed, kwargs.get("device_map"))
        if self.config.experts_device is not None and self.packed and not self.config.only_written:
            self._send_away(model, kwargs.get("device_map"))
        self._shapes = expected_shapes(model)
        if self.packed and spread.is_wanted(model):
            self._spread(model)
        if self.packed:
            self._tie_companions(model)
            self._check_headers(model, headers)
            return
        if self.linears is None:
            raise NoExpertsError(
                f"{type(model).__name__} has no fused experts to pack and neither load_in_4bit nor "
                "load_in_8bit is set for its Linears"
            )
        # Nothing here is ours: what is saved from this model is a plain bitsandbytes checkpoint. It says
        # which experts were left alone, so that `verify` knows when it is loaded again.
        self.quantization_config = self.linears.quantization_config
        left = {name_suffix(name) for name in self.left_on_request}
        self.quantization_config.llm_int8_skip_modules += sorted(left)

    def _send_away(self, model: PreTrainedModel, device_map: Any) -> None:
        """Experts go to host memory, or stay on disk."""
        refuse_spreading(device_map)
        self._host = HostMemory()
        if self.config.experts_device == "disk":
            refuse_unmapped(model.name_or_path, as_stored=self._names_are_the_models)
            return
        try:
            receive_in_host_memory([model.get_submodule(name) for name in self.packed], self._host)
        except ConfigurationError:
            if not (self.config.or_disk and self._names_are_the_models):
                raise
            self.config.experts_device = "disk"

    def _check_headers(self, model: PreTrainedModel, headers: Mapping[str, Header]) -> None:
        """The files must hold what the configuration says; found before a weight is read."""
        if self.foreign is not None or not headers:
            return
        check_plain(model, headers, converted=not self.pre_quantized)
        unpacked = check_packed(model, headers, complete=False) if self.pre_quantized else []
        if unpacked:
            raise CheckpointError(
                f"config.json says that experts are packed, but {unpacked[0]} and {len(unpacked) - 1} more "
                "are stored in high precision; take quantization_config out of config.json, or the right "
                "files"
            )
        if self._names_are_the_models:
            check_nothing_is_missing(model, headers.keys())

    def _spread(self, model: PreTrainedModel) -> None:
        if self._host is not None or self.foreign is not None:
            on_host = self._host is not None
            what = (
                f"experts_device={self.config.experts_device!r}"
                if on_host
                else "a checkpoint in another quantized format"
            )
            remedy = (
                "leave one of the two out"
                if on_host
                else "pack it first by `fourfold quantize`, and load what that writes"
            )
            raise ConfigurationError(
                f"{what} and experts that are spread over the ranks (ep_size) do not go together: {remedy}"
            )
        spread.plan_(model, self.packed)
        self.spread = True

    def _refuse_unsupported(self, experts: list[FoundExperts], requested: list[str] | None) -> None:
        if self.config.experts_format() is None:
            return
        refused = [f for f in experts if f.layout is None and not is_skipped(f.name, requested)]
        if refused:
            first = refused[0]
            patterns = list(dict.fromkeys(name_suffix(f.name) for f in refused))
            raise UnsupportedExpertsError(
                f"{first.name} ({type(first.module).__name__}, and {len(refused) - 1} more) cannot be "
                f"packed: {first.reason}. To leave such experts in high precision on purpose, pass "
                f"llm_int8_skip_modules={patterns} or experts_quant_type='none'"
            )

    def _tie_companions(self, model: PreTrainedModel) -> None:
        """Experts that share weights with others (an encoder's with its decoder's) share the scales too."""
        ties = getattr(model, "all_tied_weights_keys", None) or {}
        for name in self.packed:
            module = model.get_submodule(name)
            assert isinstance(module, PackedExperts)
            for projection in module.fourfold_layout.projections:
                source = ties.get(f"{name}.{projection.name}")
                if source is None:
                    continue
                for suffix in projection.shape.tensors(module.fourfold_format):
                    self._tied[f"{name}.{projection.name}{suffix}"] = source + suffix
        ties.update(self._tied)

    # --- while loading

    def packing_target(self, model: PreTrainedModel, name: str) -> tuple[PackedExperts, Projection] | None:
        """The packed module and projection that parameter ``name`` belongs to; None for everything else."""
        path, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return None
        if not isinstance(module, PackedExperts):
            return None
        projection = module.fourfold_layout.projection(leaf)
        return None if projection is None else (module, projection)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if self.packing_target(model, param_name) is not None:
            return not self.pre_quantized
        return self.linears is not None and self.linears.param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element, for device maps and the allocator's warm-up."""
        found = self.packing_target(model, param_name)
        if found is not None:
            module, projection = found
            if self._host is not None:
                return 0  # (none of them on a device)
            shape, dtype = projection.shape.tensors(module.fourfold_format)[""]
            return torch.Size(shape).numel() * dtype.itemsize / param.numel()
        if self.linears is not None:
            return self.linears.param_element_size(model, param_name, param)
        return param.element_size()

    def get_quantize_ops(self) -> QuantizeOperation:
        return QuantizeOperation(self)

    def quantize_linear(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        assert self.linears is not None
        eight = self.config.load_in_8bit
        limit = FP16_MAX if eight else torch.finfo(torch.float32).max
        for name, value in input_dict.items():  # bitsandbytes makes some numbers of NaN, without a word
            low, high = torch.aminmax(value[0] if isinstance(value, list) else value)
            if eight:  # as what is quantized
                low, high = low.to(torch.float16), high.to(torch.float16)
            if not ((low.float() >= -limit) & (high.float() <= limit)):
                skip = f"use load_in_4bit, or llm_int8_skip_modules=[{name.rpartition('.')[0]!r}]"
                self.failure = self.failure or CheckpointError(
                    f"{name}: weights are NaN or infinite"
                    f"{' or beyond the range of fp16 that INT8 quantization goes through' if eight else ''}; "
                    f"the checkpoint is damaged, {f'or {skip}' if eight else 'get another copy'}"
                )
        if eight and not self.config.llm_int8_has_fp16_weight:
            return {name: self._linear_int8(name, value, **kwargs) for name, value in input_dict.items()}
        return self.linears.get_quantize_ops().convert(input_dict, **kwargs)

    def _linear_int8(self, name: str, value: Any, model: PreTrainedModel, **kwargs: Any) -> nn.Parameter:
        """What transformers' own operation makes, without its way over the CPU (a fifth of loading)."""
        import bitsandbytes as bnb

        weight = value[0] if isinstance(value, list) else value
        module, _ = get_module_from_name(model, name)
        if issubclass(module.source_cls, Conv1D):  # holds its weight transposed
            weight = weight.T
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=absmax)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Per-expert merges become streaming packers; bitsandbytes' reading of packed Linears is added."""
        conversions = [] if self._names_are_the_models else list(weight_conversions)
        if not self.pre_quantized:
            conversions = [
                PackingConverter.wrap(c) if isinstance(c, WeightConverter) else c for c in conversions
            ]
        if self.foreign is not None:
            conversions = self.foreign.conversions(conversions)
        if self.linears is not None:
            conversions += [whole_names(c) for c in self.linears.get_weight_conversions()]
        if model is None and self._loading is not None:  # older versions do not say
            model = self._loading()
        if (
            self._names_are_the_models
            and self.packed
            and model is not None
            and not (self.in_shards or self.spread)  # (it reads whole tensors)
        ):
            wanted = packed_tensors(model, self.packed)
            if self.config.experts_device == "disk" and self._host is not None:
                self._ahead = MappedReader(self._headers, wanted, self._host)
            else:
                stored = StoredTensors(self._headers, model_dtype(model))
                self._ahead = AheadReader(stored, wanted, self._device_map, self._host)
            conversions += self._ahead.converters()
        return conversions

    # --- after loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._ahead is not None:
            self.read_ahead_bytes = self._ahead.nbytes
            self._ahead.close()
            self._ahead = None
        self._loading, self._headers = None, {}
        if self.foreign is not None:
            self.foreign.finish(model)
        if self.failure is not None:
            raise self.failure
        if self.spread:
            spread.wrap_(model, self.packed)
        if not (self.config.only_written or self.in_shards):  # (whoever streams has checked all weights)
            refuse_offloading(self.packed, getattr(model, "hf_device_map", None))
            check_complete(model, self.packed)
            check_nothing_is_missing(model)
            check_finite(model)
            for name, module in model.named_modules():
                check_shapes(module, f"{name}." if name else "", self._shapes)
        if self.spread:
            spread.spread_(model, self.packed)
        if self._host is not None:
            refuse_spreading(getattr(model, "hf_device_map", None))
            on_disk = self.config.experts_device == "disk"
            stay = stay_on_disk if on_disk else stay_in_host_memory
            self.offloaded, self._host = stay(model, self._host, self._computing_device), None
            if on_disk:
                keep_from_saving_over(model)
        if self.linears is not None:
            model = self.linears._process_model_after_weight_loading(model, **kwargs)
            keep_trainable(model)
            flatten_inputs(model)
        fmt = self.config.experts_format() if self.packed else None
        if fmt is not None and self.linears is None:
            setattr(model, "is_loaded_in_4bit" if fmt.is_4bit else "is_loaded_in_8bit", True)
        # transformers, Trainer and Accelerate guard quantized models (no `.to(dtype)`, adapters required) by
        # this.
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        self._set_conversions_for_saving(model)
        return model

    def _computing_device(self, name: str) -> torch.device:
        """Where the device map puts the module called ``name``."""
        return torch.device(expand_device_map(self._device_map, [name])[name])

    def _set_conversions_for_saving(self, model: PreTrainedModel) -> None:
        """What is packed is saved under the names that the model itself has, without any conversion.

        The reverse of a conversion would split or merge packed bytes, and renamings made for weights do not
        fit their companions (`x.weight_proj` for `x.weight_proj.weight`, and `x.weight_proj.SCB`).
        bitsandbytes' reading of Linears has no reverse at all (saving a reloaded model raises
        NotImplementedError in stock transformers). What was used while loading is kept for `dequantize`.
        """
        conversions = getattr(model, "_weight_conversions", None) or []
        if not self.packed:  # a plain bitsandbytes checkpoint, as stock would write it
            model._weight_conversions = [c for c in conversions if not _reads_linears(c)]
            return
        if not self.pre_quantized:  # (of a packed checkpoint, the default ones lead to the original keys)
            self._original_conversions = [c for c in conversions if not _reads_linears(c)]
        self.config.tensor_names = MODEL_NAMES
        model._weight_conversions = []

    @property
    def _names_are_the_models(self) -> bool:
        return self.pre_quantized and self.config.tensor_names == MODEL_NAMES

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    # --- back

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The same numbers in high precision, in the model's own classes; all of it in ``dtype`` if given.

        (Handles ``config.dtype`` as a string, which `save_pretrained` makes of it and stock code then trips
        over.)
        """
        if getattr(model, "peft_config", None):
            raise ConfigurationError(
                "take the adapter off first (`model.unload()`), then dequantize the base model: its layers "
                "compute with packed experts only"
            )
        loaded_in = model.config.dtype or torch.float32
        if isinstance(loaded_in, str):
            loaded_in = getattr(torch, loaded_in)
        wanted = dtype or loaded_in
        model = super().dequantize(model, dtype=wanted)
        if wanted != loaded_in:  # the rest of the model follows, or its products would mix dtypes
            for tensor in itertools.chain(model.parameters(), model.buffers()):
                if tensor.dtype == loaded_in:
                    tensor.data = tensor.data.to(wanted)
            model.config.dtype = wanted
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        refuse_spread(
            model, "no rank has all of them to unpack", "Load the model without ep_size, and dequantize that"
        )
        for module in list(model.modules()):
            if isinstance(module, PackedExperts):
                unpack_module_(module, dtype or module.fourfold_dtype)
        release_readers_(model)
        if self._tied:
            for companion in [n for n in self._tied if n.endswith(COMPANION_SUFFIXES)]:
                model.all_tied_weights_keys.pop(companion, None)
            model.tie_weights()
        has_linears = any(hasattr(p, "quant_state") or hasattr(p, "SCB") for p in model.parameters())
        if self.linears is not None and has_linears:  # (stock fails where it finds none)
            model = self.linears._dequantize(model, dtype=dtype)
        # (None: the model's default conversions, as for a model that was made in memory)
        model._weight_conversions = self._original_conversions if self.packed else model._weight_conversions
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(model, flag):
                delattr(model, flag)
        model.fourfold_dequantized = True  # (it goes on naming the checkpoint whose numbers it has no more)
        return model


def _reads_linears(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(getattr(op, "hf_quantizer", None) is not None for op in operations)
