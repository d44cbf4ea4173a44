"""Loading a model one tensor at a time, handing each on, and keeping none.

It is transformers' own `from_pretrained` from beginning to end: files, configuration, dtypes, key mapping,
converters, quantizer. A subclass of the model's class replaces the one step in the middle, which reads all
weights: here it is called once for each parameter (with all checkpoint keys that make up that parameter, so
that merges and splits are complete), what has arrived is handed on in the form in which `save_pretrained`
would write it, and the parameter goes back to the meta device. So there is no second key mapping that could
differ from the first.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging as transformers_logging

from fourfold.errors import CheckpointError, FourfoldError
from fourfold.loading.complete import check_finite
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.shapes import check_shapes, expected_shapes

Sink = Callable[[str, torch.Tensor], None]
Progress = Callable[[int, int, str], None]


def stream_pretrained(
    cls: type[PreTrainedModel],
    model: str | Path,
    quantization_config: MoeBitsAndBytesConfig,
    sink: Sink,
    progress: Progress | None = None,
    **arguments: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Run ``cls.from_pretrained(model)`` and hand on every tensor that `save_pretrained` would write.

    Args:
        cls: the model's class.
        model: local folder or hub id.
        quantization_config: how it is quantized on the way.
        sink: is called with key and tensor; the tensor is dropped afterwards.
        progress: is called with parameters done, their total and the name of the next one.
        arguments: further ones of `from_pretrained`.

    Returns:
        The model with all its weights on the meta device, and checkpoint keys that belong to nothing in it.

    Raises:
        CheckpointError: a tensor is missing, of a wrong shape, or not finite.
        FourfoldError: what loading with this configuration raises.
    """
    ignored: list[str] = []
    quantization_config = copy.copy(quantization_config)
    quantization_config.only_written = True

    def load(
        built: PreTrainedModel, state_dict: Any, checkpoint_files: Any, load_config: Any, *_: Any
    ) -> Any:
        stream = Stream(built, load_config, sink, progress)
        with contextlib.ExitStack() as stack:
            ignored.extend(stream.run(open_slices(checkpoint_files, stack)))
        return None, None

    def finalize(_model: PreTrainedModel, _load_config: Any, loading_info: Any) -> Any:
        return loading_info  # nothing is missing (that is an error here), and tied weights are not written

    own: Any = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "_load_pretrained_model": staticmethod(load),
            "_finalize_model_loading": staticmethod(finalize),
        },
    )
    with quiet_bars():
        built = own.from_pretrained(str(model), quantization_config=quantization_config, **arguments)
    assert isinstance(built, own)
    return built, ignored


def open_slices(checkpoint_files: list[str] | None, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Key -> lazily read slice of all files."""
    slices: dict[str, Any] = {}
    for file in checkpoint_files or []:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file}: only safetensors are read")
        reader = stack.enter_context(safe_open(file, framework="pt"))
        slices |= {key: reader.get_slice(key) for key in reader.keys()}  # noqa: SIM118  (not a mapping)
    return slices


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """transformers shows a progress bar each time it loads, that is for each parameter."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class Stream:
    """The loop over a model's parameters."""

    def __init__(
        self, model: PreTrainedModel, load_config: Any, sink: Sink, progress: Progress | None
    ) -> None:
        self.model = model
        self.load_config = load_config
        self.quantizer = load_config.hf_quantizer
        self.sink = sink
        self.progress = progress or (lambda *_: None)
        self.expected = set(model.state_dict())
        self.shapes = expected_shapes(model)
        self.placeholders: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.placeholders |= dict(model.named_buffers(remove_duplicate=False))
        self.loaded: set[str] = set()
        self.patterns: dict[str, str | None] = {}  # of a key: the converter's that takes it, if there is one
        self.ties = dict(getattr(model, "all_tied_weights_keys", None) or {})

    def run(self, slices: dict[str, Any]) -> list[str]:
        """Load, hand on and drop everything; returns the keys that are not used."""
        groups, ignored = self.groups(slices)
        instead = self.tied(groups, slices)
        # Only conversions that the checkpoint used are reversed; which those are is known after `groups`.
        self.model._weight_conversions = [c for c in self.load_config.weight_mapping or [] if c.was_used()]
        self.quantizer._set_conversions_for_saving(self.model)
        reversed_ = self.model._weight_conversions
        for number, (name, keys) in enumerate(groups.items()):
            self.progress(number, len(groups), name)
            arrived = self._load({key: slices[key] for key in keys})
            renamed = {instead.get(key, key): tensor for key, tensor in arrived.items()}
            self.model._weight_conversions = reversed_
            for key, tensor in revert_weight_conversion(self.model, renamed).items():
                self.sink(key, tensor)
            del arrived, renamed
        self.progress(len(groups), len(groups), "")
        self.model._weight_conversions = reversed_
        self.check_nothing_is_missing()
        return ignored

    def groups(self, slices: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
        """Parameter -> the checkpoint keys it is made of (as the loader collects them), and unused keys."""
        mapping = self.load_config.weight_mapping or []
        renamings = [c for c in mapping if isinstance(c, WeightRenaming)]
        converters = [c for c in mapping if isinstance(c, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        foreign = self.quantizer.foreign  # scales are read beside their weights, by the format's converters
        read_beside = [re.compile(pattern) for pattern in (foreign.leftovers if foreign else ())]
        groups: dict[str, list[str]] = defaultdict(list)
        ignored: list[str] = []
        for key in sorted(slices, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name in state:
                groups[name].append(key)
                self.patterns[key] = pattern
            elif not any(pattern.search(key) for pattern in read_beside):
                ignored.append(key)
        return dict(groups), ignored

    def tied(self, groups: dict[str, list[str]], slices: dict[str, Any]) -> dict[str, str]:
        """Leave out weights that are tied to another one, as saving does.

        Returns:
            Name under which a weight is written, where that is not its own: the file holds only the copy.
        """
        instead: dict[str, str] = {}
        for target, source in self.ties.items():
            if target in groups and source in groups:
                one, other = groups[target], groups[source]
                pairs = zip(one, other, strict=False)
                if len(one) == len(other) and all(
                    torch.equal(slices[a][...], slices[b][...]) for a, b in pairs
                ):
                    del groups[target]
                    self.loaded.add(target)
            elif target in groups and source not in instead.values():
                instead[target] = source
                self.loaded.add(source)
        return instead

    def _load(self, state_dict: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Load some keys into the model, take out what has arrived, and put the meta parameters back."""
        info, _ = convert_and_load_state_dict_in_model(
            model=self.model, state_dict=state_dict, load_config=self.load_config
        )
        self.raise_if_wrong(info, state_dict)
        names = self.expected - set(info.missing_keys)
        self.loaded |= names
        skipped = self.model._keys_to_ignore_on_save or ()
        arrived: dict[str, torch.Tensor] = {}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in sorted(names, key=dot_natural_key)):
            module = self.model.get_submodule(path)
            check_shapes(module, f"{path}." if path else "", self.shapes)
            check_finite(module, path, recurse=False)
            for key, value in module.state_dict(prefix=f"{path}." if path else "").items():
                if isinstance(value, torch.Tensor) and not value.is_meta and key not in skipped:
                    arrived[key] = value
            self._put_back(module, path)
        return arrived

    def _put_back(self, module: nn.Module, path: str) -> None:
        prefix = f"{path}." if path else ""
        for store in (module._parameters, module._buffers):
            for leaf in store:
                if prefix + leaf in self.placeholders:
                    store[leaf] = self.placeholders[prefix + leaf]
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = None  # bitsandbytes keeps the scales of a Linear there as well

    def raise_if_wrong(self, info: Any, keys: Iterable[str]) -> None:
        failure = getattr(self.quantizer, "failure", None)
        if isinstance(failure, FourfoldError):
            raise failure
        for name, found, wanted in info.mismatched_keys:
            raise CheckpointError(
                f"{name} is {list(found)} in the checkpoint, where the configuration asks for "
                f"{list(wanted)}; they are not of the same model"
            )
        for name, message in info.conversion_errors.items():
            reason = str(message).strip().splitlines()[-1]
            raise CheckpointError(f"{name} cannot be made of {', '.join(list(keys)[:3])}, ...: {reason}")

    def check_nothing_is_missing(self) -> None:
        """What the checkpoint lacks would be random numbers."""
        allowed = [re.compile(p) for p in self.model._keys_to_ignore_on_load_missing or ()]
        missing = [
            name
            for name in sorted(self.expected - self.loaded, key=dot_natural_key)
            if not any(pattern.search(name) for pattern in allowed) and self.ties.get(name) not in self.loaded
        ]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing[:5])}{more}; the files of another model lie beside "
                "this configuration, or some are missing"
            )
