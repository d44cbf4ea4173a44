"""Adapters to be merged, what is done to them, and what must then be refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import fourfold
import tiny
from fourfold.errors import FourfoldError

NF4 = {"experts_quant_type": "nf4"}
WEIGHTS = "adapter_model.safetensors"


def make_adapter(base: Path, out: Path, scale: float | None = None, **changes) -> Path:
    model = tiny.load(base, **NF4)
    arguments = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    arguments["target_parameters"] = fourfold.expert_targets(model)
    torch.manual_seed(2)
    wrapped = get_peft_model(model, LoraConfig(**(arguments | changes)))
    if scale is not None:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(scale)
    wrapped.save_pretrained(out)
    return out


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_refused(kind: type[FourfoldError], said: str, base: Path, adapter: Path, *args, **kwargs) -> None:
    before = sorted(p.name for p in base.parent.iterdir())
    with pytest.raises(kind, match=said):
        fourfold.merge(base, adapter, base.parent / "out", *args, **kwargs)
    assert sorted(p.name for p in base.parent.iterdir()) == before
