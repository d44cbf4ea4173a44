"""What an adapter adds to each parameter of its model, read off the wrappers that PEFT itself puts there.

PEFT is asked to put the adapter on the model's skeleton (on the meta device, without a number): which
parameter each factor belongs to, nested wrappers, patterns of rank and alpha, rsLoRA and the roles of in and
out are then its own answers. (But not in and out of what older releases saved: `export_read` reads those, for
`export` and for this.) The factors are read from the file when they are needed, a matrix at a time.

R rank, M matrices of a parameter (experts), N rows, K columns as the model stores them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourfold.adapters import export_read
from fourfold.adapters.export_base import Target, targets_of
from fourfold.adapters.factor_file import AdapterFile, FlatFactors
from fourfold.adapters.patch import install
from fourfold.errors import AdapterError
from fourfold.experts import find_experts
from fourfold.experts.layout import clean_name

install()

WEIGHTS = "adapter_model.safetensors"


class Adapter:
    """A saved LoRA adapter: its configuration, and its tensors to be read one by one.

    Args:
        folder: what `save_pretrained` wrote.

    Attributes:
        config: PEFT's.
        settings: adapter_config.json.
        file: its tensors.
        shapes: key -> shape of every tensor.

    Raises:
        AdapterError: it is no LoRA adapter, damaged, or of a kind that cannot be merged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / "adapter_config.json"
        if not path.is_file():
            raise AdapterError(f"{folder} holds no adapter (no adapter_config.json in it)")
        if not (self.folder / WEIGHTS).is_file():
            raise AdapterError(f"{folder} holds no {WEIGHTS}; other formats are not read")
        try:
            self.settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _refuse_what_cannot_be_merged(self.settings, path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.config = LoraConfig.from_pretrained(str(self.folder))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(f"{path} cannot be understood ({error})") from error
        self.config.inference_mode = True
        self.config.init_lora_weights = True  # (numbers are read, not made)
        self.file = AdapterFile(self.folder / WEIGHTS)
        self.shapes = self.file.shapes

    def to_read(self) -> export_read.Adapter:
        """Its configuration, for those who read both kinds."""
        return export_read.Adapter(self.folder, self.settings, {})


def _refuse_what_cannot_be_merged(settings: dict[str, Any], path: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type {settings.get('peft_type')!r}; only LORA is merged")
    refused = (
        ("use_dora", "DoRA changes the direction of the weights themselves"),
        ("lora_bias", "biases of factors have no place in the base"),
        ("trainable_token_indices", "rows of the embedding were trained"),
        ("layer_replication", "it makes another model"),
        ("alora_invocation_tokens", "it applies to some tokens only"),
        ("use_qalora", "it adds to groups of inputs"),
        ("use_bdlora", "its factors are block-diagonal"),
        ("arrow_config", "it routes between adapters"),
    )
    for name, why in refused:
        if settings.get(name):
            raise AdapterError(f"{path}: {name}={settings[name]!r}: {why}; this cannot be merged")
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias={settings['bias']!r}: biases of the base were trained")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
        raise AdapterError(
            f"{path}: init_lora_weights={init!r} changed the base's own weights; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes an ordinary one of it"
        )


@dataclass(frozen=True)
class Update:
    """What is added to one parameter: ``scaling * L @ R`` for each of its matrices, as the model stores them.

    Attributes:
        parameter: full name in the model.
        shape: of the parameter.
        a_key: of A, ``[M*R, in]``, expert slowest.
        b_key: of B, ``[out, R*M]``, expert fastest.
        scaling: alpha over rank, or what rsLoRA makes of them.
        matrices: M.
        out_by_in: A has the columns of the matrices that the model stores, and B their rows; else the other
            way round.
        grouped: B's expert is the slowest of its two axes.
    """

    parameter: str
    shape: tuple[int, ...]
    a_key: str
    b_key: str
    scaling: float
    matrices: int
    out_by_in: bool
    grouped: bool = False

    def factors(self, adapter: Adapter, order: Sequence[int] = ()) -> Factors:
        """To be read, matrix by matrix; fastest in ``order``."""
        flat = FlatFactors(
            adapter.file, self.a_key, self.b_key, self.matrices, grouped=self.grouped, order=order
        )
        return Factors(flat, self.scaling, self.out_by_in)


@dataclass(frozen=True)
class Factors:
    """The numbers of an `Update`."""

    flat: FlatFactors
    scaling: float
    out_by_in: bool

    def of(self, matrix: int, *, turned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """L ``[rows, R]`` (scaled) and R ``[R, columns]`` of one matrix; of its transpose if ``turned``."""
        left_NR, right_RK = self.flat.b(matrix).float() * self.scaling, self.flat.a(matrix).float()
        if self.out_by_in != turned:
            return left_NR, right_RK
        return right_RK.T, left_NR.T


@dataclass(frozen=True)
class Found:
    """What an adapter does to a model.

    Attributes:
        updates: what it adds.
        copies: parameter of the base that it holds a copy of (PEFT saves the head and the embedding where an
            adapter targets them) -> the copy's key.
        replaced: parameter that was trained as a whole (``modules_to_save``) -> the key of its new numbers.
    """

    updates: list[Update]
    copies: dict[str, str]
    replaced: dict[str, str]


def find_updates(model: PreTrainedModel, adapter: Adapter, source_layout: str | None = None) -> Found:
    """What ``adapter`` adds to which parameters of ``model``; wraps the model.

    Args:
        model: in high precision, on the meta device.
        adapter: to be merged.
        source_layout: how it packs fused experts, where its marks do not say (`export_read`).

    Raises:
        AdapterError: a tensor of the adapter finds no place, has another shape than its place, or a place
            finds no tensor; a wrapped module is none that can be merged; or the adapter can be read in more
            than one way.
    """
    targets = targets_of(find_experts(model))
    _refuse_another_vocabulary(model, adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, adapter.config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise AdapterError(
            f"{adapter.folder} does not fit {type(model).__name__}: {str(error).splitlines()[0]}"
        ) from error
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    replaced = _replaced(wrapped, adapter)
    base = {clean_name(name): tuple(p.shape) for name, p in wrapped.named_parameters(remove_duplicate=False)}
    copies = {
        clean_name(key): key
        for key, shape in adapter.shapes.items()
        if key not in state and base.get(clean_name(key)) == shape
    }
    names = {id(module): name for name, module in wrapped.named_modules()}
    updates = [_update(names[id(layer)], layer) for layer in _layers(wrapped)]
    places = {key: tuple(tensor.shape) for key, tensor in state.items()}
    _compare(adapter, places, set(copies.values()), [u for u in updates if u.matrices > 1])
    return Found(_as_written(adapter, updates, targets, source_layout), copies, replaced)


def _refuse_another_vocabulary(model: PreTrainedModel, adapter: Adapter) -> None:
    """Where an adapter holds (LoRA of) an embedding or a head of another number of tokens."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if weight is None or id(module) not in names:
            continue
        tokens, width = weight.shape
        for key, shape in adapter.shapes.items():
            name, _, leaf = clean_name(key.replace(".original_module", "")).partition(f"{names[id(module)]}.")
            axis = {"weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}.get(leaf)
            if name or axis is None or len(shape) != 2 or shape[axis] == tokens:
                continue
            if leaf == "weight" and shape[1] != width:
                continue  # (another model altogether)
            if leaf == "lora_B.weight" and isinstance(module, nn.Embedding):
                continue
            raise AdapterError(
                f"{adapter.folder / WEIGHTS}: {key} is {list(shape)}: the vocabulary was resized to "
                f"{shape[axis]} tokens before the adapter was trained, and the base has {tokens}. Merge into "
                "the resized base that training began with (loaded, resize_token_embeddings"
                f"({shape[axis]}), save_pretrained; what the new rows hold is part of it), with --any-base "
                "(any_base=True)"
            )


def _as_written(
    adapter: Adapter,
    updates: list[Update],
    targets: Mapping[str, dict[str, Target]],
    source_layout: str | None,
) -> list[Update]:
    """Updates of experts as the adapter's writer packed them."""
    modules: dict[str, dict[str, Update]] = {}
    for update in updates:
        if update.matrices > 1:
            module, _, parameter = update.parameter.rpartition(".")
            modules.setdefault(module, {})[parameter] = update
    if not modules:
        return updates
    packing = export_read.packing_of(adapter.to_read(), source_layout)
    changed: dict[str, Update] = {}
    for name, listed in modules.items():
        where = targets.get(name, {})
        if listed.keys() - where.keys():
            raise AdapterError(
                f"{name}.{next(iter(listed.keys() - where.keys()))}: which axis of it is in and which is out "
                "cannot be read off the model, so LoRA on it is not merged"
            )
        lazy = {
            parameter: export_read.Module(adapter.file.lazy(u.a_key), adapter.file.lazy(u.b_key))
            for parameter, u in listed.items()
        }
        exchanged = export_read.swapped(packing, lazy, where, name)
        for parameter, update in listed.items():
            straight = exchanged == where[parameter].stored_transposed
            changed[update.parameter] = replace(update, out_by_in=straight, grouped=packing.grouped)
    return [changed.get(update.parameter, update) for update in updates]


def _replaced(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Tensors of modules that were trained as a whole -> their keys in the adapter."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copied in module.modules_to_save.values():
                found |= {
                    f"{clean_name(name)}.{tensor}": f"{name}.{tensor}" for tensor in copied.state_dict()
                }
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise AdapterError(
                f"{adapter.folder}: {clean_name(name)} was trained in a way that cannot be merged "
                f"({type(module).__name__})"
            )
    return found


def _layers(model: nn.Module) -> Iterable[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _compare(
    adapter: Adapter, places: dict[str, tuple[int, ...]], copies: set[str], experts: list[Update]
) -> None:
    # (older releases of PEFT exchanged in and out of experts)
    exchanged: dict[str, tuple[int, ...]] = {}
    for update in experts:
        a, b = places[update.a_key], places[update.b_key]
        if (adapter.shapes.get(update.a_key), adapter.shapes.get(update.b_key)) == (
            (a[0], b[0]),
            (a[1], b[1]),
        ):
            exchanged |= {update.a_key: (a[0], b[0]), update.b_key: (a[1], b[1])}
    places = places | exchanged
    where = adapter.folder / WEIGHTS
    for keys, what in (
        (adapter.shapes.keys() - places.keys() - copies, "finds no place in the model"),
        (places.keys() - adapter.shapes.keys(), "is missing"),
    ):
        if keys:
            raise AdapterError(
                f"{where}: {sorted(keys)[0]} {what}, and {len(keys) - 1} more; the adapter belongs to "
                "another model, or is damaged"
            )
    for key, shape in places.items():
        if adapter.shapes[key] != shape:
            raise AdapterError(
                f"{where}: {key} is {list(adapter.shapes[key])}, where the model asks for {list(shape)}; the "
                "adapter belongs to another model"
            )


def _update(name: str, layer: Any) -> Update:
    (adapter_name,) = layer.lora_A.keys() or [None]
    base, path = layer.get_base_layer(), clean_name(name)
    if adapter_name is None or layer.lora_variant:
        raise AdapterError(f"{path} is adapted in a way that cannot be merged ({type(layer).__name__})")
    keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    scaling = float(layer.scaling[adapter_name])
    if isinstance(layer, ParamWrapper):
        shape, matrices = tuple(layer.get_param().shape), layer.num_experts
        out_by_in = len(shape) == 2 or layer._did_swap_in_out_features
        full = f"{path}.{layer.parameter_name}"
        return Update(full, shape, *keys, scaling, matrices, out_by_in)
    if isinstance(base, nn.Linear | Conv1D):
        shape = tuple(base.weight.shape)
        return Update(f"{path}.weight", shape, *keys, scaling, 1, isinstance(base, nn.Linear))
    raise AdapterError(f"{path} is a {type(base).__name__}; adapters of Linears and experts are merged")
