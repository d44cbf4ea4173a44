"""What the benchmarks share: the systems compared, how each loads the model, and running one in a process of
its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def load_model(variant: str, folder: str) -> Any:
    """The model in ``folder`` on the GPU, as a system loads it.

    ``bf16``, ``bnb-4bit`` and ``parametrization...`` are stock transformers (the last quantizes experts after
    loading); ``fourfold-reload`` takes a packed checkpoint as it is, any other ``fourfold...`` packs on the
    way.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    common = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    if variant.startswith("fourfold"):
        import fourfold  # noqa: F401  (registers the quantizer)

        if variant != "fourfold-reload":
            common["quantization_config"] = fourfold_config(variant)
        return AutoModelForCausalLM.from_pretrained(folder, **common)
    if variant == "bf16":
        return AutoModelForCausalLM.from_pretrained(folder, **common)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **common)
    if variant.startswith("parametrization"):
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=True, quant_type="nf4")
    return model


def fourfold_config(variant: str) -> Any:
    """NF4 with double quantization, ``fourfold-nf4`` without, ``fourfold-int8`` in 8 bit."""
    import fourfold

    if variant == "fourfold-int8":
        return fourfold.MoeBitsAndBytesConfig(load_in_8bit=True)
    return fourfold.MoeBitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=variant != "fourfold-nf4",
    )


def import_everything() -> None:
    """Imports and the CUDA context, so that loading is timed without them."""
    versions()
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.zeros(1, device="cuda")


def versions() -> dict[str, str]:
    import bitsandbytes
    import peft
    import transformers
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }


def warm_cache(folder: str | Path) -> None:
    """Read a checkpoint once, so that every variant reads it from memory."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)


def run_in_process(script: str, variant: str, out: Path, arguments: Iterable[str]) -> dict[str, Any] | None:
    """Run ``script --one variant`` and return what it wrote; None where it failed."""
    part = out.with_suffix(f".{variant}.tmp")
    part.unlink(missing_ok=True)
    command = [sys.executable, script, "--one", variant, "--out", str(part), *arguments]
    if subprocess.run(command, check=False).returncode or not part.is_file():
        print(f"{variant} failed", flush=True)
        return None
    result: dict[str, Any] = json.loads(part.read_text())
    part.unlink()
    return result
