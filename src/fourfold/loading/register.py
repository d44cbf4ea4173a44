"""Making ``quant_method: "fourfold"`` known to transformers, through its registries."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Register configuration and quantizer; once, whoever calls first.

    Called in the middle of importing transformers, perhaps while a module of this package is being imported
    that asked for it: so as little as possible is imported here. The quantizer, which needs half of this
    package, follows when it is first asked for.
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer

    from fourfold.loading import patch
    from fourfold.loading.config import QUANT_METHOD, MoeBitsAndBytesConfig

    class OnUse(HfQuantizer):
        """In the registry for `FourfoldQuantizer`; calling it makes one."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from fourfold.loading.quantizer import FourfoldQuantizer

            return FourfoldQuantizer(*args, **kwargs)

    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MoeBitsAndBytesConfig)
        register_quantizer(QUANT_METHOD)(OnUse)
    patch.install()
