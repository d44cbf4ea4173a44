"""The configuration file: every key read, every mistake named with its line and its remedy."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config_text import SOUND, complaints, load
from fourfold.loading.arguments import BNB_4BIT, BNB_8BIT, BNB_BOTH
from fourfold.training.read_config import load_config
from fourfold.training.schema import TrainConfig

# Every key, with a value that is not its default.
EVERY_KEY: dict[str, tuple[str, Any]] = {
    "sample_packing": ("true", True),
    "train_on_inputs": ("true", True),
    "max_bad_records": ("0.25", 0.25),
    "dataset_prepared_path": ("kept", "kept"),
    "eval_sample_packing": ("true", True),
    "base_model": ("a/b", "a/b"),
    "adapter": ("lora", "lora"),
    "load_in_4bit": ("false", False),
    "load_in_8bit": ("true", True),
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type"), ("null", None)),
    "experts_offload": ("auto", "auto"),
    "gpu_budget": ("12GiB", 12 * 2**30),
    "experts_pin_memory": ("true", True),
    "quantize_moe_experts": ("true", True),
    "bnb_config_kwargs": ("{llm_int8_threshold: 5.0}", {"llm_int8_threshold": 5.0}),
    "lora_r": ("4", 4),
    "lora_alpha": ("32", 32),
    "lora_target_modules": ("[q_proj, o_proj]", ["q_proj", "o_proj"]),
    "lora_target_parameters": ("[x]", ["x"]),
    "peft_init_lora_weights": ("gaussian", "gaussian"),
    "model_type": ("AutoModelForCausalLM", "AutoModelForCausalLM"),
    "tokenizer_type": ("AutoTokenizer", "AutoTokenizer"),
    "attn_implementation": ("sdpa", "sdpa"),
    "sdp_attention": ("true", True),
    "flash_attention": ("false", False),
    "flex_attention": ("false", False),
    "eager_attention": ("false", False),
    "lora_dropout": ("0", 0.0),
    "lora_target_linear": ("false", False),
    "lora_exclude_modules": ("'.*lm_head'", ".*lm_head"),
    "lora_rank_pattern": ("{q_proj: 2}", {"q_proj": 2}),
    "lora_alpha_pattern": ("{q_proj: 4}", {"q_proj": 4}),
    "peft_use_rslora": ("true", True),
    "chat_template": ("jinja", "jinja"),
    "chat_template_jinja": ("~t.jinja", "~t.jinja"),
    "eval_batch_size": ("5", 5),
    "warmup_ratio": ("null", None),
    "weight_decay": ("0.01", 0.01),
    "max_grad_norm": ("0.3", 0.3),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.95", 0.95),
    "adam_epsilon": ("1e-6", 1e-6),
    "tf32": ("true", True),
    "evals_per_epoch": ("null", None),
    "saves_per_epoch": ("null", None),
    "eval_strategy": ("steps", "steps"),
    "save_strategy": ("steps", "steps"),
    "save_total_limit": ("2", 2),
    "auto_resume_from_checkpoints": ("true", True),
    "use_tensorboard": ("true", True),
    "use_wandb": ("true", True),
    "wandb_project": ("p", "p"),
    "wandb_entity": ("e", "e"),
    "wandb_name": ("r", "r"),
    "wandb_run_id": ("i", "i"),
    "wandb_mode": ("offline", "offline"),
    "wandb_watch": ("gradients", "gradients"),
    "wandb_log_model": ("end", "end"),
    "use_mlflow": ("true", True),
    "mlflow_tracking_uri": ("u", "u"),
    "mlflow_experiment_name": ("x", "x"),
    "mlflow_run_name": ("r", "r"),
    "val_set_size": ("0.1", 0.1),
    "sequence_len": ("99", 99),
    "excess_length_strategy": ("truncate", "truncate"),
    "micro_batch_size": ("3", 3),
    "gradient_accumulation_steps": ("2", 2),
    "max_steps": ("7", 7),
    "num_epochs": ("1.5", 1.5),
    "learning_rate": ("1e-3", 1e-3),  # YAML 1.1 reads a string here; axolotl's files are full of them
    "lr_scheduler": ("linear", "linear"),
    "warmup_steps": ("5", 5),
    "optimizer": ("adamw_torch", "adamw_torch"),
    "bf16": ("true", True),
    "gradient_checkpointing": ("true", True),
    "logging_steps": ("2", 2),
    "eval_steps": ("0.5", 0.5),
    "save_steps": ("6", 6),
    "output_dir": ("there", "there"),
    "seed": ("7", 7),
    "trust_remote_code": ("true", True),
    "lora_modules_to_save": ("[lm_head]", ["lm_head"]),
    "lora_model_dir": ("null", None),
    "loraplus_lr_ratio": ("16", 16.0),
    "loraplus_lr_embedding": ("1e-5", 1e-5),
    "router_aux_loss_coef": ("0.01", 0.01),
    "lr_scheduler_kwargs": ("{}", {}),
    "cosine_min_lr_ratio": ("null", None),
    "fp16": ("false", False),
    "torch_compile": ("auto", "auto"),
    "torch_compile_backend": ("eager", "eager"),
    "torch_compile_mode": ("default", "default"),
    "neftune_noise_alpha": ("5", 5.0),
    "early_stopping_patience": ("3", 3),
    "merge_lora": ("false", False),
    "use_trackio": ("true", True),
    "trackio_project_name": ("p", "p"),
    "trackio_run_name": ("r", "r"),
    "hub_model_id": ("a/b", "a/b"),
    "hub_strategy": ("end", "end"),
    "resume_from_checkpoint": ("there/checkpoint-3", "there/checkpoint-3"),
}


def test_every_key_is_read(tmp_path: Path) -> None:
    text = "".join(f"{key}: {written}\n" for key, (written, _) in EVERY_KEY.items())
    text += "datasets: [{path: d.json, type: chat_template, field_messages: turns}]\n"
    text += "special_tokens: {pad_token: <pad>}\ngradient_checkpointing_kwargs: {use_reentrant: true}\n"
    config = load(tmp_path, text)
    assert config.special_tokens is not None
    assert config.special_tokens.pad_token == "<pad>"
    assert config.gradient_checkpointing_kwargs.use_reentrant
    for key, (_, value) in EVERY_KEY.items():
        assert getattr(config, key) == value, key
    entry = config.datasets[0]
    assert (entry.path, entry.type, entry.field_messages) == ("d.json", "chat_template", "turns")
    mappings = {"datasets", "test_datasets", "special_tokens", "gradient_checkpointing_kwargs"}
    beside_fsdp = {"deepspeed"}  # (a contradiction: test_zero.py)
    assert set(EVERY_KEY) | mappings | beside_fsdp == set(TrainConfig.model_fields)


def test_null_is_the_default(tmp_path: Path) -> None:
    nulls = "".join(
        f"{key}: null\n" for key in EVERY_KEY if key not in ("base_model", "adapter", "load_in_4bit")
    )
    assert load(tmp_path, SOUND + "    field_messages: ~\n" + nulls) == load(tmp_path, SOUND)


def test_a_null_where_a_value_is_needed(tmp_path: Path) -> None:
    [line] = complaints(tmp_path, SOUND.replace("some/model", "null"))
    assert line.startswith("line 1, base_model: missing. Give a folder")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("lora_rank: 8", "line 7, lora_rank: unknown key. Did you mean `lora_r`?"),
        (
            "quantise_moe_experts: true",
            "line 7, quantise_moe_experts: unknown key. Did you mean `quantize_moe_experts`?",
        ),
        ("micro_batch_size: 0", "line 7, micro_batch_size: 0 should be greater than 0"),
        ("micro_batch_size: true", "line 7, micro_batch_size: True is true or false, where a number belongs"),
        ("learning_rate: fast", "line 7, learning_rate: 'fast' should be a valid number"),
        ("learning_rate: .inf", "line 7, learning_rate: inf should be a finite number"),
        ("lr_scheduler: cosin", "line 7, lr_scheduler: 'cosin' is not one of 'cosine'"),
        ("bf16: full", "line 7, bf16: 'full'"),
        ("lora_target_modules: '(q'", "line 7, lora_target_modules: '(q' is no regular expression"),
        ("datasets: []", "line 7, datasets"),
        ("val_set_size: -0.1", "line 7, val_set_size: -0.1 should be greater than or equal to 0"),
        ("val_set_size: 1.5", "line 7, val_set_size: 1.5 is no number of examples"),
        ("save_steps: 2.5", "line 7, save_steps: 2.5 is no number of steps"),
        ("seed: 5000000000", "line 7, seed: 5000000000 should be less than 4294967296"),
        ("excess_length_strategy: cut", "line 7, excess_length_strategy: 'cut' is not one of 'drop'"),
        ("peft_init_lora_weights: pissa", "line 7, peft_init_lora_weights: 'pissa' is not one of True, 'gau"),
        ("sequence_len: 1", "line 7, sequence_len: 1 should be greater than or equal to 8"),
    ],
)
def test_a_wrong_value_is_named_with_line_and_remedy(tmp_path: Path, wrong: str, expected: str) -> None:
    text = SOUND if not wrong.startswith("datasets") else SOUND.split("datasets")[0] + "\n\n\n"
    [line] = complaints(tmp_path, text + wrong + "\n")
    assert line.startswith(expected)
    assert len(line) > len(expected) or "?" in line  # and a remedy


def test_an_empty_file_lists_what_is_needed(tmp_path: Path) -> None:
    assert [line.split(":")[0] for line in complaints(tmp_path, "")] == ["base_model", "adapter", "datasets"]


def test_four_bit_means_nf4_double_quantized(tmp_path: Path) -> None:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert load(tmp_path, SOUND).quantization_kwargs() == nf4
    changed = load(tmp_path, SOUND + "bnb_config_kwargs: {bnb_4bit_quant_type: fp4}\n").quantization_kwargs()
    assert changed == {**nf4, "bnb_4bit_quant_type": "fp4"}
    skipped = load(tmp_path, SOUND + "quantize_moe_experts: false\n").quantization_kwargs()
    assert skipped == {**nf4, "experts_quant_type": "none"}


def test_the_known_settings_are_those_of_the_configuration_class() -> None:
    from fourfold import MoeBitsAndBytesConfig

    parameters = set(inspect.signature(MoeBitsAndBytesConfig.__init__).parameters)
    own_keys = {"self", "kwargs", "load_in_4bit", "load_in_8bit", "experts_device"}
    assert {*BNB_4BIT, *BNB_8BIT, *BNB_BOTH} == parameters - own_keys


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("config*.yaml")), ids=lambda path: path.parent.name)
def test_every_shipped_file_is_sound_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir.startswith("examples/")
    assert f"fourfold train {path.relative_to(EXAMPLES.parent).as_posix()}" in path.read_text(
        encoding="utf-8"
    )


def test_the_package_has_both_names() -> None:
    from fourfold import training

    assert training.load_config is load_config
    assert training.TrainConfig is TrainConfig


def test_there_are_shipped_files() -> None:
    assert EXAMPLES / "quickstart" / "config.yaml" in set(EXAMPLES.rglob("*.yaml"))


def test_validating_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SOUND)
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from fourfold.training.read_config import load_config; import fourfold.training, fourfold.cli\n"
        f"load_config({str(path)!r}); seconds = time.perf_counter() - start\n"
        "heavy = [m for m in ('torch', 'transformers', 'peft', 'trl', 'numpy') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert seconds < 2, seconds\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
