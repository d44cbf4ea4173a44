"""A model without weights: its modules on the meta device, prepared as loading would prepare them.

Everything that can be wrong with a model and its settings is found on the skeleton in a second, before a
weight is read or downloaded.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

from fourfold.errors import CheckpointError
from fourfold.loading.config import QUANT_METHOD, MoeBitsAndBytesConfig
from fourfold.loading.paths import ensure_reachable, is_meant_as_path
from fourfold.loading.register import register

register()


def read_config(model: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a local folder, a bare ``config.json`` or a hub id; runs code from there only on
    request.

    Raises:
        CheckpointError: there is no such folder or file, or no configuration in it.
        ConfigurationError: there is no such folder, and no hub within reach to ask for that id.
    """
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json, so it is no model folder")
    if is_meant_as_path(model) and not path.exists():
        raise CheckpointError(f"there is no model folder or config.json at {path} (seen from {Path.cwd()})")
    ensure_reachable(model)
    try:
        return AutoConfig.from_pretrained(
            str(path) if path.exists() else str(model), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot read the configuration of {model}: {reason}") from error


def model_class(config: PretrainedConfig) -> Any:
    """The class that the configuration names as its architecture, or else the one for language modelling."""
    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):  # (any name may stand there)
            return found
    return language_class(config) or AutoModel


def language_class(config: PretrainedConfig) -> Any:
    """The auto class that loads a model to train and to answer with.

    Returns:
        `AutoModelForCausalLM`, which takes the text alone of some models with images; for models that it does
        not know `AutoModelForImageTextToText`, which takes them whole; None where neither does.
    """
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    return next((auto for auto in _LANGUAGE if type(config) in auto._model_mapping), None)


def load_language_model(name: str, **kwargs: Any) -> Any:
    """``from_pretrained`` of that class.

    Args:
        name: a folder, or a model's id on the hub.
        kwargs: of ``from_pretrained``.

    Raises:
        CheckpointError: nothing readable is there, or no model that writes text.
    """
    config = read_config(name, bool(kwargs.get("trust_remote_code")))
    auto = language_class(config)
    if auto is None:
        raise CheckpointError(
            f"{name} is a {config.model_type}, and transformers has no class of that type that writes text. "
            "Name a model that does; its code, where it brings some, is run with trust_remote_code."
        )
    return auto.from_pretrained(os.path.expanduser(name), **kwargs)


_LANGUAGE: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)


def build_skeleton(
    model: str | Path | PretrainedConfig,
    quantization_config: MoeBitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
    *,
    dtype: torch.dtype | None = None,
    causal: bool = False,
) -> PreTrainedModel:
    """The model on the meta device.

    Args:
        model: local folder, bare ``config.json``, hub id, or a configuration.
        quantization_config: how it would be loaded; a checkpoint that is packed already says so itself.
        trust_remote_code: run the code that comes with the model, where it is no class of transformers.
        dtype: to load in; None is the checkpoint's.
        causal: the class that a run would load (see `language_class`), not the one that the configuration
            names.

    Returns:
        A model whose parameters have their shapes and dtypes as after loading, without storage.

    Raises:
        CheckpointError: nothing readable is there.
        UnsupportedExpertsError: its experts are of a kind that cannot be packed, and are not skipped on
            request.
    """
    config = model if isinstance(model, PretrainedConfig) else read_config(model, trust_remote_code)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    cls: Any = (language_class(config) if causal else None) or model_class(config)
    remote = {"trust_remote_code": True} if trust_remote_code else {}
    stored = getattr(config, "quantization_config", None)
    packed = isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD
    with torch.device("meta"):
        built = (
            cls._from_config(config, dtype=dtype)
            if hasattr(cls, "_from_config")
            else cls.from_config(config, dtype=dtype, **remote)
        )
    settings = stored if packed else quantization_config
    if isinstance(settings, MoeBitsAndBytesConfig) and settings.experts_device is not None:
        settings = copy.copy(settings)
        settings.experts_device = None  # (nothing is loaded, and no memory is asked for)
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        # As if already packed: shapes and dtypes are then those that storage will have.
        with _default_dtype(dtype):  # (of biases of the Linears that it makes)
            quantizer.preprocess_model(model=built, device_map={"": "meta"}, checkpoint_files=None)
        built.hf_quantizer = quantizer
    return built


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def skeleton_like(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration on the meta device, in high precision.

    Its parameters have the names of ``model``'s, which those of a skeleton made of a checkpoint need not have
    (a checkpoint with images holds a whole model and its text alone).
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        built: PreTrainedModel = type(model)._from_config(config, dtype=dtype)
    return built
