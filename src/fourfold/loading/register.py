"""Making ``quant_method: "fourfold"`` known to transformers, through its registries."""

from __future__ import annotations


def register() -> None:
    """Register configuration and quantizer; once, whoever calls first."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from fourfold.loading import patch
    from fourfold.loading.config import QUANT_METHOD, MoeBitsAndBytesConfig
    from fourfold.loading.quantizer import FourfoldQuantizer

    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MoeBitsAndBytesConfig)
        register_quantizer(QUANT_METHOD)(FourfoldQuantizer)
    patch.install()
