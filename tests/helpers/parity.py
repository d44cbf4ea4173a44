"""Measures LoRA on packed experts against stock PEFT on the same numbers in high precision.

Both sides get the same adapter, by way of a folder as PEFT saves it. Relative differences are norms: of all
logits together, of each factor's gradient by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from transformers import PreTrainedModel

import fourfold
import tiny
from fourfold.experts import find_experts

EXACT = {"eager": None, "reentrant": True, "non-reentrant": False}
"""Ways of computing gradients in fp32; the value is `use_reentrant` of gradient checkpointing."""
ROUNDED = ("autocast", "bf16")
ATTENTION = ["q_proj", "v_proj"]


SEEDS = 6
BF16_NOISE = 8 * 2**-8
"""Bound of the relative error of gradients in bf16: eight roundings of a tiny model."""
AGAINST_STOCK = {"autocast": 1.8, "bf16": 1.4}
"""Bounds of our error over stock's: 1.67 and 1.31 were measured at most (docs/adapters.md)."""


@dataclass(frozen=True)
class Rounded:
    """Relative errors against stock in fp32, of all gradients together."""

    ours: float
    stock: float


class Pair:
    """A packed model and what stock sees of it, both made anew at each call."""

    def __init__(self, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype
        torch.manual_seed(0)
        tiny.build(tiny.KINDS[kind]()).to(dtype).save_pretrained(folder / "model")

    def packed(self) -> PreTrainedModel:
        """NF4 experts, double-quantized."""
        return tiny.load(self.folder / "model", experts_quant_type="nf4", bnb_4bit_use_double_quant=True)

    def plain(self) -> PreTrainedModel:
        """The same numbers in the model's own class."""
        return fourfold.dequantize(self.packed())

    def adapter(self, side: str, seed: int = 1) -> Path:
        """A random adapter, both factors non-zero, saved by ``side`` ("ours" or "stock")."""
        model = self.packed() if side == "ours" else self.plain()
        torch.manual_seed(seed)
        folder = self.folder / f"adapter-{side}-{seed}"
        get_peft_model(model, lora(model)).save_pretrained(folder)
        return folder


def lora(model: PreTrainedModel, **changes: object) -> LoraConfig:
    """All experts and some Linears; a rank that is no multiple of anything."""
    arguments = {
        "r": 5,
        "lora_alpha": 7,
        "target_modules": ATTENTION,
        "target_parameters": fourfold.expert_targets(model),
        "init_lora_weights": False,
    }
    return LoraConfig(**(arguments | changes))


def expected_factors(model: PreTrainedModel) -> int:
    """Two for each projection of experts and each targeted Linear, counted without PEFT."""
    experts = sum(len(found.tensors()) for found in find_experts(model))
    linears = sum(name.rpartition(".")[2] in ATTENTION for name, _ in model.named_modules())
    return 2 * (experts + linears)


def logits_difference(pair: Pair, side: str) -> float:
    """Of an adapter that ``side`` saved, on both models."""
    adapter = pair.adapter(side)
    here = tiny.logits(PeftModel.from_pretrained(pair.packed(), str(adapter)))
    there = tiny.logits(PeftModel.from_pretrained(pair.plain(), str(adapter)))
    return float((here - there).norm() / there.norm())


def gradients(
    base: PreTrainedModel, adapter: Path, use_reentrant: bool | None = None, autocast: bool = False
) -> dict[str, torch.Tensor | None]:
    """Of every factor after one backward pass."""
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        loss = model(tiny.IDS, labels=tiny.IDS).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


def _worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((found[n].float() - w.float()).norm() / w.float().norm()) for n, w in wanted.items())


def _together(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    off = sum(float((found[n].float() - w.float()).norm()) ** 2 for n, w in wanted.items())
    return (off / sum(float(w.float().norm()) ** 2 for w in wanted.values())) ** 0.5


def complete(found: dict[str, torch.Tensor | None], base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients, after counting them.

    Raises:
        AssertionError: a factor has none, or only zeros, or is not there.
    """
    missing = [name for name, gradient in found.items() if gradient is None or not gradient.any()]
    assert not missing, f"no gradient: {missing}"
    assert len(found) == expected_factors(base), (len(found), expected_factors(base))
    return found  # type: ignore[return-value]


def exact_gradients(pair: Pair, way: str) -> float:
    """The largest relative difference of a factor's gradient from stock's, in fp32."""
    adapter = pair.adapter("ours")
    ours = complete(gradients(pair.packed(), adapter, EXACT[way]), pair.packed())
    stock = complete(gradients(pair.plain(), adapter, EXACT[way]), pair.packed())
    assert ours.keys() == stock.keys()
    return _worst(ours, stock)


def _routed(base: PreTrainedModel) -> list[torch.Tensor]:
    """Filled with the experts chosen in each layer when the model runs."""
    chosen: list[torch.Tensor] = []
    for found in find_experts(base):
        found.module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].sort(-1).values.clone()))
    return chosen


def rounded_gradients(pair: Pair, way: str, seed: int) -> Rounded | None:
    """Errors of both sides against stock in fp32; ``pair`` is in fp32 for autocast, else in bf16.

    None where rounding sent a token to other experts on either side: that is no error of a product.
    """
    adapter = pair.adapter("ours", seed)
    found, chosen = [], []
    for base in (pair.plain().float(), pair.packed(), pair.plain()):
        autocast = way == "autocast" and bool(found)
        chosen.append(_routed(base))
        found.append(complete(gradients(base, adapter, autocast=autocast), pair.packed()))
    if any(not torch.equal(a, b) for other in chosen[1:] for a, b in zip(chosen[0], other, strict=True)):
        return None
    reference, ours, stock = found
    return Rounded(_together(ours, reference), _together(stock, reference))


def rounded(kind: str, folder: Path, way: str) -> Rounded:
    """Mean of `SEEDS` adapters whose tokens are routed alike."""
    pair = Pair(kind, folder, torch.float32 if way == "autocast" else torch.bfloat16)
    kept: list[Rounded] = []
    seed = 0
    while len(kept) < SEEDS:
        seed += 1
        assert seed < 10 * SEEDS, f"{kind}: rounding reroutes tokens of nearly every adapter"
        errors = rounded_gradients(pair, way, seed)
        if errors is not None:
            kept.append(errors)
    return Rounded(sum(e.ours for e in kept) / SEEDS, sum(e.stock for e in kept) / SEEDS)


@contextlib.contextmanager
def stock_reads(model: torch.nn.Module) -> Iterator[None]:
    """Stock's own sums, also where a parent reads the parameters (stock has no answer to that: dbrx)."""
    stock = [m for m in model.modules() if type(m) is StockParamWrapper]
    read = [m for m in stock if type(m.get_base_layer()).__name__ == "DbrxExpertGLU"]
    with contextlib.ExitStack() as stack:
        if read:
            plain = torch.nn.Module.__getattr__

            def look(self: Any, name: str) -> Any:
                try:
                    return plain(self, name)
                except AttributeError:
                    return getattr(self.get_base_layer(), name)

            stack.enter_context(mock.patch.object(StockParamWrapper, "__getattr__", look, create=True))
            for wrapper in read:
                if not wrapper.disable_adapters:
                    stack.enter_context(wrapper._activate_lora(wrapper.active_adapters))
        yield
