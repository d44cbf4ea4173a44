"""Settings that contradict each other: one line each, and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from config_text import MINIMAL, SOUND, complaints, load
from fourfold.errors import ConfigurationError
from fourfold.training.read_config import load_config
from fourfold.training.schema import TrainConfig


@pytest.mark.parametrize(
    ("lines", "key", "said"),
    [
        ("load_in_8bit: true", "load_in_8bit", "contradicts load_in_4bit: true. Set one of the two to false"),
        ("adapter: lora", "adapter", "lora contradicts load_in_4bit: true. Write adapter: qlora"),
        ("load_in_4bit: false", "adapter", "qlora needs a base model in 4 bit. Set load_in_4bit: true"),
        ("eval_steps: 5", "eval_steps", "there is nothing to evaluate on. Set val_set_size or test_datasets"),
        ("val_set_size: 4\ntest_datasets: [{path: t.json}]", "val_set_size", "contradicts test_datasets"),
        ("test_datasets: [{path: train.jsonl}]", "test_datasets", "train.jsonl is trained on as well"),
        ("test_datasets: [{path: ./train.jsonl}]", "test_datasets", "./train.jsonl is trained on as well"),
        (
            "learning_rate: 1e-8\nlr_scheduler: polynomial",
            "learning_rate",
            "lr_scheduler: polynomial ends at 1e-07",
        ),
        ("max_steps: 5\nwarmup_steps: 5", "warmup_steps", "5 of 5 steps: learning_rate would never be"),
        ("max_steps: 5\nlogging_steps: 6", "logging_steps", "6, and the run has 5: no loss would be shown"),
        ("lr_scheduler: constant\nwarmup_steps: 3", "warmup_steps", "lr_scheduler: constant has no warm-up"),
        (
            "lr_scheduler: constant\nwarmup_ratio: 0.1",
            "warmup_ratio",
            "lr_scheduler: constant has no warm-up",
        ),
        ("warmup_ratio: 0.1\nwarmup_steps: 3", "warmup_ratio", "given beside warmup_steps. Keep one"),
        ("eval_strategy: epoch", "eval_strategy", "there is nothing to evaluate on"),
        ("saves_per_epoch: 2\nsave_steps: 5", "saves_per_epoch", "given beside save_steps. Keep one"),
        ("save_strategy: 'no'\nsave_steps: 5", "save_strategy", "no contradicts save_steps: 5. Keep one"),
        ("save_strategy: no\nsaves_per_epoch: 5", "save_strategy", "no contradicts saves_per_epoch: 5"),
        ("save_strategy: epoch\nsave_steps: 5", "save_strategy", "epoch contradicts save_steps: 5"),
        ("save_strategy: steps", "save_strategy", "steps, and nothing says how many. Set save_steps"),
        (
            "lora_target_linear: true\nlora_target_modules: [q_proj]",
            "lora_target_linear",
            "true means every Linear, and lora_target_modules names some. Keep one",
        ),
        (
            "lora_dropout: 0.1\nlora_target_parameters: all",
            "lora_dropout",
            "0.1, and LoRA on experts' parameters takes no dropout. Set",
        ),
        (
            "lora_target_modules: []\nlora_target_parameters: all\nlora_exclude_modules: [q_proj]",
            "lora_exclude_modules",
            "there is nothing to exclude from",
        ),
        ("optimizer: sgd\nadam_beta1: 0.8", "adam_beta1", "optimizer: sgd has no such setting"),
        ("optimizer: lion_8bit\nadam_epsilon: 1e-6", "adam_epsilon", "optimizer: lion_8bit has no such"),
        (
            "gradient_checkpointing_kwargs: {use_reentrant: true}",
            "gradient_checkpointing_kwargs",
            "there is no checkpointing to set",
        ),
        ("chat_template: jinja", "chat_template", "chat_template: jinja and chat_template_jinja belong"),
        ("chat_template_jinja: x", "chat_template_jinja", "chat_template: jinja and chat_template_jinja"),
        (
            "attn_implementation: sdpa\nflash_attention: true",
            "flash_attention",
            "true, and another key asks for sdpa. Keep one",
        ),
        (
            "sdp_attention: true\nflash_attention: true",
            "sdp_attention",
            "true, and another key asks for flash_attention_2. Keep one",
        ),
        (
            "lora_target_modules: []\nlora_target_parameters: []",
            "lora_target_modules",
            "[] and no lora_target_parameters: no adapter would be trained",
        ),
        (
            "bnb_config_kwargs: {bnb_4bit_quant_typ: fp4}",
            "bnb_config_kwargs.bnb_4bit_quant_typ",
            "unknown setting. Did you mean `bnb_4bit_quant_type`?",
        ),
        (
            "bnb_config_kwargs: {load_in_8bit: true}",
            "bnb_config_kwargs.load_in_8bit",
            "unknown setting. `load_in_8bit` is a key of its own",
        ),
        (
            "bnb_config_kwargs: {llm_int8_threshold: 6.0}",
            "bnb_config_kwargs.llm_int8_threshold",
            "has no effect in 4 bit",
        ),
        (
            "quantize_moe_experts: true\nbnb_config_kwargs: {experts_quant_type: none}",
            "quantize_moe_experts",
            "contradicts bnb_config_kwargs.experts_quant_type: none",
        ),
        (
            "quantize_moe_experts: false\npeft_init_lora_weights: loftq\nlora_target_parameters: all",
            "peft_init_lora_weights",
            "loftq begins with what packing the experts lost, and they are not packed",
        ),
        (
            "adapter: lora\nload_in_4bit: false\npeft_init_lora_weights: loftq\nlora_target_parameters: all",
            "peft_init_lora_weights",
            "loftq begins with what packing the experts lost, and they are not packed",
        ),
        (
            "peft_init_lora_weights: loftq",
            "peft_init_lora_weights",
            "loftq is of the experts' adapters, and lora_target_parameters names none. Set",
        ),
        ("lora_target_modules: []", "lora_target_modules", "[] and no lora_target_parameters"),
        ("fp16: true\nbf16: true", "fp16", "true, and bf16 is true too. Keep one"),
        ("torch_compile_mode: default", "torch_compile_mode", "given, but nothing is compiled"),
        ("torch_compile_backend: eager", "torch_compile_backend", "given, but nothing is compiled"),
        ("hub_strategy: end", "hub_strategy", "given without hub_model_id"),
        ("loraplus_lr_embedding: 1e-5", "loraplus_lr_embedding", "given without loraplus_lr_ratio"),
        ("early_stopping_patience: 2", "early_stopping_patience", "given, but nothing is evaluated during"),
        (
            "early_stopping_patience: 2\nval_set_size: 4\nevals_per_epoch: 0",
            "early_stopping_patience",
            "given, but nothing is evaluated during",
        ),
        (
            "lora_model_dir: there\npeft_init_lora_weights: gaussian",
            "peft_init_lora_weights",
            "gaussian is how new adapters begin, and lora_model_dir brings its own",
        ),
        (
            "merge_lora: true\nlora_modules_to_save: [lm_head]",
            "merge_lora",
            "true, and whole modules are trained beside the adapter",
        ),
        (
            "merge_lora: true\npeft_init_lora_weights: loftq\nlora_target_parameters: all",
            "merge_lora",
            "true, and what loftq begins with is right on the packed weights alone",
        ),
        ("trackio_run_name: r", "trackio_run_name", "given, but nothing is logged to trackio"),
        (
            "lr_scheduler_kwargs: {num_cicles: 2}",
            "lr_scheduler_kwargs.num_cicles",
            "lr_scheduler: cosine has no such setting. Did you mean `num_cycles`?",
        ),
        (
            "lr_scheduler_kwargs: {num_cycles: 2}\nlr_scheduler: linear",
            "lr_scheduler_kwargs.num_cycles",
            "lr_scheduler: linear has no such setting. Drop it",
        ),
        ("lr_scheduler_kwargs: {num_cycles: two}", "lr_scheduler_kwargs.num_cycles", "two is no number from"),
        (
            "lr_scheduler_kwargs: {timescale: 2.5}\nlr_scheduler: inverse_sqrt",
            "lr_scheduler_kwargs.timescale",
            "2.5 is no whole number",
        ),
        (
            "lr_scheduler_kwargs: {num_decay_steps: 2, decay_type: round}\nlr_scheduler: warmup_stable_decay",
            "lr_scheduler_kwargs.decay_type",
            "round is no shape. Give linear, cosine, 1-sqrt",
        ),
        (
            "lr_scheduler_kwargs: {min_lr: 1e-6, min_lr_rate: 0.1}\nlr_scheduler: cosine_with_min_lr",
            "lr_scheduler_kwargs",
            "min_lr and min_lr_rate say the same twice",
        ),
        (
            "cosine_min_lr_ratio: 0.1\nlr_scheduler: linear",
            "cosine_min_lr_ratio",
            "is of lr_scheduler: cosine",
        ),
        (
            "cosine_min_lr_ratio: 0.1\nlr_scheduler_kwargs: {num_cycles: 1}",
            "cosine_min_lr_ratio",
            "given beside lr_scheduler_kwargs",
        ),
        (
            "bnb_config_kwargs: {bnb_4bit_quant_type: nf5}",
            "bnb_config_kwargs.bnb_4bit_quant_type",
            "'nf5' is none of its values. Give nf4 or fp4",
        ),
        (
            "bnb_config_kwargs: {bnb_4bit_compute_dtype: bf61}",
            "bnb_config_kwargs.bnb_4bit_compute_dtype",
            "'bf61' is none of its values",
        ),
        (
            "bnb_config_kwargs: {bnb_4bit_use_double_quant: 'true'}",
            "bnb_config_kwargs.bnb_4bit_use_double_quant",
            "'true' is neither true nor false",
        ),
        (
            "bnb_config_kwargs: {llm_int8_skip_modules: lm_head}",
            "bnb_config_kwargs.llm_int8_skip_modules",
            "'lm_head' is no list of names",
        ),
        (
            "bnb_config_kwargs: {experts_blocksize: true}",
            "bnb_config_kwargs.experts_blocksize",
            "True is no block size",
        ),
        (
            "bnb_config_kwargs: {llm_int8_threshold: many}",
            "bnb_config_kwargs.llm_int8_threshold",
            "'many' is no threshold",
        ),
    ],
)
def test_contradictions(tmp_path: Path, lines: str, key: str, said: str) -> None:
    replaced = {line.split(":")[0] for line in lines.splitlines()}
    text = (
        "".join(line + "\n" for line in SOUND.splitlines() if line.split(":")[0] not in replaced)
        + lines
        + "\n"
    )
    [line] = complaints(tmp_path, text)
    where, _, rest = line.partition(", ")
    assert rest.startswith(f"{key}: {said}")
    assert text.splitlines()[int(where.removeprefix("line ")) - 1].startswith(key.split(".")[0])


def test_slices_of_one_dataset_may_be_trained_on_and_held_out(tmp_path: Path) -> None:
    entries = [{"path": "owner/data", "split": part} for part in ("train[:90%]", "train[90%:]")]
    values = {"base_model": "m", "adapter": "lora", "datasets": entries[:1], "test_datasets": entries[1:]}
    assert TrainConfig(**values).test_datasets is not None
    with pytest.raises(ValueError, match="is trained on as well"):
        TrainConfig(**{**values, "test_datasets": entries[:1]})


def test_contradictions_without_quantization(tmp_path: Path) -> None:
    text = SOUND.replace("adapter: qlora\nload_in_4bit: true", "adapter: lora")
    lines = complaints(
        tmp_path, text + "quantize_moe_experts: true\nbnb_config_kwargs: {experts_blocksize: 32}\n"
    )
    assert [line.split(":")[0].split(", ")[1] for line in lines] == [
        "quantize_moe_experts",
        "bnb_config_kwargs.experts_blocksize",
    ]


def test_experts_in_4_bit_beside_linears_in_8(tmp_path: Path) -> None:
    text = SOUND.replace("adapter: qlora\nload_in_4bit", "adapter: lora\nload_in_8bit")
    text += "bnb_config_kwargs: {experts_quant_type: nf4, bnb_4bit_use_double_quant: true}\n"
    assert load(tmp_path, text).quantization_kwargs() == {
        "load_in_8bit": True,
        "experts_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }


def test_all_problems_at_once_and_no_false_ones(tmp_path: Path) -> None:
    text = (
        SOUND.replace("load_in_4bit: true", "load_in_4bit: perhaps")
        + "lora_rnk: 2\nseed: 1\nseed: 2\nlora_r: 0\n"
    )
    text += "eval_steps: 2\n"
    lines = complaints(tmp_path, text)
    # Not "qlora needs a base model in 4 bit": whether it does hangs on the value that is no value.
    assert [line.split(": ")[0] for line in lines] == [
        "line 3, load_in_4bit",
        "line 7, lora_rnk",
        "line 9, seed",
        "line 10, lora_r",
        "line 11, eval_steps",
    ]


def test_a_null_among_the_settings_of_bitsandbytes_is_the_default(tmp_path: Path) -> None:
    """(Passed on, a null type would be FP4.)"""
    settings = {"bnb_4bit_quant_type": None, "bnb_4bit_use_double_quant": None, "experts_blocksize": None}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "bnb_config_kwargs": settings}), encoding="utf-8")
    config = load_config(path)
    assert config.quantization_kwargs() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }


def test_a_slice_of_what_is_trained_on_is_not_held_out(tmp_path: Path) -> None:
    entry = {"path": "train.jsonl", "type": "chat_template"}
    path = tmp_path / "config.yaml"
    values = {**MINIMAL, "datasets": [entry], "test_datasets": [{**entry, "split": "train[:10%]"}]}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"train\.jsonl is trained on as well"):
        load_config(path)


def test_the_name_of_a_run_is_that_of_the_tracker_in_use(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    names = {"use_wandb": False, "wandb_name": "w", "use_mlflow": True, "mlflow_run_name": "mine"}
    path.write_text(yaml.safe_dump({**MINIMAL, **names}), encoding="utf-8")
    assert load_config(path).run_names == {"mlflow_run_name": "mine"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"wandb_name": "w"}, "wandb_name.*nothing is logged to wandb"),
        ({"mlflow_run_name": "m"}, "mlflow_run_name.*nothing is logged to mlflow"),
        (
            {"datasets": [{**MINIMAL["datasets"][0], "roles": {"user": ["x"], "assistant": ["x"]}}]},
            "`x` stands for two roles",
        ),
    ],
)
def test_what_would_have_no_effect_is_said(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **values}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=said):
        load_config(path)


@pytest.mark.parametrize("values", [{"use_wandb": False}, {"use_wandb": True}, {"wandb_project": "p"}])
def test_settings_of_a_tracker_that_is_on_or_turned_off(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **values, "wandb_name": "w"}), encoding="utf-8")
    assert load_config(path).wandb_name == "w"
