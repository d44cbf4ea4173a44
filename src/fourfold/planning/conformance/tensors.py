"""Every tensor of a loaded model against the float model that it was loaded from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.experts import PackedExperts, find_experts
from fourfold.formats import decode_stack
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.planning.conformance.modules import run_on
from fourfold.planning.conformance.row import AS_STOCK, FORMATS, NOT_RUN, OK, SEPARATOR
from fourfold.planning.conformance.tiny_models import linear_experts
from fourfold.planning.report import verify

# Relative distance of decoded matrices from the original ones.
MATRIX_NOISE = {"NF4": (0.01, 0.15), "INT8": (1e-4, 0.02)}


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal in values and in dtype (torch compares values across dtypes)."""
    return first.dtype == second.dtype and torch.equal(first, second)


def check_same_state(first: nn.Module, second: nn.Module) -> None:
    """The same names, dtypes and values."""
    _raise_if_any(_others(first, second))


def _others(first: nn.Module, second: nn.Module) -> list[str]:
    """Tensors that differ in value or dtype; the names must be the same."""
    before, after = first.state_dict(), second.state_dict()
    if before.keys() != after.keys():
        raise ValueError(f"other tensors: {sorted(before.keys() ^ after.keys())[:5]}")
    return [n for n, t in before.items() if isinstance(t, torch.Tensor) and not same(t, after[n])]


def _raise_if_any(others: list[str]) -> None:
    if others:
        raise ValueError(f"other values or dtypes: {', '.join(others[:5])}")


def check_reloaded(packed: nn.Module, again: nn.Module, plain: PreTrainedModel, folder: Path) -> bool:
    """As `check_same_state`, but that a dtype may change where it changes without quantization as well.

    (config.json holds one dtype, that of the model's first parameter: where a part of the model is kept in
    fp32, transformers reads the rest in fp32 too.)

    Args:
        packed: the model that was saved.
        again: the model that was loaded from there.
        plain: the unquantized model; it is saved to ``folder`` and reloaded if a dtype has changed.

    Returns:
        Whether every dtype is the same.
    """
    others = _others(packed, again)
    if not others:
        return True
    cls: Any = type(plain)
    plain.save_pretrained(folder)
    stock: dict[str, torch.Tensor] = cls.from_pretrained(folder).state_dict()
    before, after, unquantized = packed.state_dict(), again.state_dict(), plain.state_dict()

    def is_as_in_stock(name: str) -> bool:
        if name not in unquantized or before[name].dtype != unquantized[name].dtype:
            return False  # packed, or what belongs to it
        cast = before[name].to(stock[name].dtype)
        return unquantized[name].is_floating_point() and same(cast, after[name])

    _raise_if_any([name for name in others if not is_as_in_stock(name)])
    return False


def check_packed(packed: PreTrainedModel, model: PreTrainedModel, fmt: str, left: Sequence[str] = ()) -> None:
    """Every experts module is packed but those in ``left``, and nothing else was lost or changed.

    ``model`` holds what every unquantized tensor must equal, dtype included.
    """
    verify(packed)
    found = [f for f in find_experts(model) if f.name not in left]
    missed = [f.name for f in found if not isinstance(packed.get_submodule(f.name), PackedExperts)]
    for name, _ in linear_experts(model):
        inside = packed.get_submodule(name).named_modules()
        missed += [f"{name}.{n}" for n, m in inside if type(m) is nn.Linear and m.in_features % 64 == 0]
    missed += [n for n in _unexplained_stacks(packed) if not n.startswith(tuple(f"{m}." for m in left))]
    if missed:
        raise ValueError(f"not packed: {', '.join(missed)}")
    _check_experts(packed, model, fmt)
    _check_others(packed, model, fmt)


def _unexplained_stacks(packed: nn.Module) -> list[str]:
    """Floating parameters of three dimensions that are not seen to be something else than experts."""
    return [
        f"{name}.{n} {tuple(p.shape)}"
        for name, module in packed.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        for n, p in module.named_parameters(recurse=False)
        if p.ndim >= 3 and p.is_floating_point() and not _reason_to_stay(n, p)
    ]


def _reason_to_stay(name: str, parameter: torch.Tensor) -> str:
    if parameter.shape[0] == 1:
        return "one table, no stack"
    if min(parameter.shape[1:]) == 1:
        return "vectors, as of a convolution of each channel; no matrices"
    if re.search("position", name) and re.search("embed", name):
        return "looked up, not multiplied"
    return ""


def _check_experts(packed: PreTrainedModel, model: PreTrainedModel, fmt: str) -> None:
    for name, module in packed.named_modules():
        if isinstance(module, PackedExperts):
            layout = module.fourfold_layout
            for projection in layout.projections:
                weight = getattr(model.get_submodule(name), projection.name)
                decoded_ENK = decode_stack(module.stack(projection), torch.float32)
                _check_noise(
                    f"{name}.{projection.name}", layout.from_stack(decoded_ENK, projection), weight, fmt
                )


def _check_others(packed: PreTrainedModel, model: PreTrainedModel, fmt: str) -> None:
    """Biases, norms, routers, embeddings and buffers to the bit; Linears within the noise of the format."""
    ours = packed.state_dict()
    quantized = {
        f"{name}.{projection.name}"
        for name, module in packed.named_modules()
        if isinstance(module, PackedExperts)
        for projection in module.fourfold_layout.projections
    }
    for name, theirs in model.state_dict().items():
        if name in quantized or not isinstance(theirs, torch.Tensor):
            continue
        if name not in ours:
            raise ValueError(f"{name} is lost")
        owner, _, own_name = name.rpartition(".")
        decoded = _decode_linear(packed.get_submodule(owner)) if own_name == "weight" else None
        if decoded is not None:
            _check_noise(name, decoded, theirs, fmt)
        elif not same(ours[name], theirs):
            raise ValueError(f"{name} has other values, or is {ours[name].dtype} instead of {theirs.dtype}")


def _decode_linear(module: nn.Module) -> torch.Tensor | None:
    """The weight of a bitsandbytes Linear; None for everything else."""
    import bitsandbytes.functional as bnb

    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        return bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
    return None


def _check_noise(name: str, ours: torch.Tensor, theirs: torch.Tensor, fmt: str) -> None:
    noise = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    low, high = MATRIX_NOISE[fmt]
    if ours.shape != theirs.shape or not low < noise < high:
        raise ValueError(f"{name} is {noise:.2e} from the original, where {low} to {high} is right")


def check_bf16(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor] | None, skip: list[str], folder: Path
) -> str:
    """Loaded in bf16, NF4: dtypes as without quantization, the same after saving, and it runs.

    Returns:
        The cell: ``as stock`` where reloading changes dtypes as it does without quantization, ``not run``
        where ``inputs`` is None or the unquantized model does not run in bf16.
    """
    cls: Any = type(model)
    plain = cls.from_pretrained(folder / "float", dtype=torch.bfloat16).eval()
    if hasattr(model.config, "_experts_implementation"):  # not saved; stock's fast one refuses odd sizes
        plain.config._experts_implementation = model.config._experts_implementation
    config = MoeBitsAndBytesConfig(**FORMATS["NF4"], llm_int8_skip_modules=skip)
    packed = cls.from_pretrained(folder / "float", quantization_config=config, dtype=torch.bfloat16).eval()
    check_packed(packed, plain, "NF4")
    packed.save_pretrained(folder / "bf16")
    again = cls.from_pretrained(folder / "bf16").eval()
    found = [] if check_reloaded(packed, again, plain, folder / "bf16-plain") else [AS_STOCK]
    if not _runs_in_bf16(packed, plain, inputs):
        found.append(NOT_RUN)
    return SEPARATOR.join(found) or OK


def _runs_in_bf16(
    packed: PreTrainedModel, plain: PreTrainedModel, inputs: dict[str, torch.Tensor] | None
) -> bool:
    """Whether it was run; what it gives is finite, in the dtype that the unquantized model gives."""
    if inputs is None:
        return False
    floats = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()}
    try:
        expected = run_on(plain, floats)
    except Exception:  # stock's own: the model does not run in bf16 on this device
        return False
    ours = run_on(packed, floats)
    if ours.dtype != expected.dtype or not ours.isfinite().all():
        raise ValueError(f"the packed model gives {ours.dtype} instead of {expected.dtype}, or is not finite")
    return True
