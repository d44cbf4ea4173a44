"""Whether packed examples stay apart in a model: measured, not looked up.

Three examples are laid end to end, as in training, and the gradient of each later one's logits with respect
to the embeddings of those before it is taken. Where attention, a convolution or a recurrent state reaches
over a boundary it is not zero; where nothing does it is exactly zero, in every dtype (a masked score has a
weight of zero, and rows of an experts layer do not meet). What no gradient shows, a choice of tokens to
attend to, each example's logits alone show (in fp32). There is no table of models: gpt-oss under eager
attention, for one, builds its mask without the positions, and lightning attention carries its state on.

The middle example is longer than the blocks in which kernels go through a row (64 to 256 tokens), so that
one boundary lies within the first of them and one within a later one, and longer than many sliding windows;
those of the narrow model are cut down to be shorter.

Asked twice: of a narrow random model of the same configuration before anything is loaded, and of the loaded
model itself before its first step.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PretrainedConfig

from fourfold.errors import ConfigurationError
from fourfold.loading.skeleton import language_class, model_class, read_config
from fourfold.planning.conformance.tiny_models import build, shrink
from fourfold.training.packing import packing_collator

LENGTHS = (21, 283, 40)
# Where the fixed text is begun anew if logits differ: rounding may turn a router's choice between two experts
# that are level, in one text and hardly in another as well.
OTHER_TEXT = 1000
# What the narrow model's windows are cut to, and how many positions it has at most.
WINDOW, POSITIONS = 64, 1024
# Keys that say which layers there are: kept, so that every kind of layer is there. Widths alone are cut.
_DEPTH = r"layer|block|period|interval|offset|pattern|freq|every|first_k_dense"
_WINDOW = r"sliding_window$|window_size$|attention_chunk_size$"
_POSITIONS = r"max_position_embeddings$|n_positions$"
_WIDTH = r"vocab|hidden|intermediate|dim$|heads|nextn"
_TOLERANCE = 1e-3  # of the largest logit, in fp32; a sound model is within 1e-6
_REMEDY = "Set sample_packing: false"


def check_isolation(name: str, attention: str | None, trust_remote_code: bool = False) -> None:
    """Refuse packing where a narrow model of the configuration of ``name`` lets examples see each other.

    Where no such model can be built or run, nothing is said: the loaded model is asked before its first step.

    Args:
        name: the base model's folder or id.
        attention: the attention asked for; None for the model's own choice.
        trust_remote_code: whether its configuration may be code of its own.

    Raises:
        ConfigurationError: says what leaks and what to set.
    """
    model = narrow_model(read_config(name, trust_remote_code), attention)
    if model is not None:
        refuse_leaks(model)


def refuse_leaks(model: Any) -> None:
    """Refuse packing where examples see each other in ``model``; its gradients are cleared.

    Raises:
        ConfigurationError: says what leaks and what to set.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.config._attn_implementation
    what = f"sample_packing: true, and {base.config.model_type} with {attention} attention"
    remedy = f"{_REMEDY}; another attn_implementation may keep them apart."
    try:
        leak, difference = _measure(model)
        if not leak and difference > _TOLERANCE:
            leak, difference = _measure(model, OTHER_TEXT)
    except ValueError as error:  # transformers refuses where a kernel that it would need is missing
        raise ConfigurationError(f"{what} cannot run packed examples: {error} Or: {_REMEDY}.") from error
    if leak:
        raise ConfigurationError(
            f"{what} lets an example see those before it in its row (gradient {leak:.2g} where 0 belongs). "
            + remedy
        )
    if difference > _TOLERANCE:
        raise ConfigurationError(
            f"{what} computes other logits for a packed example than for the same one alone (by "
            f"{difference:.2g} of the largest). {remedy}"
        )


def narrow_model(config: PretrainedConfig, attention: str | None) -> Any:
    """A random model with every layer of ``config`` and small widths; None where it cannot be made or run."""
    settings = config.to_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = torch.random.get_rng_state()
    try:
        narrow = type(config).from_dict(_with_depth(settings, shrink(settings)))
        if hasattr(narrow, "quantization_config"):
            del narrow.quantization_config
        found = language_class(config) or model_class(config)
        if hasattr(found, "_model_mapping"):
            found = found._model_mapping[type(config)]
            if found.config_class is type(narrow.get_text_config()):  # the text alone of a model with images
                narrow = narrow.get_text_config()
        model = build(narrow, found, device)
        if attention is not None:
            model.set_attn_implementation(attention)
        if str(model.config._attn_implementation).startswith("flash"):
            model.to(torch.bfloat16)
        _run(model.train(), LENGTHS[-1:])
    except Exception:  # of whatever kind: the model's own code, on sizes that it was not written for
        return None
    finally:
        torch.random.set_rng_state(state)
    return model


def _with_depth(settings: dict[str, Any], narrow: dict[str, Any]) -> dict[str, Any]:
    """``narrow`` with the number and the kinds of layers of ``settings``, and with windows that are short."""
    result = dict(narrow)
    for key in narrow.keys() & settings.keys():
        value = settings[key]
        if isinstance(value, dict):
            # (towers for images and sound are given nothing to do)
            if str(key).endswith("_config") and not re.search("vision|audio", key):
                result[key] = _with_depth(value, narrow[key])
        elif re.search(_WINDOW, str(key)):
            result[key] = min(value, WINDOW) if isinstance(value, int) else value
        elif re.search(_POSITIONS, str(key)) and isinstance(value, int):
            result[key] = min(value, POSITIONS)
        elif re.search(_DEPTH, str(key)) and (key == "num_hidden_layers" or not re.search(_WIDTH, str(key))):
            result[key] = value
    return result


def _lengths(model: Any) -> tuple[int, ...]:
    """Of the examples; none is longer than the positions that the model knows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return tuple(min(length, most) if isinstance(most, int) and most > 0 else length for length in LENGTHS)


def _tokens(start: int, stop: int, rows: int) -> list[int]:
    """Those places of a fixed text, for embeddings of so many rows; it does not repeat every few tokens."""
    return [1 + (7 * at + at * at // 5) % min(rows - 1, 61) for at in range(start, stop)]


def _run(model: Any, lengths: tuple[int, ...], start: int = 0, hook: Any = None) -> torch.Tensor:
    """Logits ``[T, V]`` of the fixed text from ``start`` on: examples of those ``lengths`` laid end to end,
    or one alone, as it is without packing."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    ids = _tokens(start, start + sum(lengths), embeddings.weight.shape[0])
    batch: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if len(lengths) > 1:
        row = {"input_ids": ids, "labels": [-100] * len(ids), "seq_lengths": list(lengths)}
        batch = {key: value for key, value in packing_collator(_Pad)([row]).items() if key != "labels"}
    batch = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    low = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    handle = embeddings.register_forward_hook(hook) if hook is not None else None
    try:
        with torch.autocast(device.type, low, enabled=low is not None):
            logits: torch.Tensor = model(**batch, use_cache=False).logits[0]
    finally:
        if handle is not None:
            handle.remove()
    return logits


class _Pad:
    pad_token_id = 0


def _measure(model: Any, origin: int = 0) -> tuple[float, float]:
    """How far packed examples are from standing alone, with the fixed text from ``origin`` on.

    Returns:
        The largest gradient that crosses a boundary; and how far an example's logits are from those it has
        alone, as a share of the largest (0 where the model is not fp32).

    Raises:
        ValueError: the model refuses packed examples, or its embeddings get no gradient.
    """
    lengths = _lengths(model)
    spans = [(sum(lengths[:at]), sum(lengths[: at + 1])) for at in range(len(lengths))]
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_()
        seen.append(leaf)
        return leaf

    leak = 0.0
    for start, stop in spans[1:]:
        # (a forward each, and backward rather than autograd.grad: reentrant checkpointing knows no other)
        logits_TV = _run(model, lengths, origin, keep)
        logits_TV[start:stop].float().square().sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        gradient = seen[-1].grad
        if gradient is None or not bool(gradient[0, start:stop].any()):
            raise ValueError(
                "its embeddings get no gradient, so it cannot be told whether examples stay apart."
            )
        leak = max(leak, float(gradient[0, :start].abs().max()))
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        return leak, 0.0
    difference = 0.0
    with torch.no_grad():
        for start, stop in spans:
            alone_TV = _run(model, (stop - start,), origin + start)
            far = (logits_TV[start:stop].detach() - alone_TV).abs().max()
            difference = max(difference, float(far / alone_TV.abs().max().clamp(min=1e-12)))
    return leak, difference
