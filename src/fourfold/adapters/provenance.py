"""``fourfold.json``, beside every adapter that was trained on packed experts.

An adapter is a difference, and means nothing without what it was trained on: which model, at which revision,
and packed how. PEFT's adapter_config.json names a model and nothing more. So this file says the rest, and an
adapter that is put on another base is an error; servers and stock PEFT do not look at it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fourfold.adapters.gather import own_class
from fourfold.errors import AdapterError
from fourfold.experts import PackedExperts, find_experts
from fourfold.experts.layout import clean_name, name_suffix
from fourfold.formats import PackFormat
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.origin import Origin
from fourfold.version import __version__

FILE = "fourfold.json"
VERSION = 1
BASE_WEIGHTS = ("original", "dequantized")  # what an adapter is put on elsewhere
LOFTQ = "loftq"  # how an adapter began: with an approximation of what packing lost; else None
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_checked: ContextVar[bool] = ContextVar("fourfold_checks_the_base", default=True)


@contextlib.contextmanager
def any_base() -> Iterator[None]:
    """Within it, adapters are put on whatever base they are put on."""
    token = _checked.set(False)
    try:
        yield
    finally:
        _checked.reset(token)


def settings_of(model: nn.Module) -> MoeBitsAndBytesConfig | None:
    """How ``model`` (with or without adapters) was packed; None where no experts are."""
    if not any(isinstance(module, PackedExperts) for module in model.modules()):
        return None
    base = getattr(model, "get_base_model", lambda: model)()
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    return config if isinstance(config, MoeBitsAndBytesConfig) else None


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What is written into ``fourfold.json`` of an adapter on ``model``; None where nothing is packed.

    Returns:
        ``dtype`` (of the model), ``experts`` (format), ``linears`` (settings of Linears), ``skips``,
        ``left`` (modules that are in high precision although others of their kind are packed), ``shapes``
        (role of each packed parameter -> how many of them, and experts, rows, columns), ``base`` (`Origin`,
        or None).
    """
    config = settings_of(model)
    if config is None:
        return None
    fmt = config.experts_format()
    assert fmt is not None
    base = getattr(model, "get_base_model", lambda: model)()
    four = config.load_in_4bit
    return {
        "version": VERSION,
        "fourfold_version": __version__,
        "base": config.base.to_dict() if config.base else None,
        "model_type": base.config.model_type if hasattr(base, "config") else None,
        "dtype": _dtype_name(base),
        "experts": fmt.to_dict(),
        "linears": {
            "bits": 4 if four else 8 if config.load_in_8bit else None,
            "quant_type": config.bnb_4bit_quant_type if four else None,
            "double_quant": config.bnb_4bit_use_double_quant if four else False,
        },
        "skips": config.llm_int8_skip_modules,
        "left": left_unpacked(base, linears=config.is_linear_quantized),
        "shapes": shapes_of(base),
    }


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Role of each packed parameter of ``model`` -> how many of them, and experts, rows, columns."""
    shapes: dict[str, list[int]] = {}
    for found in find_experts(model):
        if not isinstance(found.module, PackedExperts):
            continue
        spread = found.module.fourfold_spread
        for p in found.module.fourfold_layout.projections:
            role = name_suffix(f"{found.name}.{p.name}")
            experts = p.shape.experts if spread is None else spread.experts
            shapes.setdefault(role, [0, experts, p.shape.rows, p.shape.columns])[0] += 1
    return shapes


def left_unpacked(model: nn.Module, *, linears: bool) -> list[str]:
    """Names of experts modules, and of Linears where others are quantized, that were left in high precision.

    Which those are follows from the skips, from what transformers leaves by itself (heads, tied weights), and
    from shapes (routers); the names of it all say what was packed, whichever release decided.

    Args:
        model: packed, or its skeleton, with or without adapters.
        linears: Linears are quantized.
    """
    experts = {found.name: isinstance(found.module, PackedExperts) for found in find_experts(model)}
    left = [name for name, packed in experts.items() if not packed]
    for name, module in model.named_modules() if linears else ():
        # (bitsandbytes' Linears are subclasses; an adapter's factors are Linears, too)
        if own_class(module) in (nn.Linear, Conv1D) and not _is_adapters(name):
            cleaned = clean_name(name).removesuffix(".original_module")
            if not any(cleaned.startswith(f"{found}.") for found in experts):
                left.append(cleaned)
    return sorted(left)


def _is_adapters(name: str) -> bool:
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _dtype_name(model: nn.Module) -> str | None:
    """What the model's weights were loaded in, and packed from; None where it is not said."""
    name = str(getattr(getattr(model, "config", None), "dtype", None)).removeprefix("torch.")
    return name if name in _DTYPES else None


def read(folder: str | Path) -> dict[str, Any] | None:
    """``fourfold.json`` of an adapter's folder; None where there is none.

    Raises:
        AdapterError: it cannot be understood.
    """
    return _parse(Path(folder) / FILE) if (Path(folder) / FILE).is_file() else None


def _parse(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            raise ValueError(f"version {stored['version']!r}; this release knows {VERSION}")
        format_of(stored)
        Origin.from_dict(stored["base"], str(path))
        settings_for(stored)
        dtype_of(stored)
        if stored.setdefault("init", None) not in (None, LOFTQ):
            raise ValueError(f"init {stored['init']!r}; this release knows {LOFTQ}")
        for key in ("linears", "shapes"):
            if not isinstance(stored[key], dict):
                raise TypeError(f"{key} is {stored[key]!r}")
        left = stored.get("left")  # (not written by the first releases)
        if left is not None and not (isinstance(left, list) and all(isinstance(n, str) for n in left)):
            raise TypeError(f"left is {left!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"{path} cannot be understood ({error}); copy the adapter again, or install a newer fourfold"
        ) from error
    assert isinstance(stored, dict)
    return stored


def format_of(stored: Mapping[str, Any]) -> PackFormat:
    """How the experts were packed that the adapter was trained on."""
    return PackFormat(**stored["experts"])


def dtype_of(stored: Mapping[str, Any]) -> torch.dtype | None:
    """What the base's weights were before they were packed; None where nobody wrote it."""
    name = stored.get("dtype")
    return None if name is None else _DTYPES[name]


def settings_for(stored: Mapping[str, Any]) -> MoeBitsAndBytesConfig:
    """The configuration that packs a base as the adapter's was."""
    fmt, linears = format_of(stored), stored["linears"]
    four = linears["bits"] == 4
    return MoeBitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=linears["bits"] == 8,
        bnb_4bit_quant_type=linears["quant_type"] if four else None,
        bnb_4bit_use_double_quant=fmt.double_quant or bool(linears["double_quant"]),
        experts_quant_type=fmt.quant_type,
        experts_blocksize=fmt.blocksize,
        llm_int8_skip_modules=stored["skips"],
    )


def set_init(model: nn.Module, adapter_name: str, init: str | None) -> None:
    """Remember on the model how an adapter began (`LOFTQ`, or None), until it is saved."""
    for module in model.modules():
        if adapter_name in getattr(module, "lora_A", ()) and hasattr(module, "fourfold_inits"):
            if init is None:
                module.fourfold_inits.pop(adapter_name, None)
            else:
                module.fourfold_inits[adapter_name] = init


def init_of(model: nn.Module, adapter_name: str) -> str | None:
    """How an adapter on ``model`` began."""
    found = (getattr(module, "fourfold_inits", {}).get(adapter_name) for module in model.modules())
    return next((init for init in found if init is not None), None)


def stored_init(folder: str | Path) -> str | None:
    """How an adapter began, as its ``fourfold.json`` says, whatever else that does not say.

    Raises:
        AdapterError: the file is no JSON object, or names a way of beginning that is not known.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        init = dict(json.loads(path.read_text(encoding="utf-8"))).get("init")
        if init not in (None, LOFTQ):
            raise ValueError(f"init {init!r}; this release knows {LOFTQ}")
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be understood ({error}); copy the adapter again") from error
    return None if init is None else LOFTQ


def refuse_on_original(folder: str | Path, way_out: str) -> None:
    """For whatever puts an adapter on the original weights.

    Raises:
        AdapterError: it began with what packing lost, which those weights still have.
    """
    if stored_init(folder) == LOFTQ:
        raise AdapterError(
            f"{folder} began with what packing had taken from the weights (init: loftq), so on the original "
            f"ones that would be there twice; {way_out}"
        )


def write(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Write ``fourfold.json`` into an adapter's folder, if experts of ``model`` are packed."""
    described = describe(model)
    if described is not None:
        described["init"] = init_of(model, adapter_name)
        (Path(folder) / FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def name_the_original(model: nn.Module, peft_config: Any) -> None:
    """Let an adapter's configuration name the original model where it names a packed copy of it."""
    config = settings_of(model)
    if config is None or config.base is None:
        return
    base = getattr(model, "get_base_model", lambda: model)()
    if peft_config.base_model_name_or_path in (None, "", getattr(base, "name_or_path", None)):
        peft_config.base_model_name_or_path = config.base.name


def check(model: nn.Module, folder: str | Path, **hub: Any) -> str | None:
    """Refuse an adapter that was trained on another base, or on this one packed otherwise.

    Args:
        model: packed, or anything else (nothing is compared then; but an adapter that began with what packing
            lost is refused on the very checkpoint that was packed).
        folder: of the adapter, or its id on the hub.
        hub: ``subfolder``, ``revision``, ``token`` and the like.

    Returns:
        How the adapter began; see `set_init`.

    Raises:
        AdapterError: naming what differs, and how to use the adapter all the same.
    """
    ours = describe(model)
    if ours is None:
        _check_unpacked(model, Path(folder) / (hub.get("subfolder") or ""))
        return None
    path = _find(folder, **hub)
    if path is None:
        return None
    stored = _parse(path)
    differs = difference(stored, ours) if _checked.get() else None
    if differs and stored["init"]:  # without the file nothing would say any more that it needs this base
        raise AdapterError(
            f"{folder} was trained on {differs}, and began with {stored['init']}_init: it is right on its "
            "own base alone. Load that base as it was (to put the adapter on this one all the same: "
            "any_base=True of `load_adapter` of fourfold.adapters.peft_lora)"
        )
    if differs:
        raise AdapterError(
            f"{folder} was trained on {differs}. Load that base as it was; or, to put the adapter on this "
            f"one all the same, remove {path} (`load_adapter` of fourfold.adapters.peft_lora takes "
            "any_base=True)"
        )
    init: str | None = stored["init"]
    return init


def _check_unpacked(model: nn.Module, folder: Path) -> None:
    """(Of folders alone: other adapters' loading is left as it is, without a request more.)"""
    base = getattr(model, "get_base_model", lambda: model)()
    if not _checked.get() or not (folder / FILE).is_file() or getattr(base, "fourfold_dequantized", False):
        return
    stored = _parse(folder / FILE)
    origin = Origin.from_dict(stored["base"], FILE)
    if origin is not None and origin.name == getattr(base, "name_or_path", None):
        refuse_on_original(folder, "load the model packed, or call `fourfold.dequantize` on it")


def _find(folder: str | Path, **hub: Any) -> Path | None:
    from transformers.utils import cached_file

    known = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
    path = None
    with contextlib.suppress(OSError):  # (neither a folder nor an id: the loader says so in its own words)
        path = cached_file(
            str(folder),
            FILE,
            **{name: value for name, value in hub.items() if name in known and value is not None},
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    return None if path is None else Path(path)


def difference(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first thing in which two descriptions differ, as "..., and this is ..."; None where they agree."""
    trained, here = Origin.from_dict(stored["base"], FILE), Origin.from_dict(ours["base"], FILE)
    if stored["shapes"] != ours["shapes"]:
        return f"a model with experts of {stored['shapes']}, and this one has {ours['shapes']}"
    if trained and here and not trained.is_same(here):
        if str(trained) == str(here):
            return f"{trained}, and other weights lie there by now"
        return f"{trained}, and this is {here}"
    if stored["experts"] != ours["experts"]:
        return f"experts packed as {format_of(stored)}, and these are {format_of(ours)}"
    if stored["linears"] != ours["linears"]:
        return f"Linears held as {stored['linears']}, and these are {ours['linears']}"
    return difference_of_left(stored.get("left"), ours.get("left"))


def difference_of_left(trained: list[str] | None, here: list[str] | None) -> str | None:
    """Modules that one side packed and the other did not, in words; None where there are none, or nothing is
    known."""
    if trained is None or here is None or trained == here:
        return None
    only, others = sorted(set(trained) - set(here)), sorted(set(here) - set(trained))
    said = []
    if only:
        said.append(f"{_few(only)} in high precision, packed here")
    if others:
        said.append(f"{_few(others)} packed, in high precision here")
    return f"a model with {'; and with '.join(said)} (llm_int8_skip_modules)"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
