"""Loading a model of which each rank reads, packs and keeps only its shard.

transformers' own `from_pretrained` runs from beginning to end on every rank (`loading.stream` says how), and
what it hands on goes layer by layer:

- of packed experts a rank reads its own: a layer's module is taken for one of fewer experts, and the loader
  is shown the files of those alone, so that the very code that packs a whole model packs a part of it;
- big tensors that are read as they are (embeddings, output layer) are read from this rank's first row to its
  last;
- everything else is small: a layer's share of it is read whole, quantized, and cut.

What is kept are distributed tensors (`DTensor`, cut along the first axis), which `shard` takes over into
FSDP2, and adapters are added to before that. Where experts have to be converted by more than stacking (a
foreign quantized format, matrices that lie in-by-out in per-expert files), one projection of one layer is
packed whole and then cut.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model, dot_natural_key

from fourfold.distributed.blocks import is_whole_on_every_rank, linear_settings, with_settings
from fourfold.distributed.cut import CutSlice, as_part
from fourfold.distributed.local_shards import from_shard
from fourfold.distributed.sharding import device_mesh, shards_of
from fourfold.distributed.together import together
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.experts.part import Part
from fourfold.formats import COMPANION_SUFFIXES
from fourfold.loading.complete import check_finite
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.converters import PackingConverter
from fourfold.loading.cpu_linears import refuse_wrong_widths
from fourfold.loading.quantize import concrete_class
from fourfold.loading.quantizer import IN_SHARDS, FourfoldQuantizer
from fourfold.loading.shapes import check_shapes
from fourfold.loading.skeleton import read_config
from fourfold.loading.stream import Progress, Stream, open_slices, quiet_bars

# Tensors above are read by rows where nothing but reading is to be done.
_BIG = 2**22
_LAYER = re.compile(r"^.*?\.\d+(?=\.)")


def load_sharded(
    model: str | Path,
    mesh: DeviceMesh | None = None,
    *,
    quantization_config: MoeBitsAndBytesConfig | None = None,
    device: torch.device | str | None = None,
    model_class: type[PreTrainedModel] | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """`from_pretrained` of which each rank reads, packs and keeps only its shard.

    Called on every rank. Then `prepare`, adapters and `fourfold.distributed.shard`, as with a whole model.

    Args:
        model: local folder or hub id, in high precision or packed.
        mesh: of one axis (or replicas by shards); None takes all ranks.
        quantization_config: how to pack; None for a packed checkpoint, which says so itself.
        device: where shards lie; None is this rank's device, the CPU where they are offloaded to it.
        model_class: None takes the class that the checkpoint names.
        progress: is called with parameters done, their total and the name of the next one.
        arguments: further ones of `from_pretrained`, ``dtype`` for example.

    Returns:
        The model; its big parameters are distributed tensors, buffers and 8-bit Linears are whole.

    Raises:
        CheckpointError: a tensor is missing, of a wrong shape, or not finite.
        ConfigurationError: an ``experts_device``, or the checkpoint is not packed and nothing says how to.
        TrainingError: a rank ran out of memory, with its number.
        FourfoldError: what loading with this configuration raises; where only another rank failed, a
            `CheckpointError` with its number.
    """
    mesh = mesh or device_mesh()
    if device is None:
        device = torch.device("cpu")
        if mesh.device_type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
    source = Path(model).expanduser()
    with together(f"{model} was not loaded", mesh.get_all_groups()):
        cls = model_class or concrete_class(read_config(model), model)

    def load(
        built: PreTrainedModel, state_dict: Any, checkpoint_files: Any, load_config: Any, *_: Any
    ) -> Any:
        quantizer = load_config.hf_quantizer
        if not isinstance(quantizer, FourfoldQuantizer):
            raise ConfigurationError(
                f"{model} is not packed by Fourfold, and nothing says how to pack it: pass "
                "quantization_config=fourfold.MoeBitsAndBytesConfig(...)"
            )
        if quantizer.config.experts_device is not None:
            raise ConfigurationError(
                "experts_device keeps whole experts in host memory or on disk, of which load_sharded reads a "
                "part; leave it out, and pass device='cpu' here and offload=CPUOffloadPolicy() to shard"
            )
        refuse_wrong_widths(built, {"": device})
        stream = _ShardedStream(built, load_config, mesh, progress)
        with contextlib.ExitStack() as stack:
            stream.run(open_slices(checkpoint_files, stack))
        return stream.info(), None

    members = {
        "__module__": cls.__module__,
        IN_SHARDS: True,
        "_load_pretrained_model": staticmethod(load),
    }
    own: Any = type(cls.__name__, (cls,), members)
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    with together(f"{model} was not loaded", mesh.get_all_groups()), quiet_bars():
        built = own.from_pretrained(
            str(source if source.is_dir() else model), device_map={"": device}, **arguments
        )
    built.__class__ = cls
    assert isinstance(built, PreTrainedModel)
    return built


@contextlib.contextmanager
def _without_shards(module: nn.Module) -> Iterator[None]:
    """While open, a module shows what came just now; what was kept before has been checked, and is cut."""
    kept = {n: p for n, p in module._parameters.items() if p is not None and isinstance(p.data, DTensor)}
    module._parameters.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        module._parameters.update(kept)


class _ShardedStream(Stream):
    """The loop over a model's layers on one rank."""

    def __init__(
        self, model: PreTrainedModel, load_config: Any, mesh: DeviceMesh, progress: Progress | None
    ) -> None:
        super().__init__(model, load_config, lambda *_: None, progress)
        self.mesh = shards_of(mesh)
        self.part = Part(self.mesh.get_local_rank(), self.mesh.size())
        self._last_info: Any = None

    def run(self, slices: dict[str, Any]) -> list[str]:
        """Read this rank's part of everything; returns keys that are not used."""
        groups, ignored = self.groups(slices)
        instead = self.tied(groups, slices)
        conversions = [c for c in self.load_config.weight_mapping or [] if c.was_used()]
        batches = self._batches(groups, slices)
        done = 0
        for names in batches:
            self.progress(done, len(groups), names[0])
            self._read(names, groups, slices)
            done += len(names)
        for target, source in instead.items():  # the files hold the copy only
            path, _, leaf = target.rpartition(".")
            self._set(source, self.model.get_submodule(path)._parameters[leaf])
        self.progress(len(groups), len(groups), "")
        self.model._weight_conversions = conversions
        self.check_nothing_is_missing()
        return ignored

    def info(self) -> Any:
        """What the loader's own end of loading is told: what is missing comes by ties, or from the class."""
        info = self._last_info
        if info is None:
            raise CheckpointError("the checkpoint holds no tensor of this model")
        info.missing_keys.clear()
        info.missing_keys.update(name for name in self.expected if name not in self.loaded)
        info.unexpected_keys.clear()
        return info

    # --- what is read together

    def _batches(self, groups: Mapping[str, list[str]], slices: Mapping[str, Any]) -> list[list[str]]:
        """Parameters that are read by one call: a layer's, but what is big and read whole by itself."""
        batches: dict[str, list[str]] = defaultdict(list)
        for name in sorted(groups, key=dot_natural_key):
            layer = _LAYER.match(name)
            alone = layer is None or (
                self._experts(name) is not None and not self._can_cut(name, groups[name])
            )
            batches[name if alone or layer is None else layer[0]].append(name)
        return list(batches.values())

    def _experts(self, name: str) -> tuple[PackedExperts, str] | None:
        """The packed module and the projection that a tensor belongs to, companions included."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if not isinstance(module, PackedExperts):
            return None
        for suffix in sorted(COMPANION_SUFFIXES, key=len, reverse=True):
            leaf = leaf.removesuffix(suffix)
        return None if module.fourfold_layout.projection(leaf) is None else (module, leaf)

    def _converter(self, keys: Iterable[str]) -> Any:
        patterns = {self.patterns[key] for key in keys}
        for converter in self.load_config.weight_mapping or []:
            if patterns & set(getattr(converter, "source_patterns", ())) and hasattr(converter, "operations"):
                return converter
        return None

    def _is_as_stored(self, keys: list[str]) -> bool:
        """Whether one key holds all of a tensor, row after row.

        (Of a packed checkpoint that is so whatever pattern fits: those of Linears fit any ``weight``.)
        """
        return len(keys) == 1 and (self.patterns[keys[0]] is None or self.quantizer.pre_quantized)

    def _can_cut(self, name: str, keys: list[str]) -> bool:
        """Whether this rank's experts are some of the keys, or some rows of one."""
        found = self._experts(name)
        if found is None:
            return False
        module, leaf = found
        projection = module.fourfold_layout.projection(leaf)
        assert projection is not None
        if self._is_as_stored(keys):
            return True
        converter = self._converter(keys)
        return (
            self.quantizer.foreign is None
            and isinstance(converter, PackingConverter)
            and converter.is_plain_merge()
            and module.fourfold_layout.is_out_by_in(projection)
        )

    def _cut(self, name: str, keys: list[str], slices: Mapping[str, Any]) -> dict[str, Any]:
        """What the files hold of this rank's experts."""
        found = self._experts(name)
        assert found is not None
        projection = found[0].fourfold_layout.projection(found[1])
        assert projection is not None
        experts = projection.shape.experts
        start, stop = self.part.of(experts)
        if self._is_as_stored(keys):
            rows = slices[keys[0]].get_shape()[0]
            if rows % experts:
                raise CheckpointError(
                    f"{keys[0]} has {rows} rows in the checkpoint, where the configuration names {experts} "
                    "experts; they are not of the same model"
                )
            return {keys[0]: CutSlice(slices[keys[0]], rows // experts * start, rows // experts * stop)}
        by_pattern: dict[str | None, list[str]] = defaultdict(list)
        for key in sorted(keys, key=dot_natural_key):  # (the order in which the loader numbers experts)
            by_pattern[self.patterns[key]].append(key)
        for pattern, ordered in by_pattern.items():
            if len(ordered) != experts:
                raise CheckpointError(
                    f"{name}: the checkpoint holds {len(ordered)} of {experts} tensors `{pattern}`; files "
                    "are missing, or the configuration names another number of experts"
                )
        return {key: slices[key] for ordered in by_pattern.values() for key in ordered[start:stop]}

    def _can_read_rows(self, name: str, keys: list[str]) -> bool:
        """Whether a big tensor goes from the file into the model as it is."""
        tensor = self.placeholders[name]
        return (
            isinstance(tensor, nn.Parameter)
            and self._experts(name) is None
            and self._is_as_stored(keys)
            and tensor.is_floating_point()
            and tensor.ndim > 0
            and tensor.numel() > _BIG
            and self.quantizer.foreign is None
            and not self.quantizer.param_needs_quantization(self.model, name)
            and type(tensor) is nn.Parameter  # (of packed Linears the bytes belong together)
        )

    # --- reading

    def _read(self, names: list[str], groups: Mapping[str, list[str]], slices: Mapping[str, Any]) -> None:
        """Load some parameters, each as this rank's part if that can be, and keep the part."""
        of_experts = {name for name in names if self._can_cut(name, groups[name])}
        by_rows = {name for name in names if self._can_read_rows(name, groups[name])}
        wanted: dict[str, Any] = {}
        for name in names:
            if name in of_experts:
                wanted |= self._cut(name, groups[name], slices)
            elif name in by_rows:
                start, stop = self.part.of(self.placeholders[name].shape[0])
                wanted[groups[name][0]] = CutSlice(slices[groups[name][0]], start, stop)
            else:
                wanted |= {key: slices[key] for key in groups[name]}
        for name in by_rows:
            tensor = self.placeholders[name]
            start, stop = self.part.of(tensor.shape[0])
            self.shapes[name] = (stop - start, *tensor.shape[1:])
            local = torch.empty(self.shapes[name], dtype=tensor.dtype, device="meta")
            self._set(name, nn.Parameter(local, requires_grad=tensor.requires_grad))
        with contextlib.ExitStack() as stack:
            modules = {id(m): m for m, _ in filter(None, map(self._experts, of_experts))}
            for module in modules.values():
                stack.enter_context(as_part(module, self.part))
            arrived = self._arrive(wanted)
            if of_experts:
                arrived |= self._nothing(of_experts, arrived)
            for name in arrived:
                self._check_packed(name)
        for name in sorted(arrived, key=dot_natural_key):
            self._keep(name, arrived_cut=name in by_rows or self._belongs(name, of_experts))

    def _belongs(self, name: str, of_experts: set[str]) -> bool:
        """Whether a packed tensor came with one of those that were read in part."""
        found = self._experts(name)
        path = name.rpartition(".")[0]
        return found is not None and (name in of_experts or f"{path}.{found[1]}" in of_experts)

    def _nothing(self, of_experts: set[str], arrived: set[str]) -> set[str]:
        """Tensors of a rank that has no experts at all (more ranks than experts)."""
        made: set[str] = set()
        for name in of_experts:
            found = self._experts(name)
            assert found is not None
            module, leaf = found
            projection = module.fourfold_layout.projection(leaf)
            assert projection is not None
            if projection.shape.experts:
                continue
            path = name.rpartition(".")[0]
            for suffix, (shape, dtype) in projection.shape.tensors(module.fourfold_format).items():
                full = f"{path}.{leaf}{suffix}"
                if full not in arrived and (suffix == "" or not self.quantizer.pre_quantized):
                    empty = torch.empty(shape, dtype=dtype, device=self._device())
                    self._set(full, nn.Parameter(empty, requires_grad=False))
                    made.add(full)
        self.loaded |= made
        return made

    def _device(self) -> torch.device:
        return torch.device(next(iter(self.load_config.device_map.values())))

    def _arrive(self, wanted: dict[str, Any]) -> set[str]:
        """Load some keys into the model; names of what has come. What has is checked as a whole load is."""
        info, _ = convert_and_load_state_dict_in_model(
            model=self.model, state_dict=wanted, load_config=self.load_config
        )
        self._last_info = info
        self.raise_if_wrong(info, wanted)
        names = self.expected - set(info.missing_keys)
        self.loaded |= names
        for path in dict.fromkeys(name.rpartition(".")[0] for name in sorted(names)):
            module = self.model.get_submodule(path)
            with _without_shards(module):
                prefix = f"{path}." if path else ""
                check_shapes(module, prefix, {n: s for n, s in self.shapes.items() if n in names})
                check_finite(module, path, recurse=False)
        return names

    def _check_packed(self, name: str) -> None:
        found = self._experts(name)
        if found is None:
            return
        module, leaf = found
        projection = module.fourfold_layout.projection(leaf)
        assert projection is not None
        last = name.rpartition(".")[2]
        shape, dtype = projection.shape.tensors(module.fourfold_format)[last.removeprefix(leaf)]
        tensor = module._parameters[last]
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            given = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"{name} came as {given}, where {dtype} {list(shape)} was to come")

    # --- keeping

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path)._parameters[leaf] = parameter

    def _keep(self, name: str, *, arrived_cut: bool) -> None:
        """Put this rank's part of a tensor in the place of what has arrived."""
        path, _, leaf = name.rpartition(".")
        module: Any = self.model.get_submodule(path)
        parameter: Any = module._parameters.get(leaf)
        if parameter is None or is_whole_on_every_rank(module, leaf, parameter):
            return
        settings: dict[str, Any] = {}
        data, shape = parameter.data, tuple(parameter.shape)
        if type(parameter).__name__ == "Params4bit":
            module.quant_state = parameter.quant_state
            settings = linear_settings(parameter)
            data = torch.Tensor(data).view(torch.uint8).view(-1, 1)
            shape = tuple(data.shape)
        if arrived_cut:
            shape = self._whole_shape(name)
            if data.untyped_storage().nbytes() != data.nbytes:
                data = data.clone()  # (a view of the mapped file)
        else:
            start, stop = self.part.of(shape[0])
            data = data[start:stop].clone()
        stride = torch.empty(shape, device="meta").stride()
        tensor = from_shard(data.contiguous(), self.mesh, [Shard(0)], torch.Size(shape), stride)
        made = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        made._is_hf_initialized = True
        module._parameters[leaf] = with_settings(made, settings)

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        found = self._experts(name)
        if found is None:
            return tuple(self.placeholders[name].shape)
        projection = found[0].fourfold_layout.projection(found[1])
        assert projection is not None
        suffix = name.rpartition(".")[2].removeprefix(found[1])
        return projection.shape.tensors(found[0].fourfold_format)[suffix][0]
