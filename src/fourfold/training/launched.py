"""What `accelerate launch` hands a run from its own configuration file, by the environment.

It starts processes, and the run's file says how they train. What the other says of training too must agree:
the trainer takes it without a word (a number format, a compiler).
"""

from __future__ import annotations

from collections.abc import Mapping

from fourfold.errors import ConfigurationError
from fourfold.training.fsdp_keys import sharding
from fourfold.training.schema import TrainConfig

FORMAT, COMPILER = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"
OFF = ("", "no")


def check_launched(config: TrainConfig, bf16: bool, environment: Mapping[str, str]) -> None:
    """Compare the two files.

    Args:
        config: of the run.
        bf16: whether it computes in bf16.
        environment: of this process.

    Raises:
        ConfigurationError: names what differs, and where to say it.
    """
    ours = "bf16" if bf16 else "fp16" if config.fp16 else "no"
    theirs = environment.get(FORMAT, "").lower()
    if theirs not in (*OFF, ours):
        raise ConfigurationError(
            f"`accelerate launch` was told mixed_precision: {theirs}, and this run computes in "
            f"{'fp32' if ours == 'no' else ours}. Set it to 'no' there; bf16 and fp16 say it here."
        )
    compiler = environment.get(COMPILER, "").lower()
    # (`auto` does not compile a model in shards)
    compiled = config.torch_compile is True or (config.torch_compile == "auto" and sharding(config) is None)
    if compiler not in OFF and not compiled:
        raise ConfigurationError(
            f"`accelerate launch` was told dynamo_backend: {compiler}, and this run is not compiled. Set "
            "it to 'no' there; torch_compile and torch_compile_backend say it here."
        )
