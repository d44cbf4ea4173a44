"""examples/memory.py: the memory in the examples' heads and in their README is what is counted today."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fourfold
import published
from fourfold.training.preflight import make_quantization_config
from fourfold.training.read_config import load_config


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_memory", published.EXAMPLES / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # (its dataclass looks itself up)
    spec.loader.exec_module(module)
    return module


memory = _load_script()


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return {name: memory.count(name) for name in memory.names()}


def test_the_heads_say_what_is_counted(counted: dict[str, Any]) -> None:
    for name, found in counted.items():
        text = (published.EXAMPLES / f"{name}.yaml").read_text()
        assert memory.LINE.findall(text) == [f"# memory: {found}"], "python examples/memory.py --write"


def test_the_pages_have_the_same(counted: dict[str, Any]) -> None:
    for page, links in memory.PAGES.items():
        text = page.read_text()
        assert memory.with_table(text, counted, links) == text, "python examples/memory.py --write"
        assert all(f"{name}.yaml" in text for name in published.names())


def test_what_is_counted_is_what_a_loaded_model_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of a tiny model without weights, against the same loaded, with adapters."""
    name = "qwen3-next-80b-a3b"
    folder = published.write_checkpoint(name, tmp_path)
    monkeypatch.setattr(memory, "read_config", lambda _: published.tiny_config(name))
    found = memory.count(name)

    from transformers import AutoModelForCausalLM

    from fourfold.adapters.peft_lora import add_lora

    settings = load_config(published.EXAMPLES / f"{name}.yaml")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=make_quantization_config(settings)
    )
    report = fourfold.verify(model)
    assert (found.model, found.before) == (report.bytes, report.bytes_before)
    adapted = add_lora(
        fourfold.prepare(model),
        r=settings.lora_r,
        alpha=settings.lora_alpha,
        target_modules=settings.target_modules,
        target_parameters=settings.lora_target_parameters,
        rank_pattern=settings.lora_rank_pattern or {},
    )
    assert found.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found.training == 10 * found.trainable
    assert found.total == found.model + found.training


@pytest.mark.parametrize(("total", "card"), [(10 * 2**30, 12), (11 * 2**30, 16), (60 * 2**30, 80)])
def test_some_of_the_card_is_left(total: int, card: int) -> None:
    assert memory.Memory(total, total, 0).card == card


def test_mambas_output_projection_stays_as_its_kernel_reads_it() -> None:
    """The fused kernel is given the weight itself, which packed would be bytes."""
    settings = load_config(published.EXAMPLES / "nemotron-3-nano-30b-a3b.yaml")
    from fourfold.loading.skeleton import build_skeleton

    config = published.tiny_config("nemotron-3-nano-30b-a3b")
    model = build_skeleton(config, make_quantization_config(settings))
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.named_modules() if "_proj" in n}
    assert kinds["out_proj"] is torch.nn.Linear
    assert kinds["in_proj"].__name__ == "Linear4bit"
