"""What an adapter adds to each parameter of its model, read off the wrappers that PEFT itself puts there.

PEFT is asked to put the adapter on the model's skeleton (on the meta device, without a number): which
parameter each factor belongs to, nested wrappers, patterns of rank and alpha, rsLoRA and the roles of in and
out are then its own answers. The factors are read from the file when they are needed.

R rank, M matrices of a parameter (experts), N rows, K columns as the model stores them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourfold.adapters.patch import install
from fourfold.adapters.provenance import FILE
from fourfold.errors import AdapterError
from fourfold.experts.layout import clean_name

install()

WEIGHTS = "adapter_model.safetensors"
# PEFT up to then had in and out swapped for parameters that are not transposed.
_ROLES_SINCE = (0, 19, 1)
# What `lora_B_layout` may say: expert fastest, as PEFT has it, or slowest (Unsloth's older adapters).
_B_LAYOUTS = ("rank_major", "grouped_by_expert")


class Adapter:
    """A saved LoRA adapter: its configuration, and its tensors to be read one by one.

    Args:
        folder: what `save_pretrained` wrote.

    Attributes:
        config: PEFT's.
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
        self.is_grouped = self._is_grouped(path)
        self.config.inference_mode = True
        self.config.init_lora_weights = True  # (numbers are read, not made)
        try:
            self._reader = safe_open(self.folder / WEIGHTS, framework="pt")
        except SafetensorError as error:
            raise AdapterError(f"{self.folder / WEIGHTS} is truncated or damaged ({error})") from error
        keys = self._reader.keys()
        self.shapes = {key: tuple(self._reader.get_slice(key).get_shape()) for key in keys}

    def _is_grouped(self, path: Path) -> bool:
        """Whether B of experts has the expert as its slowest axis; both orders have the same shape."""
        mark = self.settings.get("lora_B_layout")
        if mark not in (None, *_B_LAYOUTS):
            raise AdapterError(f"{path}: lora_B_layout={mark!r}; known are {', '.join(_B_LAYOUTS)}")
        if mark is None and self.settings.get("target_parameters") and self._may_be_unsloths():
            raise AdapterError(
                f"{path}: Unsloth may have written it, and lora_B_layout is missing; both orders of lora_B "
                "fit its shapes, and the wrong one gives every expert another's update. Write "
                '"lora_B_layout": "grouped_by_expert" into that file if it was trained with an Unsloth of '
                'before September 2026, else "rank_major"'
            )
        return mark == "grouped_by_expert"

    def _may_be_unsloths(self) -> bool:
        """What Fourfold trained has its own file beside it."""
        if (self.folder / FILE).is_file():
            return False
        marked = (self.settings.get("auto_mapping") or {}).get("unsloth_fixed", False)
        base = str(self.settings.get("base_model_name_or_path"))
        return bool(marked or re.search(r"(^|/)(models--)?unsloth(/|--)", base))

    def read(self, key: str) -> torch.Tensor:
        """One tensor in fp32.

        Raises:
            AdapterError: a number in it is NaN or infinite.
        """
        tensor = self._reader.get_tensor(key).float()
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{self.folder / WEIGHTS}: {key} holds NaN or infinite numbers")
        return tensor

    def rows(self, key: str, begin: int, end: int) -> torch.Tensor:
        """Rows of one tensor in its own dtype."""
        found: torch.Tensor = self._reader.get_slice(key)[begin:end]
        return found


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
    if settings.get("target_parameters"):
        version = str(settings.get("peft_version") or "")
        numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:3])
        if version and numbers < _ROLES_SINCE:
            raise AdapterError(
                f"{path}: saved by PEFT {version}, which had in and out of expert parameters swapped (up to "
                "0.19.0); convert the adapter to today's layout first"
            )


@dataclass(frozen=True)
class Update:
    """What is added to one parameter: ``scaling * L @ R`` for each of its matrices, as the model stores them.

    Attributes:
        parameter: full name in the model.
        shape: of the parameter.
        a_key: of A, ``[M*R, in]``, expert slowest.
        b_key: of B, ``[out, R*M]``, expert fastest (slowest where the adapter is grouped).
        scaling: alpha over rank, or what rsLoRA makes of them.
        matrices: M.
        out_by_in: the model stores out-by-in matrices.
    """

    parameter: str
    shape: tuple[int, ...]
    a_key: str
    b_key: str
    scaling: float
    matrices: int
    out_by_in: bool

    def factors(self, adapter: Adapter) -> Factors:
        """Read them."""
        a_MRK = adapter.read(self.a_key)
        b_NRM = adapter.read(self.b_key)
        a_MRK = a_MRK.view(self.matrices, -1, a_MRK.shape[1])
        N, M, R = b_NRM.shape[0], self.matrices, a_MRK.shape[1]
        if adapter.is_grouped and M > 1:
            b_NRM = b_NRM.view(N, M, R).transpose(1, 2)
        return Factors(a_MRK, b_NRM.reshape(N, R, M), self.scaling, self.out_by_in)


@dataclass(frozen=True)
class Factors:
    """The numbers of an `Update`."""

    a_MRK: torch.Tensor
    b_NRM: torch.Tensor
    scaling: float
    out_by_in: bool

    def of(self, matrix: int, *, turned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """L ``[rows, R]`` (scaled) and R ``[R, columns]`` of one matrix; of its transpose if ``turned``."""
        left_NR, right_RK = self.b_NRM[:, :, matrix] * self.scaling, self.a_MRK[matrix]
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


def find_updates(model: PreTrainedModel, adapter: Adapter) -> Found:
    """What ``adapter`` adds to which parameters of ``model``; wraps the model.

    Args:
        model: in high precision, on the meta device.
        adapter: to be merged.

    Raises:
        AdapterError: a tensor of the adapter finds no place, has another shape than its place, or a place
            finds no tensor; or a wrapped module is none that can be merged.
    """
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
    _compare(adapter, {key: tuple(tensor.shape) for key, tensor in state.items()}, set(copies.values()))
    names = {id(module): name for name, module in wrapped.named_modules()}
    updates = [_update(names[id(layer)], layer) for layer in _layers(wrapped)]
    _refuse_ambiguous_roles(adapter, updates)
    return Found(updates, copies, replaced)


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


def _refuse_ambiguous_roles(adapter: Adapter, updates: list[Update]) -> None:
    """PEFT before 0.18 had in and out swapped and wrote no version: shapes tell, unless all are square."""
    experts = [update for update in updates if update.matrices > 1]
    square = [update for update in experts if update.shape[-1] == update.shape[-2]]
    if experts and square == experts and not adapter.settings.get("peft_version"):
        raise AdapterError(
            f"{adapter.folder / 'adapter_config.json'} has no peft_version, and {experts[0].parameter} is "
            f"{list(experts[0].shape)}: in and out, which PEFT up to 0.19.0 had swapped, cannot be told "
            "apart. Write the release that saved it into that file"
        )


def _layers(model: nn.Module) -> Iterable[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _compare(adapter: Adapter, places: dict[str, tuple[int, ...]], copies: set[str]) -> None:
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
