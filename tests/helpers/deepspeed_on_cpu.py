"""``fourfold`` with DeepSpeed on a machine without GPUs: ``torchrun tests/helpers/deepspeed_on_cpu.py ARGS``.

accelerate starts DeepSpeed where it finds an accelerator, and takes a process without one to be alone.
DeepSpeed itself runs on CPUs (``DS_ACCELERATOR=cpu``), over gloo. So what accelerate says of the machine is
put right here, and nothing else.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from fourfold.cli import main
from fourfold.training import preflight


def prepare() -> None:
    stock = PartialState._prepare_backend

    def backend(self: Any, cpu: bool = False, *arguments: Any, **keywords: Any) -> Any:
        if not cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return "gloo", DistributedType.MULTI_CPU
        return stock(self, cpu, *arguments, **keywords)

    PartialState._prepare_backend = backend
    check = preflight.check_start
    preflight.check_start = lambda config, **how: check(config, **{**how, "has_gpu": True})


if __name__ == "__main__":
    prepare()
    sys.exit(main(sys.argv[1:]))
