"""Ways in which adapters pack experts: told by marks and shapes, or asked; never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapters
import fourfold
import tiny
from adapters import exchange, group
from fourfold.errors import AdapterError


def same_files(tmp_path: Path, **arguments: Any) -> bool:
    """Whether the changed adapter gives the per-expert file of the untouched one."""
    fourfold.export(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", force=True, **arguments)
    return (tmp_path / "out" / adapters.WEIGHTS).read_bytes() == (
        tmp_path / "known" / adapters.WEIGHTS
    ).read_bytes()


def make(tmp_path: Path, kind: str = "qwen3_moe", **lora: Any) -> Path:
    sizes = lora.pop("sizes", {})
    adapters.make({**tiny.KINDS, "llama4": tiny.llama4}[kind](**sizes), tmp_path, **lora)
    fourfold.export(tmp_path / "adapter", tmp_path / "known")
    return tmp_path / "adapter"


def test_old_peft(tmp_path: Path) -> None:
    folder = make(tmp_path)
    original = (folder / adapters.WEIGHTS).read_bytes()
    exchange(folder)
    assert (folder / adapters.WEIGHTS).read_bytes() != original
    assert same_files(tmp_path)
    assert same_files(tmp_path, source_layout="peft-0.18")
    with pytest.raises(AdapterError, match="shapes contradict"):
        same_files(tmp_path, source_layout="peft")
    # to fused: what PEFT of today writes, marked as such
    fourfold.export(folder, tmp_path / "fused", layout="fused")
    assert (tmp_path / "fused" / adapters.WEIGHTS).read_bytes() == original
    assert adapters.read(tmp_path / "fused")[1]["peft_version"] != "0.18.1"


SQUARE = {"hidden_size": 64, "moe_intermediate_size": 32}  # gate_up is 64 by 64


def test_square_factors_go_by_the_version(tmp_path: Path) -> None:
    """Of gate_up alone, as many out as in: shapes tell nothing."""
    folder = make(tmp_path, sizes=SQUARE, target_parameters=["mlp.experts.gate_up_proj"])
    assert same_files(tmp_path)
    exchange(folder)
    assert same_files(tmp_path)
    adapters.rewrite(folder, peft_version="0.20.0")
    assert not same_files(tmp_path)
    adapters.rewrite(folder, peft_version="0.19.1.dev0@abc")  # before or after the change, who knows
    with pytest.raises(AdapterError, match="--source-layout"):
        same_files(tmp_path)
    adapters.rewrite(folder, peft_version=...)  # PEFT 0.17 wrote none
    with pytest.raises(AdapterError, match="--source-layout"):
        same_files(tmp_path)
    assert same_files(tmp_path, source_layout="peft-0.18")
    assert not same_files(tmp_path, source_layout="peft")


def test_versions_around_the_change(tmp_path: Path) -> None:
    folder = make(tmp_path, sizes=SQUARE, target_parameters=["mlp.experts.gate_up_proj"])
    exchange(folder)
    right = {v for v in ("0.17.1", "0.19.0", "0.19.1", "0.21.2") if version_reads_right(folder, tmp_path, v)}
    assert right == {"0.17.1", "0.19.0"}


def version_reads_right(folder: Path, tmp_path: Path, version: str) -> bool:
    adapters.rewrite(folder, peft_version=version)
    return same_files(tmp_path)


def test_transposed_experts(tmp_path: Path) -> None:
    """PEFT before 0.19.0 had them right, 0.19.0 alone exchanged them; shapes tell nothing here."""
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    folder = make(tmp_path, "gpt_oss", sizes=sizes, target_parameters=["mlp.experts.gate_up_proj"])
    right = {v: version_reads_right(folder, tmp_path, v) for v in ("0.18.1", "0.19.0", "0.19.1")}
    assert right == {"0.18.1": True, "0.19.0": False, "0.19.1": True}
    exchange(folder)
    assert version_reads_right(folder, tmp_path, "0.19.0")
    assert same_files(tmp_path, source_layout="peft-0.18")


def test_undecorated_transposed_experts(tmp_path: Path) -> None:
    """Today's PEFT takes in for out where a module stores in-by-out without saying so."""
    config = tiny.llama4()
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapters.make(config, tmp_path, target_parameters=targets)
    with pytest.raises(AdapterError, match="--gate-up"):
        fourfold.export(tmp_path / "adapter", tmp_path / "out")
    fourfold.export(tmp_path / "adapter", tmp_path / "out", gate_up="concatenated")
    ours, theirs = adapters.per_expert_deltas(tmp_path / "out"), adapters.deltas(model)
    name = "model.layers.1.feed_forward.experts"
    parts = torch.cat([ours[f"{name}.3.{part}"] for part in ("gate_proj", "up_proj")])
    assert (parts - theirs[f"{name}.gate_up_proj"][3]).abs().max() <= 1e-6
    assert (ours[f"{name}.0.down_proj"] - theirs[f"{name}.down_proj"][0]).abs().max() <= 1e-6
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused", gate_up="concatenated")
    assert (tmp_path / "back" / adapters.WEIGHTS).read_bytes() == (
        tmp_path / "adapter" / adapters.WEIGHTS
    ).read_bytes()


def test_unsloth(tmp_path: Path) -> None:
    folder = make(tmp_path)
    group(folder)
    with pytest.raises(AdapterError, match="--source-layout"):
        same_files(tmp_path)
    assert same_files(tmp_path, source_layout="unsloth")
    assert not same_files(tmp_path, source_layout="peft")
    adapters.rewrite(folder, lora_B_layout="grouped_by_expert")
    assert same_files(tmp_path)
    with pytest.raises(AdapterError, match="contradicts"):
        same_files(tmp_path, source_layout="peft")
    fourfold.export(folder, tmp_path / "fused", layout="fused", base=tmp_path / "base")
    assert adapters.read(tmp_path / "fused")[1]["lora_B_layout"] == "rank_major"
    adapters.rewrite(folder, lora_B_layout="rank_major")
    assert not same_files(tmp_path)
    adapters.rewrite(folder, lora_B_layout="diagonal")
    with pytest.raises(AdapterError, match="diagonal"):
        same_files(tmp_path)


def test_traces_of_unsloth(tmp_path: Path) -> None:
    folder = make(tmp_path)
    adapters.rewrite(folder, auto_mapping={"unsloth_fixed": True})
    with pytest.raises(AdapterError, match="--source-layout"):
        same_files(tmp_path)
    adapters.rewrite(folder, auto_mapping=None, base_model_name_or_path="unsloth/nowhere")
    with pytest.raises(AdapterError, match="--source-layout"):
        same_files(tmp_path)
    (folder / "fourfold.json").write_text("{}")  # trained here, from a base that Unsloth mirrors
    assert same_files(tmp_path)
    assert (tmp_path / "out" / "fourfold.json").read_text() == "{}"


def test_unsloth_with_an_old_peft(tmp_path: Path) -> None:
    """Both at once: the shapes tell in from out, the mark the order of B."""
    folder = make(tmp_path)
    exchange(folder)
    group(folder)
    assert same_files(tmp_path, source_layout="unsloth")


def test_target_parameters_say_which_is_which(tmp_path: Path) -> None:
    folder = make(tmp_path, target_parameters=["mlp.experts.down_proj"])
    adapters.rewrite(folder, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    with pytest.raises(AdapterError, match="which is which cannot be told"):
        same_files(tmp_path)
    adapters.rewrite(folder, target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(AdapterError, match="another model's"):
        same_files(tmp_path)
    adapters.rewrite(folder, target_parameters=None)
    with pytest.raises(AdapterError, match="which is which cannot be told"):
        same_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"r": 5}, "at rank 5"),
    ],
)
def test_what_servers_refuse(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    adapters.make(tiny.qwen3_moe(), tmp_path)
    adapters.rewrite(tmp_path / "adapter", **changes)
    with pytest.raises(AdapterError, match=said):
        fourfold.export(tmp_path / "adapter", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_tensors_that_are_no_factors_or_lack_one(tmp_path: Path) -> None:
    adapters.make(tiny.qwen3_moe(), tmp_path)
    folder = tmp_path / "adapter"
    tensors, _ = adapters.read(folder)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapters.rewrite(folder, {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(AdapterError, match="q_proj has lora_B but not"):
        fourfold.export(folder, tmp_path / "out")
    adapters.rewrite(folder, tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match=r"lm_head\.weight is no LoRA factor"):
        fourfold.export(folder, tmp_path / "out")
    (folder / adapters.WEIGHTS).write_bytes(b"\x00" * 20)
    with pytest.raises(AdapterError, match="damaged"):
        fourfold.export(folder, tmp_path / "out")


def test_incomplete_per_expert_adapters(tmp_path: Path) -> None:
    make(tmp_path)
    tensors, _ = adapters.read(tmp_path / "known")
    adapters.rewrite(tmp_path / "known", {k: t for k, t in tensors.items() if ".experts.3.up_proj" not in k})
    with pytest.raises(AdapterError, match="up_proj lacks expert 3"):
        fourfold.export(tmp_path / "known", tmp_path / "out", layout="fused")
    adapters.rewrite(tmp_path / "known", {k: t for k, t in tensors.items() if ".up_proj" not in k})
    with pytest.raises(AdapterError, match="gate alone"):
        fourfold.export(tmp_path / "known", tmp_path / "out", layout="fused")


def test_another_model(tmp_path: Path) -> None:
    make(tmp_path)
    tiny.qwen3_moe(hidden_size=128).save_pretrained(tmp_path / "other")
    for source in ("adapter", "known"):
        with pytest.raises(AdapterError, match="another model's"):
            fourfold.export(tmp_path / source, tmp_path / "out", base=tmp_path / "other", layout="fused")


def test_no_experts(tmp_path: Path) -> None:
    adapters.make(tiny.qwen3_moe(), tmp_path, target_parameters=None)
    with pytest.raises(AdapterError, match="nothing to convert"):
        fourfold.export(tmp_path / "adapter", tmp_path / "out")
