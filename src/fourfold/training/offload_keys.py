"""Keys of experts in host memory, and what contradicts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fourfold.errors import ConfigurationError
from fourfold.offloading.sizes import parse_bytes
from fourfold.training.key_types import Strict, not_bool
from fourfold.training.yaml_file import Problem

if TYPE_CHECKING:
    from fourfold.training.schema import TrainConfig


def _bytes(value: Any) -> int:
    try:
        return parse_bytes(value)
    except ConfigurationError:
        raise ValueError("no number of bytes; write one such as 12884901888, 12GiB or 12 GB") from None


class OffloadKeys(Strict):
    """Where packed experts lie."""

    experts_offload: Literal["cpu", "disk", "auto"] | None = Field(
        None,
        description="`cpu`: packed experts in host memory, each layer's brought to the GPU while it computes "
        "(the same numbers); `disk`: they stay in the files of a packed checkpoint, from where they are read "
        "ahead of their use; `auto`: as many layers stay on the GPU as fit, the others in host memory, or on "
        "disk where that does not hold them",
    )
    gpu_budget: Annotated[int | str, BeforeValidator(not_bool), AfterValidator(_bytes)] | None = Field(
        None,
        description="bytes such as `12GiB` that experts may take on the GPU with experts_offload: auto; "
        "absent means what is free less what the run is planned to need",
    )
    experts_pin_memory: bool = Field(
        False,
        description="refuse to run where host memory for experts cannot be pinned; `false` takes pageable "
        "memory then (the same numbers, slower), and the report says why",
    )


def offload_contradictions(config: TrainConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Settings without effect, and what does not go together."""
    if config.gpu_budget is not None and config.experts_offload != "auto":
        remedy = "Set experts_offload: auto, or drop gpu_budget."
        yield (
            ("gpu_budget", "experts_offload"),
            Problem("gpu_budget", "has no effect without experts_offload: auto", remedy),
        )
    if config.experts_offload is None:
        if config.experts_pin_memory:
            remedy = "Set experts_offload: cpu (or auto), or drop this key."
            said = Problem("experts_pin_memory", "has no effect without experts_offload", remedy)
            yield ("experts_pin_memory", "experts_offload"), said
        return
    key, keys = "experts_offload", ("experts_offload", "load_in_4bit", "load_in_8bit", "quantize_moe_experts")
    in_high_precision = config.bnb_config_kwargs.get("experts_quant_type") == "none"
    if not config.quantized or config.quantize_moe_experts is False or in_high_precision:
        remedy = "Set load_in_4bit: true (and quantize_moe_experts: true), or drop this key."
        yield keys, Problem(key, "is for packed experts, and these stay in high precision", remedy)
