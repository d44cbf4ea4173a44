"""One row of the conformance matrix: a tiny random model of a type, through everything that loading promises.

    float model -> saved -> loaded packed -> saved -> reloaded -> dequantized -> saved -> loaded plainly

The experts module is compared by itself: on tiny random models the logits of the whole hardly notice experts.
Its output must equal that of the same numbers dequantized (tightly) and resemble that of the original (the
noise of the format); and three kinds of damage must be seen by both comparisons, or these would prove
nothing. An exception is a failed row, never the end of the matrix.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from fourfold.errors import UnsupportedExpertsError
from fourfold.experts import FoundExperts, PackedExperts, find_experts
from fourfold.experts.undecorated import configured_expert_counts
from fourfold.formats import decode_stack
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.prepare import dequantize
from fourfold.loading.skeleton import build_skeleton
from fourfold.planning.conformance.modules import (
    Call,
    align_,
    check_output,
    inputs_it_takes,
    observe_calls,
    run_on,
)
from fourfold.planning.conformance.row import CHECKS, FORMATS, NOT_APPLICABLE, OK, Row
from fourfold.planning.conformance.tensors import check_bf16, check_packed, check_same_state, same
from fourfold.planning.conformance.tiny_models import (
    build,
    linear_experts,
    model_classes,
    randomise_experts_,
    randomise_vectors_,
    tiny_config,
)


def check_model_type(model_type: str) -> Row | None:
    """The row of a model type; None where it has no experts at all."""
    row = Row(model_type)
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            model = _build(row)
        except Exception as error:
            if _has_no_experts(model_type):
                return None
            row.kind = "not built"
            row.fail("built", f"{type(error).__name__}: {error}")
            return row
        if model is None:
            counts = configured_expert_counts(tiny_config(model_type))
            if not counts:
                return None
            row.kind = "not found"
            row.fail("built", f"its configuration speaks of {sorted(counts)} experts, and none were found")
            return row
        row.cells["built"] = OK
        with row.check("packed"):
            check_model(row, model, Path(folder))
    return row


def _build(row: Row) -> PreTrainedModel | None:
    config = tiny_config(row.model_type)
    classes = model_classes(type(config))
    if not classes:
        raise LookupError("no class takes this configuration")
    for model_class in classes:
        skeleton = build(config, model_class, "meta")
        found = list(find_experts(skeleton))
        if not found and not linear_experts(skeleton):
            continue
        row.model = model_class.__name__
        kinds = dict.fromkeys(f.layout.kind if f.layout else f"refused: {f.reason}" for f in found)
        row.kind = "; ".join(kinds) or "Linears, by bitsandbytes"
        model = build(config, model_class)
        randomise_vectors_(model)
        randomise_experts_(model)
        return model
    return None


def _has_no_experts(model_type: str) -> bool:
    """Whether the configuration class as it is, uncut, makes a model without experts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type]()
        skeletons = [build(config, c, "meta") for c in model_classes(type(config))]
    except Exception:
        return False
    return bool(skeletons) and not any(list(find_experts(s)) or linear_experts(s) for s in skeletons)


def check_model(row: Row, model: PreTrainedModel, folder: Path) -> None:
    """Fill ``row`` with what is found about ``model`` (fp32, in memory); files go to ``folder``."""
    found = list(find_experts(model))
    if any(f.layout is None for f in found):
        _check_refusal(row, model, folder)
        return
    model.save_pretrained(folder / "float")
    inputs: dict[str, torch.Tensor] | None = None
    with row.check("forward"):
        inputs = inputs_it_takes(model)
        if inputs is None:
            row.cells["forward"] = NOT_APPLICABLE
    calls = observe_calls(model, found, inputs)
    for name, settings in FORMATS.items():
        _check_format(row, name, settings, model, calls, inputs, folder)
    with row.check("bf16"):
        row.cells["bf16"] = check_bf16(model, inputs, _narrow(model), folder)


def _check_format(
    row: Row,
    name: str,
    settings: dict[str, Any],
    model: PreTrainedModel,
    calls: list[Call],
    inputs: dict[str, torch.Tensor] | None,
    folder: Path,
) -> None:
    cls: Any = type(model)
    config = MoeBitsAndBytesConfig(**settings, llm_int8_skip_modules=_narrow(model))
    packed = cls.from_pretrained(folder / "float", quantization_config=config).eval()
    with row.check("packed", name):
        check_packed(packed, model, name)
    with row.check("reload", name):
        packed.save_pretrained(folder / name)
        again = cls.from_pretrained(folder / name).eval()
        check_same_state(packed, again)
    if row.cells["reload"] != OK:
        again = cls.from_pretrained(folder / "float", quantization_config=config).eval()
    if inputs is not None:
        with row.check("forward", name):
            align_(packed)
            align_(again)
            ours = run_on(packed, inputs)
            # (stock repacks a reloaded Linear of four bits on some CPUs: only what is ours is run again)
            theirs = run_on(again, inputs) if calls else ours
            if not ours.isfinite().all() or not torch.equal(ours, theirs):
                raise ValueError("the packed model does not run, is not finite, or differs after reloading")
    with row.check("dequantize", name):
        if not calls:  # stock cannot save what it has dequantized after reloading
            again = cls.from_pretrained(folder / "float", quantization_config=config).eval()
        plain = dequantize(again)
        _check_dequantized(packed, plain, list(find_experts(model)))
        with row.check("keys", name):
            plain.save_pretrained(folder / f"{name}-plain")
            _check_keys(folder, name, plain, cls, list(find_experts(model)))
    if row.cells["dequantize"] != OK or not calls:
        return
    for call in calls:
        check_output(row, name, call, model, packed, plain)


def _narrow(model: nn.Module) -> list[str]:
    """Linears whose width is no whole number of blocks: some CPUs compute them wrongly in four bits."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, module in linears if module.in_features % 64]


def _check_dequantized(packed: PreTrainedModel, plain: PreTrainedModel, found: list[FoundExperts]) -> None:
    for f in found:
        module, own = packed.get_submodule(f.name), plain.get_submodule(f.name)
        assert isinstance(module, PackedExperts)
        if type(own) is not type(f.module):
            raise ValueError(f"{f.name} is a {type(own).__name__}")
        for projection in module.fourfold_layout.projections:
            decoded = decode_stack(module.stack(projection), torch.float32)
            expected = module.fourfold_layout.from_stack(decoded, projection)
            if not same(getattr(own, projection.name), expected):
                raise ValueError(f"{f.name}.{projection.name} has other values")


def _check_keys(folder: Path, name: str, plain: PreTrainedModel, cls: Any, found: list[FoundExperts]) -> None:
    def keys(where: Path) -> set[str]:
        return {k for file in where.glob("*.safetensors") for k in load_file(file)}

    ours, original = keys(folder / f"{name}-plain"), keys(folder / "float")
    if ours != original:
        raise ValueError(f"other keys: {sorted(ours ^ original)[:4]}")
    loaded = cls.from_pretrained(folder / f"{name}-plain")
    for tensor in (t for f in found for t in f.tensors()):
        if not same(loaded.get_parameter(tensor), plain.get_parameter(tensor)):
            raise ValueError(f"{tensor} has other values after saving and loading")


def _check_refusal(row: Row, model: PreTrainedModel, folder: Path) -> None:
    """Refused from the configuration alone, and loaded when the setting in the message is passed."""
    cls: Any = type(model)
    settings = FORMATS["NF4"]
    quantization = MoeBitsAndBytesConfig(**settings)
    model.config.architectures = [cls.__name__]
    message = _refusal(lambda: build_skeleton(model.config, quantization))  # there are no weights to read
    model.save_pretrained(folder / "float")
    if _refusal(lambda: cls.from_pretrained(folder / "float", quantization_config=quantization)) != message:
        raise ValueError("loading says something else than the skeleton without weights")
    patterns = re.findall(r"'([^']+)'", message.partition("llm_int8_skip_modules=")[2].partition("]")[0])
    if not patterns:
        raise ValueError("it was not refused")
    skipping = MoeBitsAndBytesConfig(**settings, llm_int8_skip_modules=[*patterns, *_narrow(model)])
    loaded = cls.from_pretrained(folder / "float", quantization_config=skipping)
    refused = [f for f in find_experts(model) if f.layout is None]
    for name in (tensor for f in refused for tensor in f.tensors()):
        if not same(loaded.get_parameter(name), model.get_parameter(name)):
            raise ValueError(f"{name} was to be left as it is, and has other values")
    check_packed(loaded, model, "NF4", left=[f.name for f in refused])
    row.cells |= dict.fromkeys(CHECKS, NOT_APPLICABLE) | {"packed": "refused"}


def _refusal(load: Callable[[], object]) -> str:
    try:
        load()
    except UnsupportedExpertsError as error:
        return str(error)
    return ""
