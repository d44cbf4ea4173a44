"""Making a loaded model ready for training, and back to high precision."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.errors import ConfigurationError
from fourfold.experts.plain import take_low_rank_


def prepare(
    model: PreTrainedModel,
    *,
    gradient_checkpointing: bool = True,
    use_reentrant: bool = False,
    norms_in_fp32: bool = False,
) -> PreTrainedModel:
    """Ready for LoRA training: base frozen, inputs with gradients, checkpointing on.

    Unquantized experts of decorated kinds take LoRA on their parameters in low-rank form from here on.

    Use it instead of PEFT's `prepare_model_for_kbit_training`, which also casts router, embeddings and head
    to fp32 and so costs gigabytes that nothing gains from.

    Args:
        model: before adapters are added.
        gradient_checkpointing: recompute activations in backward instead of keeping them.
        use_reentrant: the kind of checkpointing; torch recommends False.
        norms_in_fp32: hold and compute norms in fp32 (a few kilobytes); their outputs keep the dtype of their
            inputs.

    Returns:
        The same model.

    Raises:
        ConfigurationError: the model has adapters already; freezing it now would freeze them, and a run would
            train nothing.
    """
    if getattr(model, "peft_config", None):
        raise ConfigurationError("call fourfold.prepare before adapters are added: it freezes all there is")
    for parameter in model.parameters():
        parameter.requires_grad = False
    take_low_rank_(model)
    if norms_in_fp32:
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.float()
                module.register_forward_hook(_as_input)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    # Without it a checkpointed block whose inputs need no gradient would compute none for its factors.
    model.enable_input_require_grads()
    return model


def _as_input(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """A norm's output in the dtype of its input: what follows multiplies it with weights of that dtype."""
    return output.to(inputs[0].dtype)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The same numbers in the model's own class: an ordinary model, saved under its original keys.

    The same as ``model.dequantize()``.

    Args:
        model: loaded with a quantization configuration; no adapters on it.
        dtype: of the result, all of it; None is the dtype that the model was loaded in.

    Raises:
        ConfigurationError: the model is not quantized, or has adapters on it.
    """
    if getattr(model, "hf_quantizer", None) is None:
        raise ConfigurationError(f"{type(model).__name__} is not quantized; there is nothing to dequantize")
    return model.dequantize(dtype=dtype)
