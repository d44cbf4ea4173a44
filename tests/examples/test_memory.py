"""examples/memory.py: the memory in the examples' heads and in their README is what is counted today."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import torch

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


# Planned in seconds each; linear attention takes a minute and more.
QUICK = ["gemma-4-26b-a4b", "gpt-oss-20b", "granite-3.1-3b-a800m", "olmoe-1b-7b"]


def head(name: str) -> str:
    """The line of an example's head."""
    [line] = memory.LINE.findall((published.EXAMPLES / f"{name}.yaml").read_text())
    return str(line)


@pytest.mark.parametrize("name", QUICK)
def test_the_head_says_what_is_planned(name: str) -> None:
    assert head(name) == f"# memory: {memory.plan(name)}", "python examples/memory.py --write"


@pytest.mark.parametrize("name", memory.names())
def test_the_head_says_what_lies_there_all_the_time(name: str) -> None:
    """What is known without running a step: cheap, so of every example."""
    planner, settings = memory.planner(name)
    weights, shapes = planner._weights(settings)
    adapters = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    found = re.search(r"model ([\d.]+) \(bf16: ([\d.]+)\) \+ LoRA and optimizer ([\d.]+)", head(name))
    assert found is not None
    assert found[1] == memory.gib(weights.bytes)
    assert found[2] == memory.gib(weights.bytes_before)
    # (with the gradients, which `floor` counts and the head does not)
    assert float(found[3]) == pytest.approx(
        (planner.floor(settings) - weights.bytes - adapters) / 2**30, abs=0.1
    )


@pytest.mark.slow
def test_the_pages_and_every_head_say_what_is_planned() -> None:
    found = {name: memory.plan(name) for name in memory.names()}
    for name, planned in found.items():
        assert head(name) == f"# memory: {planned}", "python examples/memory.py --write"
    for page, links in memory.PAGES.items():
        text = page.read_text()
        assert memory.with_table(text, found, links) == text, "python examples/memory.py --write"


def test_the_pages_agree_with_the_heads() -> None:
    for page in memory.PAGES:
        rows = [line for line in page.read_text().splitlines() if "GB |" in line]
        assert len(rows) == len(memory.names())
        for name in memory.names():
            [row] = [row for row in rows if f"{name}.yaml" in row]
            peak = re.search(r"memory: ([\d.]+) GiB planned", head(name))
            assert peak is not None
            assert f"**{peak[1]}**" in row, "python examples/memory.py --write"


@pytest.mark.parametrize(("peak", "card"), [(10 * 2**30, 12), (60 * 2**30, 80), (23.9 * 2**30, 32)])
def test_the_card_has_room(peak: float, card: int) -> None:
    assert memory.Memory(0, 0, 0, 0, int(peak)).card == card


def test_mambas_output_projection_stays_as_its_kernel_reads_it() -> None:
    """The fused kernel is given the weight itself, which packed would be bytes."""
    settings = load_config(published.EXAMPLES / "nemotron-3-nano-30b-a3b.yaml")
    from fourfold.loading.skeleton import build_skeleton

    config = published.tiny_config("nemotron-3-nano-30b-a3b")
    model = build_skeleton(config, make_quantization_config(settings))
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.named_modules() if "_proj" in n}
    assert kinds["out_proj"] is torch.nn.Linear
    assert kinds["in_proj"].__name__ == "Linear4bit"
