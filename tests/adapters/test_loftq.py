"""`fourfold.loftq_init`: factors that begin with what packing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

import fourfold
import tiny
from fourfold.adapters.low_rank_fit import EXACT, fit, fit_stacked
from fourfold.errors import AdapterError, CheckpointError
from fourfold.experts import find_experts
from parity import lora
from tiny import logits

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"experts_quant_type": "nf4"},
    "nf4-double": {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"experts_quant_type": "fp4"},
    "int8": {"experts_quant_type": "int8"},
}
KINDS: dict[str, Callable[..., PretrainedConfig]] = tiny.KINDS | {
    "llama4": tiny.llama4,
    "jetmoe": tiny.jetmoe,
    "dbrx": tiny.dbrx,
}


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every fused parameter as the model stores it, decoded if it is packed."""
    plain = model if getattr(model, "hf_quantizer", None) is None else fourfold.dequantize(model)
    return {
        f"{found.name}.{p.name}": getattr(found.module, p.name).detach()
        for found in find_experts(plain)
        for p in found.layout.projections
    }


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself reckons the adapter to add to every fused parameter."""
    return {
        f"{m.get_base_layer().fourfold_name}.{m.parameter_name}": m.get_delta_weight("default").detach()
        for m in model.modules()
        if type(m).__name__ == "ParamWrapper"
    }


def as_matrices(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save(tiny.qwen3_moe(), path)
    return path


def begun(folder: Path, settings: dict[str, Any] | None = None, **changes: Any) -> PeftModel:
    model = tiny.load(folder, **(settings or FORMATS["nf4"]))
    return get_peft_model(
        model, lora(model, **({"init_lora_weights": True, "target_modules": None} | changes))
    )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_takes_from_the_error_what_a_truncated_svd_takes(kind: str, fmt: str, tmp_path: Path) -> None:
    """Each matrix, of every layout of files and of factors."""
    original = weights(tiny.save(KINDS[kind](), tmp_path))
    decoded = weights(tiny.load(tmp_path, **FORMATS[fmt]))
    model = begun(tmp_path, FORMATS[fmt], r=3, lora_alpha=7)
    report = fourfold.loftq_init(model)
    found = deltas(model)
    assert found.keys() == original.keys()
    for name, delta in found.items():
        lost, rest = original[name] - decoded[name], original[name] - decoded[name] - delta
        expected = torch.linalg.svdvals(as_matrices(lost).double())[:, 3:].square().sum(-1).sqrt()
        norms = as_matrices(rest).double().flatten(1).norm(dim=1)
        assert torch.allclose(norms, expected, rtol=1e-4), name
        assert (norms < as_matrices(lost).flatten(1).norm(dim=1)).all()
    for role in report.roles.values():
        assert 0 < role.after < role.before < 0.5
    assert sum(role.parameters for role in report.roles.values()) == len(found)
