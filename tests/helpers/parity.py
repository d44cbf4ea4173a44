"""Measures LoRA on packed experts against stock PEFT on the same numbers in high precision.

Both sides get the same adapter, by way of a folder as PEFT saves it. Relative differences are norms: of all
logits together, of each factor's gradient by itself.

What stock itself cannot do is measured too (`stock_error`). Where all that it lacks is an answer to a module
around the experts that reads their parameters, the reference is stock with that answer (`stock_reads`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import fourfold
import tiny
from fourfold.experts import find_experts
from fourfold.planning.conformance import tiny_models

EXACT = {"eager": None, "reentrant": True, "non-reentrant": False}
"""Ways of computing gradients in fp32; the value is `use_reentrant` of gradient checkpointing."""
ROUNDED = ("autocast", "bf16")
DECORATED = {
    "aria": "aria_text",
    "muse_spark": "muse_spark_text",
    "privacy_filter": "openai_privacy_filter",
    "minimax_m3": "minimax_m3_vl_text",
}
"""More kinds of decorated experts, and the model types that they are tested with."""
OWN_FORWARD = {
    "llama4": "llama4_text",
    "dbrx": "dbrx",
    "longcat_flash": "longcat_flash",
    "jetmoe": "jetmoe",
    "step3p5": "step3p5",
    "inkling": "inkling_text",
}
TYPES = DECORATED | OWN_FORWARD
KINDS = (*tiny.KINDS, *TYPES)
ROUNDED_SETTINGS: dict[str, dict[str, object]] = {
    # Every token takes all experts (rounding reroutes some token of nearly every adapter otherwise), and
    # attention is not sharpened: it alone makes an error of 0.13 in bf16, stock's as well.
    "muse_spark": {"num_experts_per_tok": tiny_models.EXPERTS, "qk_scale_factor": 1.0},
    "jetmoe": {"num_experts_per_tok": tiny_models.EXPERTS},
}
"""What differs in the models whose rounding is measured."""
STOCK_CANNOT = {
    ("dbrx", way): r"AttributeError: 'ParamWrapper' object has no attribute 'v1'"
    for way in (*EXACT, *ROUNDED)
} | {
    ("jetmoe", way): r"ValueError: JetMoeForCausalLM does not support \w+ checkpointing"
    for way in ("reentrant", "non-reentrant")
}
"""Stock's own errors, as measured, by kind and way: patterns of their beginnings."""
ATTENTION = ["q_proj", "v_proj", "Wqkv", "kv_b_proj", "kv_proj"]


SEEDS = 2
BF16_NOISE = 8 * 2**-8
"""Bound of the relative error of gradients in bf16: eight roundings of a tiny model."""


def is_known(kind: str) -> bool:
    """Whether this version of transformers has a model of the kind."""
    return kind in tiny.KINDS or TYPES[kind] in tiny_models.known_types()


def build(kind: str, **settings: object) -> PreTrainedModel:
    """A tiny random model in fp32 whose experts matter."""
    config = tiny.KINDS[kind]() if kind in tiny.KINDS else tiny_models.tiny_config(TYPES[kind])
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    if kind in tiny.KINDS:
        return tiny.build(config)
    torch.manual_seed(0)
    model = tiny_models.build(config, tiny_models.model_classes(type(config))[0])
    tiny_models.randomise_experts_(model)
    return model


class Pair:
    """A packed model and what stock sees of it, both made anew at each call."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        quant_type: str = "nf4",
        **settings: object,
    ) -> None:
        self.folder, self.dtype, self.quant_type = folder, dtype, quant_type
        model = build(kind, **settings)
        self.model_class = type(model)
        model.to(dtype).save_pretrained(folder / "model")

    def packed(self) -> PreTrainedModel:
        """Experts alone are; four-bit ones are double-quantized."""
        config = fourfold.MoeBitsAndBytesConfig(
            experts_quant_type=self.quant_type, bnb_4bit_use_double_quant=self.quant_type != "int8"
        )
        return self.model_class.from_pretrained(self.folder / "model", quantization_config=config)

    def plain(self) -> PreTrainedModel:
        """The same numbers in the model's own class."""
        return fourfold.dequantize(self.packed())

    @functools.cached_property
    def counted(self) -> PreTrainedModel:
        """One to count factors on."""
        return self.packed()

    @functools.cached_property
    def is_read_from_outside(self) -> bool:
        """Whether a module around the experts reads their parameters, to which stock has no answer."""
        return any(getattr(found.layout, "reader", 0) for found in find_experts(self.counted))

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


Reads: TypeAlias = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def stock_reads(model: nn.Module) -> Iterator[None]:
    """Stock's own sums where a module around the experts reads the parameters.

    Stock's wrapper passes no parameter on to such a module; with this it shows ``W + BA`` as PEFT forms it.
    Nothing changes for models whose experts read their own.
    """
    stock = [m for m in model.modules() if type(m) is StockParamWrapper]
    readers = {f.name for f in find_experts(model) if getattr(f.layout, "reader", 0)}
    outside = {id(f.module) for f in find_experts(model) if f.name in readers}
    read = [m for m in stock if id(m.get_base_layer()) in outside]
    plain = nn.Module.__getattr__

    def look(self: StockParamWrapper, name: str) -> Any:
        try:
            return plain(self, name)
        except AttributeError:
            return getattr(self.get_base_layer(), name)

    with contextlib.ExitStack() as stack:
        if read:
            StockParamWrapper.__getattr__ = look
            stack.callback(delattr, StockParamWrapper, "__getattr__")
        for wrapper in read:
            if not wrapper.disable_adapters:
                stack.enter_context(wrapper._activate_lora(wrapper.active_adapters))
        yield


def output(model: nn.Module) -> torch.Tensor:
    """Logits, or hidden states of a model without a head; in evaluation mode."""
    model.eval()
    with torch.no_grad(), stock_reads(model):
        return next(iter(model(input_ids=tiny.IDS).values()))


def logits_difference(pair: Pair, side: str) -> float:
    """Of an adapter that ``side`` saved, on both models."""
    adapter = pair.adapter(side)
    here = output(PeftModel.from_pretrained(pair.packed(), str(adapter)))
    there = output(PeftModel.from_pretrained(pair.plain(), str(adapter)))
    return float((here - there).norm() / there.norm())


def _loss(model: PeftModel) -> torch.Tensor:
    if type(model.get_base_model()).__name__.endswith("ForCausalLM"):
        return model(input_ids=tiny.IDS, labels=tiny.IDS).loss
    y = next(iter(model(input_ids=tiny.IDS).values())).float()
    return (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()


def gradients(
    base: PreTrainedModel,
    adapter: Path,
    use_reentrant: bool | None = None,
    autocast: bool = False,
    reads: Reads = stock_reads,
) -> dict[str, torch.Tensor | None]:
    """Of every factor after one backward pass."""
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    model.train()
    with reads(model):
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            loss = _loss(model)
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative difference of the factor's gradient that is furthest off."""
    return max(float((found[n].float() - w.float()).norm() / w.float().norm()) for n, w in wanted.items())


def together(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative difference of all gradients together."""
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
    ours = complete(gradients(pair.packed(), adapter, EXACT[way]), pair.counted)
    # (torch keeps the sums that such a module reads from its first look, which reentrant checkpointing takes
    # without gradients: those are stock's without checkpointing)
    stock_way = None if pair.is_read_from_outside else EXACT[way]
    stock = complete(gradients(pair.plain(), adapter, stock_way), pair.counted)
    assert ours.keys() == stock.keys()
    return worst(ours, stock)


class Chosen(TorchFunctionMode):
    """Which entries every ``topk`` of a forward picks: that is how routers choose experts."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "topk":
            self.chosen.append(result[1].sort(-1).values.clone())
        return result


def stock_error(pair: Pair, way: str, reads: Reads = nullcontext) -> str | None:
    """What stock PEFT, as it is, answers to one training step; None where it can."""
    autocast = way == "autocast"
    try:
        gradients(pair.plain(), pair.adapter("ours"), EXACT.get(way), autocast=autocast, reads=reads)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def rounded_gradients(pair: Pair, way: str, seed: int) -> float | None:
    """Error of all gradients against stock in fp32; ``pair`` is in fp32 for autocast, else in bf16.

    None where rounding sent a token to other experts: that is no error of a product.
    """
    adapter = pair.adapter("ours", seed)
    found, chosen = [], []
    for base, cast in ((pair.plain().float(), False), (pair.packed(), way == "autocast")):
        with Chosen() as routed:
            found.append(complete(gradients(base, adapter, autocast=cast), pair.counted))
        chosen.append(routed.chosen)
    assert chosen[0], "no topk was seen"
    if any(not torch.equal(a, b) for a, b in zip(*chosen, strict=True)):
        return None
    return together(found[1], found[0])


def rounded(kind: str, folder: Path, way: str, quant_type: str = "nf4") -> float:
    """Of a whole model (`rounding` measures experts), mean of `SEEDS` adapters that route tokens alike."""
    dtype = torch.float32 if way == "autocast" else torch.bfloat16
    pair = Pair(kind, folder, dtype, quant_type, **ROUNDED_SETTINGS.get(kind, {}))
    kept: list[float] = []
    seed = 0
    while len(kept) < SEEDS:
        seed += 1
        assert seed < 10 * SEEDS, f"{kind}: rounding reroutes tokens of nearly every adapter"
        error = rounded_gradients(pair, way, seed)
        if error is not None:
            kept.append(error)
    return sum(kept) / SEEDS
