"""Files as axolotl's users have them: the same keys and kinds of values as its examples for MoE QLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fourfold.cli import main
from fourfold.training.read_config import examine
from fourfold.training.trainer import interval, trainer_arguments
from tiny_chat import conversation, write_jsonl

COMMON = """\
base_model: owner/model
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
  - axolotl.integrations.liger.LigerPlugin
strict: false
load_in_8bit: false
load_in_4bit: true
quantize_moe_experts: true
datasets:
  - path: owner/chats
    type: chat_template
    split: train[:50%]
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
val_set_size: 0.0
dataset_prepared_path: prepared
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 64
sample_packing: true
pad_to_sequence_len: false
lora_r: 4
lora_alpha: 8
lora_dropout: 0
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
lora_target_parameters:
  - mlp.experts.gate_up_proj
  - mlp.experts.down_proj
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 2
micro_batch_size: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
"""
CARDS = """\
optimizer: adamw_torch_8bit
gradient_checkpointing: false
fsdp_config:
  fsdp_version: 2
  offload_params: false
  cpu_ram_efficient_loading: false
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: SomeDecoderLayer
  state_dict_type: FULL_STATE_DICT
  sharding_strategy: FULL_SHARD
  reshard_after_forward: true
  activation_checkpointing: true
"""
KERNELS = """\
use_kernels: true
use_scattermoe: true
experts_implementation: scattermoe
torch_compile: false
liger_layer_norm: true
liger_rope: true
liger_rms_norm: true
liger_glu_activation: true
liger_rms_norm_gated: true
ddp_find_unused_parameters: true
chat_template: tokenizer_default
eot_tokens: [<end>]
fused_attn_kernel: true
bnb_config_kwargs:
  bnb_4bit_use_double_quant: true
gemma4_hybrid_attn_impl: true
activation_offloading: true
remove_unused_columns: false
train_on_inputs: false
ple_cpu_offload: true
"""


def sharded(text: str) -> str:
    """A file for several cards: other keys beside those of FSDP."""
    for line in ("optimizer: adamw_bnb_8bit\n", "gradient_checkpointing: true\n"):
        text = text.replace(line, "")
    return text + CARDS


def look(tmp_path: Path, text: str, *overrides: str) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return examine(path, list(overrides))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (COMMON, []),
        (COMMON + KERNELS, []),
        (sharded(COMMON), []),
        (sharded(COMMON).replace("checkpointing: false", "checkpointing: true"), []),
        (COMMON + "context_parallel_size: 2\n", ["context_parallel_size"]),
        (COMMON + "deepspeed: zero3.json\n", []),
        (COMMON + "processor_type: AutoProcessor\nskip_prepare_dataset: true\n", None),
        (COMMON.replace("[q_proj, k_proj, v_proj, o_proj]", r"'layers.[\d]+.self_attn.(q|k)_proj'"), None),
        (COMMON.replace("adamw_bnb_8bit", "adamw_torch_4bit"), []),
    ],
)
def test_nothing_is_wrong_and_what_is_missing_is_named(
    tmp_path: Path, text: str, missing: list[str] | None
) -> None:
    examined = look(tmp_path, text)
    assert all(problem.not_yet for problem in examined.problems), examined.complaint()
    if missing is not None:
        assert [problem.key for problem in examined.problems] == missing
        off = [f"{key}=null" for key in missing]
        assert look(tmp_path, text, *off).sound


def test_what_such_a_file_means(tmp_path: Path) -> None:
    """Value by value, not only that it is read."""
    config = look(tmp_path, COMMON + KERNELS, "sample_packing=null").config
    entry = config.datasets[0]
    assert (entry.path, entry.type, entry.split) == ("owner/chats", "chat_template", "train[:50%]")
    assert (entry.field_messages, entry.message_property_mappings.role) == ("conversations", "from")
    assert entry.message_property_mappings.content == "value"
    assert config.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config.lora_target_parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert config.quantization_kwargs() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    assert config.attention == "flash_attention_2"
    assert (config.bf16, config.fp16, config.tf32, config.trackers) == ("auto", False, False, [])
    arguments = trainer_arguments(
        config.model_copy(update={"optimizer": "adamw_torch"}), bf16=False, use_cpu=True, examples=80
    )
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 2)
    assert (arguments.num_train_epochs, arguments.max_steps, arguments.warmup_steps) == (1, -1, 0.1)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.lr_scheduler_type) == (
        2e-4,
        0,
        "cosine",
    )
    assert arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size == 8
    assert arguments.save_steps == 10  # once in an epoch of 10 steps
    assert interval(config, "eval", 80) == 2  # four times (10 / 4, rounded)
    assert arguments.router_aux_loss_coef == 0
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_experts_are_trained_only_where_the_file_names_them(tmp_path: Path) -> None:
    """A file whose expert targets are comments trains Linears alone, and may have dropout."""
    named = "lora_target_parameters:\n  - mlp.experts.gate_up_proj\n  - mlp.experts.down_proj\n"
    text = COMMON.replace(named, "").replace("lora_dropout: 0\n", "lora_dropout: 0.05\n")
    assert named in COMMON
    examined = look(tmp_path, text, "sample_packing=null")
    assert examined.sound, examined.complaint()
    assert (examined.config.lora_target_parameters, examined.config.lora_dropout) == (None, 0.05)
    assert (
        "experts are not trained"
        in {note.key: note.what for note in examined.remarks}["lora_target_parameters"]
    )


def test_each_key_is_done_said_or_refused(tmp_path: Path) -> None:
    text = sharded(COMMON + KERNELS)
    examined = look(tmp_path, text, "fsdp_config=null")
    done = set(examined.config.model_dump())
    said = {note.key for note in examined.instead}
    asked = {key for key, value in yaml.safe_load(text).items() if value not in (None, False)}
    assert asked <= done | said | {"fsdp_config"}


def test_such_a_file_is_trained(
    tmp_path: Path, moe_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # dataset_prepared_path is relative
    words = {"user": "human", "assistant": "gpt"}
    records = [
        {
            "conversations": [
                {"from": words[turn["role"]], "value": turn["content"]}
                for turn in conversation(index)["messages"]
            ]
        }
        for index in range(32)
    ]
    path = tmp_path / "config.yaml"
    path.write_text(COMMON + KERNELS, encoding="utf-8")
    overrides = [
        f"base_model={moe_folder}",
        f"datasets.0.path={write_jsonl(tmp_path / 'chats.jsonl', records)}",
        f"output_dir={tmp_path / 'out'}",
        "attn_implementation=sdpa",  # as on a machine without the package
        "optimizer=adamw_torch",
    ]
    assert main(["train", str(path), *overrides, "--json"]) == 0
    captured = capsys.readouterr()
    assert '"packed_rows": 4' in captured.out  # half of 32 examples, 4 to a row of 64 tokens
    assert '"steps": 1' in captured.out  # 4 rows a batch, 2 batches a step
    for key in ("plugins", "evals_per_epoch", "eot_tokens"):
        assert f", {key}" in captured.err, key
    [kept] = (tmp_path / "prepared").iterdir()
    assert (kept / "train").is_dir()
    assert {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1"}
