"""Keys of FSDP: what they come to, what is said of them, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config_text import SOUND
from fourfold.training.fsdp_keys import Sharding, sharding
from fourfold.training.read_config import examine


def look(tmp_path: Path, lines: str) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(SOUND + lines + "\n", encoding="utf-8")
    return examine(path)


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("fsdp_version: 2", Sharding()),
        ("fsdp_config: {fsdp_offload_params: true}", Sharding(offload=True)),
        ("fsdp_config: {reshard_after_forward: false}", Sharding(reshard_after_forward=False)),
        ("fsdp_config: {sharding_strategy: SHARD_GRAD_OP}", Sharding(reshard_after_forward=False)),
        ("fsdp: [full_shard, auto_wrap, offload]", Sharding(offload=True)),
        ("fsdp: shard_grad_op", Sharding(reshard_after_forward=False)),
        (
            "fsdp_version: 2\nfsdp_config: {activation_checkpointing: true, "
            "transformer_layer_cls_to_wrap: 'A,B', forward_prefetch: false}",
            Sharding(activation_checkpointing=True, layers=["A", "B"]),
        ),
        ("fsdp: []\nfsdp_config:\nfsdp_version: null", None),
        ("", None),
    ],
)
def test_what_they_come_to(tmp_path: Path, lines: str, wanted: Sharding | None) -> None:
    examined = look(tmp_path, lines)
    assert examined.sound, examined.complaint()
    assert sharding(examined.config) == wanted
    assert examined.at_start == []


def test_what_changes_no_number_is_said(tmp_path: Path) -> None:
    examined = look(
        tmp_path,
        "fsdp_config: {use_orig_params: false, fsdp_sync_module_states: true, limit_all_gathers: true,\n"
        "  fsdp_backward_prefetch_policy: BACKWARD_PRE, cpu_ram_efficient_loading: false,\n"
        "  state_dict_type: SHARDED_STATE_DICT}",
    )
    assert examined.sound, examined.complaint()
    said = [note.what for note in examined.instead if note.key == "fsdp_config"]
    assert len(said) == 6
    assert "cpu_ram_efficient_loading: each process reads and packs its own share only" in said


@pytest.mark.parametrize(
    ("lines", "key", "said"),
    [
        ("fsdp_config: {version: 1}", "fsdp_config", "1, which flattens parameters of one type"),
        ("fsdp_config: {offload_params: 1}", "fsdp_config.offload_params", "1 is neither true nor false"),
        ("fsdp_config: {state_dict_type: LOCAL_STATE_DICT}", "fsdp_config.state_dict_type", "LOCAL_STATE"),
        (
            "fsdp_config: {sharding_strategy: HYBRID_SHARD}",
            "fsdp_config.sharding_strategy",
            "HYBRID_SHARD is",
        ),
        (
            "fsdp_config: {sharding_strategy: FULL_SHARD, reshard_after_forward: false}",
            "fsdp_config.sharding_strategy",
            "FULL_SHARD contradicts reshard_after_forward: false. Keep",
        ),
        ("fsdp_config: {auto_wrap_policy: NO_WRAP}", "fsdp_config.auto_wrap_policy", "NO_WRAP, and a packed"),
        ("fsdp_config: {min_num_params: 100}", "fsdp_config.min_num_params", "a packed model is sharded"),
        ("fsdp_config: {forward_prefetch: true}", "fsdp_config.forward_prefetch", "is FSDP1's"),
        (
            "fsdp_config: {mixed_precision_policy: bf16}",
            "fsdp_config.mixed_precision_policy",
            "packed bytes are never cast",
        ),
        (
            "fsdp_config: {transformer_layer_cls_to_wrap: 3}",
            "fsdp_config.transformer_layer_cls_to_wrap",
            "a int is none of its values",
        ),
        ("fsdp: [hybrid_shard]", "fsdp", "hybrid_shard is not done. Give full_shard"),
        ("fsdp_final_state_dict_type: FULL_STATE_DICT", "fsdp_final_state_dict_type", "has no effect on a"),
        ("fsdp_final_state_dict_type: WHOLE", "fsdp_final_state_dict_type", "WHOLE is none of its values"),
        (
            "fsdp_version: 2\nexperts_offload: cpu",
            "experts_offload",
            "whole experts in host memory contradict",
        ),
        ("fsdp_version: 2\ntorch_compile: true", "torch_compile", "true is not done for a model that FSDP"),
        ("fsdp_version: 2\nbf16: false\nfp16: true", "fp16", "true is not done for a model that FSDP"),
        (
            "fsdp_version: 2\nlora_target_parameters: all\npeft_init_lora_weights: loftq",
            "peft_init_lora_weights",
            "loftq needs each",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, lines: str, key: str, said: str) -> None:
    [problem] = look(tmp_path, lines).problems
    assert problem.key == key
    assert f"{problem.what}. {problem.remedy}".startswith(said)


def test_in_high_precision(tmp_path: Path) -> None:
    text = SOUND.replace("qlora", "lora").replace("load_in_4bit: true", "load_in_4bit: false")
    path = tmp_path / "config.yaml"
    path.write_text(text + "fsdp_version: 2\n", encoding="utf-8")
    [problem] = examine(path).problems
    assert (problem.key, problem.what[:20]) == ("fsdp_version", "shards packed models")
