"""One row of the conformance matrix: a tiny random model of a type, through everything that loading promises.

    float model -> saved -> loaded packed -> saved -> reloaded -> dequantized -> saved -> loaded plainly

The experts module is compared by itself: on tiny random models the logits of the whole hardly notice experts.
Its output must equal that of the same numbers dequantized (tightly) and resemble that of the original (the
noise of the format); and three kinds of damage must be seen by both comparisons, or these would prove
nothing. An exception is a failed row, never the end of the matrix.
"""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import PreTrainedModel

from fourfold.errors import UnsupportedExpertsError
from fourfold.experts import FoundExperts, PackedExperts, find_experts
from fourfold.experts.layout import stored_name
from fourfold.experts.observe import blocks_around, possible_inputs
from fourfold.formats import decode_stack
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.prepare import dequantize
from fourfold.planning.report import verify
from fourfold.planning.tiny_models import (
    HIDDEN,
    VOCABULARY,
    build,
    linear_experts,
    model_classes,
    randomise_experts_,
    tiny_config,
)

CHECKS = (
    "packed",
    "same numbers",
    "noise",
    "controls",
    "backward",
    "forward",
    "reload",
    "dequantize",
    "keys",
)
FORMATS: dict[str, dict[str, Any]] = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    # (with its default threshold, bitsandbytes' CPU code for outliers fails on batches of 3-D inputs)
    "INT8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
TIGHT = 2e-5  # relative, fp32: another order of summation
NOISE = {"NF4": (0.01, 0.35), "INT8": (1e-4, 0.06)}  # relative, of an output behind two or three products
OK, FAILED, NOT_APPLICABLE = "ok", "FAILED", "-"


@dataclass
class Row:
    """What was found about one model type.

    Attributes:
        kind: of its experts modules, or why there is none to check.
        cells: of each check in `CHECKS`, and ``built``: ``ok``, ``FAILED``, ``-`` or ``refused``.
        noise: relative, by format: the worst experts module.
        problems: what failed and how, a line each.
    """

    model_type: str
    model: str = ""
    kind: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}

    @contextlib.contextmanager
    def check(self, name: str, where: str = "") -> Iterator[None]:
        """Whatever goes wrong inside fails this check, of this row alone."""
        self.cells.setdefault(name, OK)
        try:
            yield
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}", where)

    def fail(self, name: str, how: str, where: str = "") -> None:
        self.cells[name] = FAILED
        line = " ".join(how.split())
        self.problems.append(f"{name}{f' ({where})' if where else ''}: {line[:300]}")


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
            return None
        row.cells["built"] = OK
        with row.check("packed"):
            check_model(row, model, Path(folder))
    return row


def _build(row: Row) -> PreTrainedModel | None:
    config = tiny_config(row.model_type)
    for model_class in model_classes(type(config)):
        skeleton = build(config, model_class, "meta")
        found = list(find_experts(skeleton))
        if not found and not linear_experts(skeleton):
            continue
        row.model = model_class.__name__
        kinds = dict.fromkeys(f.layout.kind if f.layout else f"refused: {f.reason}" for f in found)
        row.kind = "; ".join(kinds) or "Linears, by bitsandbytes"
        model = build(config, model_class)
        randomise_experts_(model)
        return model
    return None


def _has_no_experts(model_type: str) -> bool:
    """Whether the configuration class as it is, uncut, makes a model without experts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type]()
        skeletons = [build(config, c, "meta") for c in model_classes(type(config))[:1]]
    except Exception:
        return False
    return not any(list(find_experts(s)) or linear_experts(s) for s in skeletons)


def check_model(row: Row, model: PreTrainedModel, folder: Path) -> None:
    """Fill ``row`` with what is found about ``model`` (fp32, in memory); files go to ``folder``."""
    found = list(find_experts(model))
    if any(f.layout is None for f in found):
        _check_refusal(row, model, folder)
        return
    model.save_pretrained(folder / "float")
    calls, logits = _observe_calls(model, found)
    for name, settings in FORMATS.items():
        _check_format(row, name, settings, model, calls, logits is not None, folder)


# --- inputs
# -----------------------------------------------------------------------------------------------------------


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Token ids; where those are not taken, their embeddings."""
    ids = torch.arange(1, 25).view(2, 12) % (VOCABULARY // 2)
    yield {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    yield {
        "inputs_embeds": torch.randn(2, 12, getattr(model.config.get_text_config(), "hidden_size", HIDDEN))
    }


def _forward(model: PreTrainedModel) -> torch.Tensor | None:
    """The model's first output on such inputs alone; None where it wants something else."""
    torch.manual_seed(0)  # embeddings, and the noise that diffusion begins with
    for inputs in _inputs(model):
        with contextlib.suppress(Exception), torch.no_grad():
            output = model(**inputs)
            return next(t for t in tree_leaves(tuple(output.values())) if isinstance(t, torch.Tensor))
    return None


@dataclass
class _Call:
    """An experts module of each kind in a model, and arguments for the module that reads it."""

    found: FoundExperts
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _routed_arguments(found: FoundExperts, tokens: int = 17) -> tuple[torch.Tensor, ...]:
    layout: Any = found.layout
    x_TH = torch.randn(tokens, layout.up.shape.columns)
    weights_Tk, index_Tk = torch.softmax(torch.randn(tokens, layout.num_experts), -1).topk(2)
    return x_TH, index_Tk, weights_Tk


def _observe_calls(
    model: PreTrainedModel, found: list[FoundExperts]
) -> tuple[list[_Call], torch.Tensor | None]:
    """One call for each kind and shape: made up for the routed, overheard for those that run by themselves."""
    kinds = {(type(f.module), f.layout): f for f in found}
    heard: dict[str, tuple[Any, Any]] = {}
    handles = []
    for f in kinds.values():
        if f.layout is not None and not f.layout.routed:
            reader = model.get_submodule(f.reader)
            handles.append(reader.register_forward_pre_hook(partial(_hear, heard, f.name), with_kwargs=True))
    logits = _forward(model)
    for f in kinds.values():
        if f.layout is not None and not f.layout.routed and f.name not in heard:
            _call_around(model, f, heard)
    for handle in handles:
        handle.remove()
    calls = []
    for f in kinds.values():
        if f.layout is not None and f.layout.routed:
            calls.append(_Call(f, _routed_arguments(f), {}))
        else:
            calls.append(_Call(f, *_vivid(*heard[f.name])))
    return calls, logits


def _hear(heard: dict[str, Any], name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
    heard.setdefault(name, (args, kwargs))


def _call_around(model: PreTrainedModel, found: FoundExperts, heard: dict[str, Any]) -> None:
    """Call the smallest module around experts that takes hidden states alone, until theirs are overheard."""
    assert found.layout is not None
    sizes = sorted({size for p in found.layout.projections for size in found.layout.model_shape(p)})
    for block in blocks_around(model, found.reader):
        for inputs in possible_inputs(block, sizes, torch.float32):
            with torch.no_grad(), contextlib.suppress(Exception):
                block(**{n: torch.randn(2, 12, x.shape[-1]) for n, x in inputs.items() if x.ndim == 3})
            if found.name in heard:
                return
    raise RuntimeError(f"nothing around {found.name} could be called")


def _vivid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Overheard arguments with the first floating one scaled to unit size and the others made unequal.

    (Weights that are all alike would make a sum over experts blind to their order.)
    """
    values, spec = tree_flatten((args, kwargs))
    floats = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for i in floats:
        value = values[i].detach()
        size = value.square().mean().sqrt().clamp(min=1e-12)
        values[i] = value / size if i == floats[0] else torch.rand_like(value)
    vivid: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(values, spec)
    return vivid


# --- checks
# -----------------------------------------------------------------------------------------------------------


def _check_format(
    row: Row,
    name: str,
    settings: dict[str, Any],
    model: PreTrainedModel,
    calls: list[_Call],
    callable_: bool,
    folder: Path,
) -> None:
    cls: Any = type(model)
    config = MoeBitsAndBytesConfig(**settings)
    packed = cls.from_pretrained(folder / "float", quantization_config=config).eval()
    with row.check("packed", name):
        _check_packed(packed, model)
    with row.check("reload", name):
        packed.save_pretrained(folder / name)
        again = cls.from_pretrained(folder / name).eval()
        _check_same_state(packed, again)
    if row.cells["reload"] != OK:
        again = cls.from_pretrained(folder / "float", quantization_config=config).eval()
    row.cells.setdefault("forward", OK if callable_ else NOT_APPLICABLE)
    if callable_:
        with row.check("forward", name):
            ours = _forward(packed)
            # (stock repacks a reloaded Linear of four bits on some CPUs: only what is ours is run again)
            theirs = _forward(again) if calls else ours
            if ours is None or theirs is None or not ours.isfinite().all() or not torch.equal(ours, theirs):
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
        _check_output(row, name, call, model, packed, plain)


def _check_packed(packed: PreTrainedModel, model: PreTrainedModel) -> None:
    verify(packed)
    names = [f.name for f in find_experts(model)]
    left = [n for n in names if not isinstance(packed.get_submodule(n), PackedExperts)]
    for name, _ in linear_experts(model):
        inside = packed.get_submodule(name).named_modules()
        left += [f"{name}.{n}" for n, m in inside if type(m) is nn.Linear]
    if left:
        raise ValueError(f"not packed: {', '.join(left)}")


def _check_same_state(first: nn.Module, second: nn.Module) -> None:
    before, after = first.state_dict(), second.state_dict()
    if before.keys() != after.keys():
        raise ValueError(f"other tensors: {sorted(before.keys() ^ after.keys())[:5]}")
    other = [n for n, t in before.items() if isinstance(t, torch.Tensor) and not torch.equal(t, after[n])]
    if other:
        raise ValueError(f"other values: {', '.join(other[:5])}")


def _check_dequantized(packed: PreTrainedModel, plain: PreTrainedModel, found: list[FoundExperts]) -> None:
    for f in found:
        module, own = packed.get_submodule(f.name), plain.get_submodule(f.name)
        assert isinstance(module, PackedExperts)
        if type(own) is not type(f.module):
            raise ValueError(f"{f.name} is a {type(own).__name__}")
        for projection in module.fourfold_layout.projections:
            decoded = decode_stack(module.stack(projection), torch.float32)
            expected = module.fourfold_layout.from_stack(decoded, projection)
            if not torch.equal(getattr(own, projection.name), expected):
                raise ValueError(f"{f.name}.{projection.name} has other values")


def _check_keys(folder: Path, name: str, plain: PreTrainedModel, cls: Any, found: list[FoundExperts]) -> None:
    def keys(where: Path) -> set[str]:
        return {k for file in where.glob("*.safetensors") for k in load_file(file)}

    ours, original = keys(folder / f"{name}-plain"), keys(folder / "float")
    if ours != original:
        raise ValueError(f"other keys: {sorted(ours ^ original)[:4]}")
    loaded = cls.from_pretrained(folder / f"{name}-plain")
    for tensor in (t for f in found for t in f.tensors()):
        if not torch.equal(loaded.get_parameter(tensor), plain.get_parameter(tensor)):
            raise ValueError(f"{tensor} has other values after saving and loading")


def _check_refusal(row: Row, model: PreTrainedModel, folder: Path) -> None:
    """Refused from the configuration alone, and loaded when the setting in the message is passed."""
    cls: Any = type(model)
    model.config.save_pretrained(folder / "bare")  # no weights: they must not be asked for
    model.save_pretrained(folder / "float")
    settings = FORMATS["NF4"]
    try:
        cls.from_pretrained(folder / "bare", quantization_config=MoeBitsAndBytesConfig(**settings))
    except (UnsupportedExpertsError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):  # transformers looks for the files first
            message = _refusal(cls, folder / "float", settings)
    patterns = re.findall(r"'([^']+)'", message.partition("llm_int8_skip_modules=")[2].partition("]")[0])
    if not patterns:
        raise ValueError("it was not refused")
    skipping = MoeBitsAndBytesConfig(**settings, llm_int8_skip_modules=patterns)
    cls.from_pretrained(folder / "float", quantization_config=skipping)
    row.cells |= dict.fromkeys(CHECKS, NOT_APPLICABLE) | {"packed": "refused"}


def _refusal(cls: Any, folder: Path, settings: dict[str, Any]) -> str:
    try:
        cls.from_pretrained(folder, quantization_config=MoeBitsAndBytesConfig(**settings))
    except UnsupportedExpertsError as error:
        return str(error)
    return ""


# --- the experts module by itself
# -----------------------------------------------------------------------------------------------------------


def _run(reader: nn.Module, call: _Call, grad: bool = False) -> list[torch.Tensor]:
    """Output and, on request, gradient of the first floating input."""
    for module in reader.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    args, kwargs = tree_map(
        lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (call.args, call.kwargs)
    )
    x = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point())
    x.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = tree_leaves(reader(*args, **kwargs))[0]
    if not grad:
        return [y]
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), x)]


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _check_output(
    row: Row, fmt: str, call: _Call, model: PreTrainedModel, packed: PreTrainedModel, plain: PreTrainedModel
) -> None:
    reader, where = call.found.reader, f"{fmt}, {call.found.name}"
    (original,) = _run(model.get_submodule(reader), call)
    (same,) = _run(plain.get_submodule(reader), call)
    (ours,) = _run(packed.get_submodule(reader), call)
    low, high = NOISE[fmt]
    with row.check("same numbers", where):
        if not _distance(ours, same) < TIGHT:
            raise ValueError(f"{_distance(ours, same):.2e} from the same numbers dequantized")
    with row.check("noise", where):
        noise = _distance(ours, original)
        row.noise[fmt] = max(noise, row.noise.get(fmt, 0.0))
        if not low < noise < high:
            raise ValueError(f"{noise:.2e} from the original, where {low} to {high} is right")
    with row.check("backward", where):
        for mine, theirs in zip(
            _run(packed.get_submodule(reader), call, grad=True),
            _run(plain.get_submodule(reader), call, grad=True),
            strict=True,
        ):
            if not theirs.norm() > 0 or not _distance(mine, theirs) < TIGHT * 5:
                raise ValueError(f"gradient {_distance(mine, theirs):.2e} from the one of the same numbers")
    with row.check("controls", where):
        for damage, apply_ in DAMAGES.items():
            damaged = copy.deepcopy(packed.get_submodule(reader))
            inside = call.found.name[len(reader) :].lstrip(".")
            module: Any = damaged.get_submodule(inside)
            apply_(module)
            (wrong,) = _run(damaged, call)
            for theirs, limit in ((same, TIGHT), (original, high)):
                if not _distance(wrong, theirs) > limit:
                    raise ValueError(f"{damage}: only {_distance(wrong, theirs):.2e} away, and not seen")


def _replace(module: PackedExperts, name: str, suffix: str, tensor: torch.Tensor) -> None:
    module._parameters[stored_name(name, suffix)] = nn.Parameter(tensor, requires_grad=False)


def _roll_experts(module: PackedExperts, data: bool = True) -> None:
    for projection in module.fourfold_layout.projections:
        for suffix, tensor in module.stack(projection).tensors():
            if suffix or data:
                _replace(module, projection.name, suffix, tensor.roll(1, 0))


def _swap_gate_and_up(module: PackedExperts) -> None:
    """Gate and up exchanged; where there is no gate, the halves of the first product's rows."""
    layout: Any = module.fourfold_layout
    first = layout.projections[0]
    second = layout.projections[1] if len(layout.projections) == 3 else None
    if second is not None and second.shape == first.shape:
        for (suffix, one), (_, other) in zip(
            module.stack(first).tensors(), module.stack(second).tensors(), strict=True
        ):
            _replace(module, first.name, suffix, other)
            _replace(module, second.name, suffix, one)
        return
    rows = first.shape.rows
    order = torch.arange(rows).roll(rows // 2)
    if not getattr(layout, "is_concatenated", True):
        order = torch.arange(rows).view(-1, 2).flip(1).flatten()
    for suffix, tensor in module.stack(first).tensors():
        if tensor.ndim >= 2 and tensor.shape[1] == rows:
            _replace(module, first.name, suffix, tensor[:, order])
        elif tensor.ndim >= 2 and tensor.shape[1] == first.shape.parts == 2:
            _replace(module, first.name, suffix, tensor.flip(1))


DAMAGES: dict[str, Callable[[PackedExperts], None]] = {
    "experts rolled by one": _roll_experts,
    "scales of the neighbour": lambda module: _roll_experts(module, data=False),
    "gate and up swapped": _swap_gate_and_up,
}
