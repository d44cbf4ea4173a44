"""The configuration file: every key read, every mistake named with its line and its remedy."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fourfold.errors import ConfigurationError
from fourfold.loading.arguments import BNB_4BIT, BNB_8BIT, BNB_BOTH
from fourfold.training.read_config import load_config
from fourfold.training.schema import TrainConfig

SOUND = """\
base_model: some/model
adapter: qlora
load_in_4bit: true
datasets:
  - path: train.jsonl
    type: chat_template
"""


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def complaints(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, less the heading."""
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text, *overrides)
    heading, *lines = str(caught.value).splitlines()
    assert heading.endswith("1 problem" if len(lines) == 1 else f"{len(lines)} problems")
    return [line.strip() for line in lines]


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
    "quantize_moe_experts": ("true", True),
    "bnb_config_kwargs": ("{llm_int8_threshold: 5.0}", {"llm_int8_threshold": 5.0}),
    "lora_r": ("4", 4),
    "lora_alpha": ("32", 32),
    "lora_target_modules": ("[q_proj, o_proj]", ["q_proj", "o_proj"]),
    "lora_target_parameters": ("[]", []),
    "peft_init_lora_weights": ("gaussian", "gaussian"),
    "model_type": ("AutoModelForCausalLM", "AutoModelForCausalLM"),
    "tokenizer_type": ("AutoTokenizer", "AutoTokenizer"),
    "attn_implementation": ("sdpa", "sdpa"),
    "sdp_attention": ("true", True),
    "flash_attention": ("false", False),
    "flex_attention": ("false", False),
    "eager_attention": ("false", False),
    "lora_dropout": ("0.05", 0.05),
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
    "wandb_name": ("n", "n"),
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
    "save_steps": ("10", 10),
    "output_dir": ("there", "there"),
    "seed": ("7", 7),
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
    assert set(EVERY_KEY) | mappings == set(TrainConfig.model_fields)


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
        ("lora_dropout: 0.1", "lora_dropout", "0.1, and LoRA on experts' parameters takes no dropout. Set"),
        (
            "lora_target_modules: []\nlora_exclude_modules: [q_proj]",
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
            "both lists are empty: nothing would be trained",
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
            "quantize_moe_experts: false\npeft_init_lora_weights: loftq",
            "peft_init_lora_weights",
            "loftq begins with what packing the experts lost, and they are not packed",
        ),
        (
            "adapter: lora\nload_in_4bit: false\npeft_init_lora_weights: loftq",
            "peft_init_lora_weights",
            "loftq begins with what packing the experts lost, and they are not packed",
        ),
        (
            "lora_target_parameters: []\npeft_init_lora_weights: loftq",
            "peft_init_lora_weights",
            "loftq is of the experts' adapters, and lora_target_parameters is []. Drop one",
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


def test_duplicates_name_both_lines(tmp_path: Path) -> None:
    [line] = complaints(tmp_path, SOUND + "    type: chat_template\nlora_r: 4\n")
    assert line == "line 7, datasets.0.type: given twice, first on line 6. Keep one of the two."


def test_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    text = SOUND.replace("  - path", "  - &one\n    path") + "  - <<: *one\n    path: other.jsonl\n"
    assert [entry.path for entry in load(tmp_path, text).datasets] == ["train.jsonl", "other.jsonl"]


def test_home_is_expanded_wherever_a_path_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = SOUND.replace("some/model", "~/model").replace("train.jsonl", "~/train.jsonl")
    text += (
        "output_dir: ~/out\nresume_from_checkpoint: ~/out/checkpoint-1\ntest_datasets: [{path: ~/t.json}]\n"
    )
    config = load(tmp_path, text)
    assert config.base_model == "/home/me/model"
    assert config.datasets[0].path == "/home/me/train.jsonl"
    assert config.test_datasets is not None
    assert config.test_datasets[0].path == "/home/me/t.json"
    assert config.output_dir == "/home/me/out"
    assert config.resume_from_checkpoint == "/home/me/out/checkpoint-1"


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        SOUND,
        "max_steps=3",
        "datasets.0.path=b.json",
        "lora_r=null",
        "bnb_config_kwargs.experts_blocksize=32",
    )
    assert (config.max_steps, config.datasets[0].path, config.lora_r) == (3, "b.json", 8)
    assert config.bnb_config_kwargs == {"experts_blocksize": 32}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_step=3", "command line (max_step=3), max_step: unknown key. Did you mean `max_steps`?"),
        ("lora_r=-1", "command line (lora_r=-1), lora_r: -1 should be greater than 0"),
        ("adapter=lora", "command line (adapter=lora), adapter: lora contradicts load_in_4bit"),
    ],
)
def test_wrong_overrides_are_placed_on_the_command_line(tmp_path: Path, override: str, said: str) -> None:
    [line] = complaints(tmp_path, SOUND, override)
    assert line.startswith(said)


@pytest.mark.parametrize("override", ["max_steps", "=3", "datasets.4.path=x", "seed.deep=1", "lora_r=[1"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError, match="command line"):
        load(tmp_path, SOUND, override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "the top level is a list, not a mapping"),
        ("a: [1\nb: 2\n", r"line \d: not valid YAML"),
        ("a: !!python/object:os.system {}\n", "line 1: not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load(tmp_path, text)


def test_missing_file() -> None:
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        load_config("nowhere.yaml")


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
    own_keys = {"self", "kwargs", "load_in_4bit", "load_in_8bit"}
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


MINIMAL: dict[str, Any] = {
    "base_model": "some/model",
    "adapter": "qlora",
    "load_in_4bit": True,
    "datasets": [{"path": "train.jsonl", "type": "chat_template"}],
}


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


def test_an_override_changes_one_place_of_an_anchor_that_stands_in_two(tmp_path: Path) -> None:
    text = """\
base_model: some/model
adapter: qlora
load_in_4bit: true
datasets:
  - {path: a.jsonl, type: chat_template, message_property_mappings: &names {role: from, content: value}}
  - {path: b.jsonl, type: chat_template, message_property_mappings: *names}
"""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    config = load_config(path, ["datasets.1.message_property_mappings.role=speaker"])
    assert [each.message_property_mappings.role for each in config.datasets] == ["from", "speaker"]


def test_a_slice_of_what_is_trained_on_is_not_held_out(tmp_path: Path) -> None:
    entry = {"path": "train.jsonl", "type": "chat_template"}
    path = tmp_path / "config.yaml"
    values = {**MINIMAL, "datasets": [entry], "test_datasets": [{**entry, "split": "train[:10%]"}]}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"train\.jsonl is trained on as well"):
        load_config(path)


def test_the_name_of_a_run_is_that_of_the_tracker_in_use(tmp_path: Path) -> None:
    from fourfold.training.trainer import run_name

    path = tmp_path / "config.yaml"
    names = {"use_wandb": False, "wandb_name": "w", "use_mlflow": True, "mlflow_run_name": "mine"}
    path.write_text(yaml.safe_dump({**MINIMAL, **names}), encoding="utf-8")
    assert run_name(load_config(path)) == "mine"


def test_keys_that_are_no_decimal_number(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="²"):
        load_config(path, ["²=1"])


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
