"""Merging adapters that other releases wrote: the same sum, whichever way their files pack experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapters
import fourfold
import tiny
from adapters import exchange, group
from fourfold.cli import main
from fourfold.errors import AdapterError

KINDS = {**tiny.KINDS, "llama4": tiny.llama4}


def make(tmp_path: Path, kind: str = "qwen3_moe", sizes: dict | None = None, **lora) -> Path:
    """A base with weights, an adapter of stock PEFT on it, and in ``known`` what merging gives."""
    settings = {"target_modules": ["q_proj"]} if kind != "llama4" else {"target_modules": []}
    config = KINDS[kind](**(sizes or {}))
    adapters.make(config, tmp_path, **(settings | lora))
    tiny.save(config, tmp_path / "base")
    fourfold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "known")
    return tmp_path / "adapter"


def same_sum(tmp_path: Path, **arguments) -> bool:
    fourfold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", force=True, **arguments)
    wanted, found = (load_file(tmp_path / f / "model.safetensors") for f in ("known", "out"))
    assert wanted.keys() == found.keys()
    return all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "nemotron_h"])
def test_peft_up_to_0_19_0(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path, kind)
    exchange(folder)
    assert same_sum(tmp_path)
    assert same_sum(tmp_path, source_layout="peft-0.18")
    with pytest.raises(AdapterError, match="shapes contradict"):
        same_sum(tmp_path, source_layout="peft")


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_transposed_experts(tmp_path: Path, kind: str) -> None:
    """gpt-oss says so, and 0.19.0 alone exchanged it; llama4 does not, and today's PEFT exchanges it."""
    folder = make(tmp_path, kind)
    adapters.rewrite(folder, peft_version="0.18.1")
    assert same_sum(tmp_path)
    exchange(folder)
    adapters.rewrite(folder, peft_version="0.19.0")
    assert same_sum(tmp_path)


SQUARE = {"moe_intermediate_size": 32}  # gate_up is 64 by 64


def test_square_experts_go_by_the_version_or_are_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, sizes=SQUARE, target_parameters=["mlp.experts.gate_up_proj"])
    exchange(folder)
    assert same_sum(tmp_path)  # 0.18.1
    adapters.rewrite(folder, peft_version="0.20.0")
    assert not same_sum(tmp_path)
    adapters.rewrite(folder, peft_version=None)  # PEFT 0.17 wrote none
    with pytest.raises(AdapterError, match=r"peft_version does not tell.*--source-layout"):
        same_sum(tmp_path)
    assert same_sum(tmp_path, source_layout="peft-0.18")
    assert not same_sum(tmp_path, source_layout="peft")
    arguments = ["merge", str(tmp_path / "base"), str(folder), str(tmp_path / "last")]
    assert main(arguments) == 2
    assert "--source-layout" in capsys.readouterr().err
    assert main([*arguments, "--source-layout", "peft-0.18"]) == 0


def test_shapes_tell_where_they_can(tmp_path: Path) -> None:
    folder = make(tmp_path, sizes=SQUARE)  # down is not square
    exchange(folder)
    adapters.rewrite(folder, peft_version=None)
    assert same_sum(tmp_path)


@pytest.mark.parametrize("how", [exchange, group])
def test_a_dequantized_base_takes_them_too(tmp_path: Path, how: Callable[[Path], None]) -> None:
    from fourfold.adapters import provenance

    folder = make(tmp_path)
    provenance.write(tiny.load(tmp_path / "base", experts_quant_type="nf4"), folder)
    for out in ("known", "out"):
        fourfold.merge(tmp_path / "base", folder, tmp_path / out, "dequantized", force=True)
        how(folder)
        if how is group:
            adapters.rewrite(folder, lora_B_layout="grouped_by_expert")
    wanted, found = (load_file(tmp_path / f / "model.safetensors") for f in ("known", "out"))
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_unsloths_order_is_never_guessed(tmp_path: Path) -> None:
    """Its older adapters have the expert as the slowest axis of B; the shapes are the same."""
    folder = make(tmp_path)
    group(folder)
    with pytest.raises(AdapterError, match="lora_B_layout is missing"):
        same_sum(tmp_path)
    assert same_sum(tmp_path, source_layout="unsloth")
    assert not same_sum(tmp_path, source_layout="peft")
    adapters.rewrite(folder, lora_B_layout="grouped_by_expert")
    assert same_sum(tmp_path)
    adapters.rewrite(folder, lora_B_layout="rank_major")
    assert not same_sum(tmp_path)
