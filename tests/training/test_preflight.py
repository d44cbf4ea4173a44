"""What stops a run before it is slow: one message, exit status 2, no weight read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from fourfold.errors import (
    AdapterError,
    ConfigurationError,
    DataError,
    FourfoldError,
    UnsupportedExpertsError,
)
from fourfold.training.generation import load_for_generation
from fourfold.training.preflight import check, load_tokenizer, make_quantization_config, stored_bits
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from tiny_chat import Settings, conversation, quiet


def write_model_config(folder: Path, tokenizer: Any, config: Any) -> Path:
    """A folder with a configuration and no weights at all."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spoil_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_targets_are_checked_before_the_data_is_tokenized_and_the_folder_made_last(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourfold.training import preflight

    def must_not(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("too early")

    monkeypatch.setattr(preflight, "prepare_data", must_not)
    config = TrainConfig(**settings(lora_target_modules=["q_porj"]))
    with pytest.raises(AdapterError, match="q_proj"):
        check(config)
    monkeypatch.undo()
    with pytest.raises(DataError, match="sequence_len: 8"):
        check(TrainConfig(**settings(sequence_len=8)))
    assert not Path(config.output_dir).exists()
    check(TrainConfig(**settings()))
    assert Path(config.output_dir).is_dir()


def test_bad_input_is_found_before_weights_are_read(
    settings: Settings, moe_folder: Path, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", must_not_load)
    monkeypatch.chdir(Path(__file__).parents[2])
    empty, merged = tmp_path / "empty", tmp_path / "merged"
    empty.mkdir()
    (merged / "merged").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(conversation(0)) + "\n\n{}\n")
    no_model, no_padding, few_rows = (tmp_path / name for name in ("list", "padding", "rows"))
    for folder in (no_model, no_padding, few_rows):
        shutil.copytree(moe_folder, folder)
    (no_model / "config.json").write_text("[]")
    spoil_json(no_padding / "tokenizer_config.json", pad_token=None, eos_token=None)
    spoil_json(few_rows / "config.json", vocab_size=9)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    cases: list[tuple[dict[str, Any], type[FourfoldError], str]] = [
        ({"base_model": str(tmp_path / "nowhere")}, ConfigurationError, "there is no folder"),
        ({"base_model": "tests/no-such-model"}, ConfigurationError, "there is no folder"),
        ({"base_model": str(empty)}, ConfigurationError, "has no config.json"),
        (
            {"base_model": str(dense_folder), "lora_target_parameters": ["mlp.experts.gate_up_proj"]},
            AdapterError,
            "dense",
        ),
        ({"lora_target_parameters": ["mlp.experts.gate_up_prj"]}, AdapterError, "mlp.experts.gate_up_proj"),
        ({"lora_target_modules": ["q_porj"]}, AdapterError, "q_proj"),
        ({"datasets": [{"path": str(rows)}]}, DataError, f"{rows}, line 2: empty row"),
        ({"datasets": [{"path": str(tmp_path / "no.jsonl")}]}, DataError, "no such file"),
        ({"output_dir": str(blocked / "out")}, ConfigurationError, "cannot write to"),
        ({"resume_from_checkpoint": True}, ConfigurationError, "holds no checkpoint"),
        ({"base_model": str(no_model)}, ConfigurationError, "not a model's configuration (a list)"),
        ({"base_model": str(no_padding)}, ConfigurationError, "neither a pad_token nor an eos_token"),
        ({"base_model": str(few_rows)}, ConfigurationError, "has embeddings for 9 tokens only"),
        ({"max_steps": None, "warmup_steps": 6}, ConfigurationError, "6 of 6 steps"),
        ({"max_steps": None, "logging_steps": 7}, ConfigurationError, "and the run has 6"),
        ({"resume_from_checkpoint": str(empty)}, ConfigurationError, "is no checkpoint of a run"),
        ({"bnb_config_kwargs": {"experts_blocksize": 100}}, ConfigurationError, "bnb_config_kwargs"),
        ({"base_model": str(dense_folder)}, ConfigurationError, "all is of experts, and LlamaForCausalLM is"),
        ({"fp16": True}, ConfigurationError, "fp16: true needs a GPU"),
        ({"optimizer": "ademamix"}, ConfigurationError, "is bitsandbytes' and needs a GPU"),
        ({"optimizer": "adamw_torch_8bit"}, ConfigurationError, "needs the package torchao"),
        ({"use_trackio": True}, ConfigurationError, "needs the package trackio"),
        ({"chat_template": "qwen3"}, ConfigurationError, "is the template of another family than"),
        (
            {"base_model": str(dense_folder), "lora_target_parameters": None, "router_aux_loss_coef": 0.1},
            ConfigurationError,
            "LlamaForCausalLM has no balancing term",
        ),
        ({"lora_modules_to_save": ["experts"]}, ConfigurationError, "mlp.experts is held in 4 or 8 bit"),
        ({"lora_modules_to_save": ["q_proj"]}, ConfigurationError, "q_proj is held in 4 or 8 bit"),
        ({"lora_modules_to_save": ["lm_heed"]}, ConfigurationError, "lm_heed is no module of"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, ConfigurationError, "lm_head is the head, whose"),
        (
            {
                "lora_target_parameters": None,
                "lora_target_modules": ["q_proj", "v_proj"],
                "lora_exclude_modules": ".*_proj",
            },
            ConfigurationError,
            "nothing is left of lora_target_modules",
        ),
        ({"lora_model_dir": str(empty)}, AdapterError, "lora_model_dir"),
        ({"merge_lora": True, "output_dir": str(merged)}, ConfigurationError, "is there already"),
        ({"hub_model_id": "a/b"}, ConfigurationError, "nothing can be uploaded to a/b"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"optimizer": "paged_adamw_8bit"}, ConfigurationError, "needs a GPU"))
    for changes, kind, said in cases:
        with pytest.raises(kind) as caught:
            run(TrainConfig(**settings(**changes)), quiet())
        assert said in str(caught.value), changes
        assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("llama4", ["experts.gate_up_proj", "experts.down_proj"]),
        ("dbrx", ["mlp.w1", "mlp.v1", "mlp.w2"]),
        ("jetmoe", ["input_linear.weight", "output_linear.weight"]),
    ],
)
def test_experts_with_their_own_forward_are_targets(
    settings: Settings, tokenizer: Any, tmp_path: Path, kind: str, found: list[str]
) -> None:
    folder = write_model_config(tmp_path / kind, tokenizer, getattr(tiny, kind)(vocab_size=32))
    targets = check(TrainConfig(**settings(base_model=str(folder)))).target_parameters
    assert [any(target.endswith(name) for target in targets) for name in found] == [True] * len(found)
    alone = TrainConfig(**settings(base_model=str(folder), lora_target_parameters=[]))
    assert check(alone).target_parameters == []


def doge_folder(folder: Path, tokenizer: Any) -> Path:
    import transformers

    config = transformers.DogeConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        is_moe=True,
        architectures=["DogeForCausalLM"],
    )
    return write_model_config(folder, tokenizer, config)


def test_experts_that_cannot_be_packed_are_refused_from_the_configuration_alone(
    settings: Settings, tokenizer: Any, tmp_path: Path
) -> None:
    folder = doge_folder(tmp_path / "doge", tokenizer)
    with pytest.raises(UnsupportedExpertsError, match="llm_int8_skip_modules") as caught:
        run(TrainConfig(**settings(base_model=str(folder))), quiet())
    assert caught.value.exit_status == 2


def test_experts_that_lora_cannot_train_are_said_and_not_left_out(
    settings: Settings, tokenizer: Any, tmp_path: Path
) -> None:
    folder = doge_folder(tmp_path / "doge", tokenizer)
    plain = settings(base_model=str(folder), quantize_moe_experts=False)
    with pytest.raises(ConfigurationError, match=r"lora_target_parameters: LoRA on experts") as caught:
        run(TrainConfig(**plain), quiet())
    assert caught.value.exit_status == 2


def test_checkpoints_that_are_quantized_otherwise_are_refused(
    settings: Settings, moe_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    stored = json.loads((moe_folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    tokenizer.save_pretrained(tmp_path / "gptq")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigurationError, match=r"quantized already \(gptq\)"):
        run(TrainConfig(**settings(base_model=str(tmp_path / "gptq"))), quiet())


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "bitsandbytes"])
def test_checkpoints_that_are_packed_anew_are_let_through(
    settings: Settings, tmp_path: Path, moe_folder: Path, method: str
) -> None:
    stored = json.loads((moe_folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    made = make_quantization_config(TrainConfig(**settings(base_model=str(tmp_path))))
    assert made.experts_format().quant_type == "nf4"


def test_a_packed_checkpoint_is_trained_as_it_is(
    settings: Settings, moe_folder: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    model, tokenizer = load_for_generation(str(moe_folder), 4)
    model.save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    result = run(TrainConfig(**settings(base_model=str(packed), max_steps=2, eval_steps=0)), quiet())
    rows = result.packed["rows"]
    assert [r["dtype"] for r in rows if r["role"] == "experts"] == ["NF4 /64 double-quantized"]
    eight = {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}
    with pytest.raises(ConfigurationError, match=r"load_in_8bit: .* is packed in 4 bit already") as caught:
        check(TrainConfig(**settings(base_model=str(packed), **eight)))
    assert caught.value.exit_status == 2
    changes = {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}
    with pytest.raises(ConfigurationError, match="packed already and these settings cannot"):
        run(TrainConfig(**settings(base_model=str(packed), **changes)), quiet())


@pytest.mark.parametrize(
    ("stored", "bits"),
    [
        ({"linears": "4bit"}, 4),
        ({"linears": "8bit", "experts_quant_type": "nf4"}, 8),
        ({"linears": "none", "experts_quant_type": "int8"}, 8),
        ({"linears": "none", "experts_quant_type": "fp4"}, 4),
        ({}, None),
    ],
)
def test_bits_of_a_packed_checkpoint(stored: dict[str, str], bits: int | None) -> None:
    assert stored_bits(stored) == bits


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of it, which reads every text as none."""
    tiny.save(tiny.qwen3_moe(), tmp_path)
    with pytest.raises(ConfigurationError, match="knows no text: its files are missing"):
        load_tokenizer(str(tmp_path))


def test_usual_names_that_a_model_lacks_are_left_out_and_said(settings: Settings) -> None:
    """A list written for many models; a name that is not usual is a mistake all the same."""
    checked = check(TrainConfig(**settings(lora_target_modules=["q_proj", "up_proj", "o_proj"])))
    assert checked.target_modules == ["q_proj", "o_proj"]
    assert checked.notes == ["lora_target_modules: the model has no up_proj; trained are q_proj, o_proj"]
    with pytest.raises(AdapterError, match="lora_target_modules: 'q_porj' matches no module"):
        check(TrainConfig(**settings(lora_target_modules=["q_porj", "o_proj"])))
    with pytest.raises(AdapterError, match="lora_target_modules: 'up_proj' matches no module"):
        check(TrainConfig(**settings(lora_target_modules=["up_proj"])))
