"""Making a loaded model ready for training, and back to high precision."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.errors import ConfigurationError


def prepare(
    model: PreTrainedModel,
    *,
    gradient_checkpointing: bool = True,
    use_reentrant: bool = False,
    norms_in_fp32: bool = False,
) -> PreTrainedModel:
    """Ready for LoRA training: base frozen, inputs with gradients, checkpointing on.

    Use it instead of PEFT's `prepare_model_for_kbit_training`, which also casts router, embeddings and head
    to fp32 and so costs gigabytes that nothing gains from.

    Args:
        model: before adapters are added.
        gradient_checkpointing: recompute activations in backward instead of keeping them.
        use_reentrant: the kind of checkpointing; torch recommends False.
        norms_in_fp32: cast the parameters of norms (a few kilobytes) to fp32.

    Returns:
        The same model.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    if norms_in_fp32:
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.float()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    # Without it a checkpointed block whose inputs need no gradient would compute none for its factors.
    model.enable_input_require_grads()
    return model


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The same numbers in the dtype that the model was loaded in, in the model's own class.

    The same as ``model.dequantize()``. Packs nothing again: the result is an ordinary model, saved under its
    original keys.

    Raises:
        ConfigurationError: the model is not quantized, or has adapters on it.
    """
    if getattr(model, "hf_quantizer", None) is None:
        raise ConfigurationError(f"{type(model).__name__} is not quantized; there is nothing to dequantize")
    if hasattr(model, "peft_config"):
        raise ConfigurationError(
            "take the adapter off first (`model.unload()`), then dequantize the base model"
        )
    return model.dequantize(dtype=dtype)
