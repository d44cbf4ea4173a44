"""Whole runs on a tiny random Mixtral: 4 bit, adapters, report, resumption; and what stops one before it is
slow."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fourfold.errors import (
    AdapterError,
    ConfigurationError,
    DataError,
    FourfoldError,
    TrainingError,
    UnquantizedExpertsError,
    UnsupportedExpertsError,
)
from fourfold.training import run as run_module
from fourfold.training.evaluate import evaluate_answers
from fourfold.training.generation import load_for_generation
from fourfold.training.preflight import check, stored_bits
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult, show
from fourfold.training.trainer import make_collator
from tiny_chat import Settings, conversation, write_jsonl


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def trained(
    moe_folder: Path, data_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunResult, str]:
    """One run that most tests look at, and what it printed."""
    train, held_out = data_files
    config = TrainConfig(
        base_model=str(moe_folder),
        adapter="qlora",
        load_in_4bit=True,
        datasets=[{"path": str(train)}],
        test_datasets=[{"path": str(held_out)}],
        sequence_len=64,
        micro_batch_size=8,
        max_steps=12,
        learning_rate=0.02,
        warmup_steps=1,
        bf16=False,
        eval_steps=6,
        save_steps=4,  # an epoch is 6 steps: checkpoints in the middle of the first and of the second
        output_dir=str(tmp_path_factory.mktemp("run") / "out"),
    )
    console = quiet()
    result = run(config, console)
    show(result, console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_loss_falls(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    assert result.improvement is not None
    assert result.improvement.mean > 0.5
    assert result.improvement.mean > 3 * result.improvement.standard_error
    losses = dict(result.curve.train)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 0.5
    assert [step for step, _ in result.curve.held_out] == [0, 6, 12]


def test_experts_are_packed_and_adapters_are_fp32(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    experts = [row for row in result.packed["rows"] if row["role"] == "experts"]
    assert [row["dtype"] for row in experts] == ["NF4 /64 double-quantized"]
    assert experts[0]["bytes"] < experts[0]["bytes_before"] / 7
    assert result.adapters["dtypes"] == ["float32"]
    assert result.adapters["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert result.adapters["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_files_left_behind(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    out = Path(result.adapter)
    weights = load_file(out / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    # 2 layers: q, k, v, o and two expert projections, an A and a B each.
    assert len(weights) == 2 * (4 + 2) * 2
    assert all(tensor.abs().max() > 0 for tensor in weights.values())  # every B has moved off zero
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert (out / "tokenizer.json").is_file()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoints = sorted(path.name for path in out.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_report(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    report = json.loads((Path(result.adapter) / "report.json").read_text())
    assert report["steps"] == 12
    assert report["config"]["lora_r"] == 8
    assert report["data"]["train"]["examples"] == 48
    held_out = report["held_out_loss"]
    assert report["data"]["held_out"]["examples"] == len(held_out["before"]["per_answer"]) == 10
    fell = held_out["before"]["mean"] - held_out["after"]["mean"]
    assert held_out["improvement"]["mean"] == pytest.approx(fell)
    assert report["model"]["bytes"] < report["model"]["bytes_before"] / 5
    assert report["tokens_per_second"] > 0
    assert report["peak_memory_bytes"] > 50e6
    # 12 batches of 8 conversations of 15 tokens.
    assert report["tokens_per_second"] * report["training_seconds"] == pytest.approx(12 * 8 * 15)
    assert report["sample"]["reference"] == conversation(100)["messages"][1]["content"]
    assert len(report["loss_curve"]["train"]) == 12


def test_the_table_shows_what_matters(trained: tuple[RunResult, str]) -> None:
    result, printed = trained
    assert result.before is not None
    assert result.after is not None
    for text in (
        "NF4 /64 double-quantized",
        "tokens/s",
        "resident set" if result.device == "cpu" else "GPU memory",
        f"{result.before.mean:.3f} ± {result.before.standard_error:.3f}",
        f"{result.after.mean:.3f} ± {result.after.standard_error:.3f}",
        "answer before",
        result.sample["after"],
        "report.json",
        "step 12/12",
    ):
        assert text in printed, text


def test_the_saved_adapter_is_the_trained_one(
    trained: tuple[RunResult, str], moe_folder: Path, settings: Settings
) -> None:
    result, _ = trained
    assert result.before is not None
    assert result.after is not None
    checked = check(TrainConfig(**settings()))
    assert checked.held_out is not None
    collate = make_collator(checked.tokenizer)
    model, _ = load_for_generation(str(moe_folder), None, result.adapter)
    again = evaluate_answers(model, checked.held_out.dataset, collate, 4)
    assert again.per_answer == pytest.approx(result.after.per_answer, abs=1e-5)
    base, _ = load_for_generation(str(moe_folder), 4)
    again = evaluate_answers(base, checked.held_out.dataset, collate, 4)
    assert again.per_answer == pytest.approx(result.before.per_answer, abs=1e-5)


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    trained: tuple[RunResult, str], settings: Settings, step: int
) -> None:
    result, _ = trained
    checkpoint = Path(result.adapter) / f"checkpoint-{step}"
    torch.manual_seed(123)  # no help from a random state that happens to be the same
    resumed = run(TrainConfig(**settings(resume_from_checkpoint=str(checkpoint))), quiet())
    assert resumed.steps == 12
    losses, expected = dict(resumed.curve.train), dict(result.curve.train)
    assert list(losses) == list(range(step + 1, 13))
    assert losses == pytest.approx({number: expected[number] for number in losses}, abs=1e-5)
    whole, halves = (
        load_file(Path(folder) / "adapter_model.safetensors") for folder in (result.adapter, resumed.adapter)
    )
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, rtol=1e-5, atol=1e-6)
    assert resumed.before is not None
    assert result.before is not None
    assert resumed.before.per_answer == result.before.per_answer  # "before" is the base model, here too


def test_resume_true_takes_the_last_checkpoint(trained: tuple[RunResult, str], settings: Settings) -> None:
    result, _ = trained
    config = TrainConfig(**settings(output_dir=result.adapter, resume_from_checkpoint=True, max_steps=13))
    assert check(config).checkpoint == str(Path(result.adapter) / "checkpoint-12")
    with pytest.raises(ConfigurationError, match="is at step 12 of 12 already"):
        check(TrainConfig(**settings(output_dir=result.adapter, resume_from_checkpoint=True)))


def copied(trained: tuple[RunResult, str], tmp_path: Path, step: int = 4) -> Path:
    """A checkpoint of the run, to be spoilt."""
    result, _ = trained
    folder = tmp_path / f"checkpoint-{step}"
    shutil.copytree(Path(result.adapter) / folder.name, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model": "another"}, "base_model"),
        ({"lora_r": 4}, r"lora_r \(8 there\)"),
        ({"lora_alpha": 8}, r"lora_alpha \(16 there\)"),
        ({"optimizer": "sgd"}, r"optimizer \(adamw_torch_fused there\)"),
        ({"learning_rate": 0.01}, r"learning_rate \(0.02 there\)"),
        ({"seed": 1}, r"seed \(42 there\)"),
        ({"micro_batch_size": 4}, r"micro_batch_size \(8 there\)"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps \(1 there\)"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules"),
        ({"lora_target_parameters": []}, "lora_target_parameters"),
        ({"bf16": True}, r"bf16 \(False there\)"),
        ({"adapter": "lora", "load_in_4bit": False}, r"load_in_4bit \(True there\)"),
        ({"test_datasets": None, "eval_steps": 0, "val_set_size": 4}, "datasets"),
        ({"max_steps": None, "num_epochs": 0.5}, r"is at epoch 0.66\d+ of 0.5 already"),
        ({"max_steps": 4}, "is at step 4 of 4 already"),
    ],
)
def test_a_run_resumes_with_the_settings_it_began_with(
    trained: tuple[RunResult, str],
    settings: Settings,
    moe_folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    if "base_model" in changes:  # of the same shapes
        shutil.copytree(moe_folder, tmp_path / "another")
        changes = {"base_model": str(tmp_path / "another")}
    checkpoint = str(copied(trained, tmp_path))
    with pytest.raises(ConfigurationError, match=said) as caught:
        check(TrainConfig(**settings(resume_from_checkpoint=checkpoint, **changes)))
    assert caught.value.exit_status == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("trainer_state.json", '{"global_st', "trainer_state.json is damaged"),
        ("trainer_state.json", "[]", "trainer_state.json is damaged"),
        ("trainer_state.json", '{"epoch": 1.0}', "it has no global_step"),
        ("run.json", "", "run.json is damaged"),
        ("run.json", None, "has no run.json"),
        ("optimizer.pt", None, "has no optimizer.pt"),
        ("adapter_config.json", None, "has no adapter_config.json"),
    ],
)
def test_a_torn_checkpoint(
    trained: tuple[RunResult, str], settings: Settings, tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    checkpoint = copied(trained, tmp_path)
    if text is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        check(TrainConfig(**settings(resume_from_checkpoint=str(checkpoint))))


@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "INT8"),
        ({"adapter": "lora", "load_in_4bit": False}, "float32"),
        ({"quantize_moe_experts": False}, "float32"),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, "FP4 /64 double-quantized"),
    ],
)
def test_other_ways_to_hold_the_experts(settings: Settings, changes: dict[str, Any], experts: str) -> None:
    short = {"max_steps": 2, "eval_steps": 0, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
    result = run(TrainConfig(**settings(gradient_checkpointing=True, **short, **changes)), quiet())
    assert [row["dtype"] for row in result.packed["rows"] if row["role"] == "experts"] == [experts]
    assert result.improvement is not None
    assert result.improvement.mean > 0


def test_without_held_out_data_and_by_epochs(settings: Settings) -> None:
    changes = {"test_datasets": None, "eval_steps": None, "max_steps": None, "save_steps": None}
    result = run(TrainConfig(**settings(num_epochs=2, micro_batch_size=24, **changes)), quiet())
    assert result.steps == 4
    assert result.improvement is None
    assert json.loads((Path(result.adapter) / "report.json").read_text())["held_out_loss"] is None
    checkpoints = sorted(path.name for path in Path(result.adapter).glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]


def test_long_examples_are_dropped_and_reported(settings: Settings, tmp_path: Path) -> None:
    long = conversation(0)
    long["messages"][1]["content"] += " red" * 80
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [long, *(conversation(index) for index in range(1, 9))])
        for name in ("train", "held-out")
    ]
    entries = [[{"path": str(path)}] for path in files]
    config = TrainConfig(**settings(datasets=entries[0], test_datasets=entries[1], max_steps=2, eval_steps=0))
    console = quiet()
    result = run(config, console)
    show(result, console)
    assert (result.data["train"]["examples"], result.data["train"]["dropped"]) == (8, 1)
    assert "1 longer ones dropped" in console.file.getvalue()  # type: ignore[attr-defined]
    assert result.sample["reference"] == conversation(1)["messages"][1]["content"]  # one that is evaluated
    cut = run(config.model_copy(update={"excess_length_strategy": "truncate"}), console)
    assert (cut.data["train"]["examples"], cut.data["train"]["truncated"]) == (9, 1)


def test_targets_may_be_chosen(settings: Settings) -> None:
    only = {"lora_target_modules": ["q_proj"], "lora_target_parameters": []}
    result = run(TrainConfig(**settings(max_steps=1, warmup_steps=0, eval_steps=0, **only)), quiet())
    names = load_file(Path(result.adapter) / "adapter_model.safetensors")
    assert len(names) == 4
    assert all("q_proj" in name for name in names)


def test_a_dense_model_is_trained_without_experts(settings: Settings, dense_folder: Path) -> None:
    result = run(TrainConfig(**settings(base_model=str(dense_folder), max_steps=2, eval_steps=0)), quiet())
    assert result.adapters["target_parameters"] == []
    assert result.packed["experts"] == []


@pytest.mark.parametrize(("save_steps", "left"), [(0, "Nothing was saved."), (1, "Nothing was saved.")])
def test_a_diverging_run_is_stopped(settings: Settings, save_steps: int, left: str) -> None:
    # The first step's update is what ruins: the checkpoint of that step is not recommended.
    changes = {"learning_rate": 1e30, "lr_scheduler": "constant", "warmup_steps": 0}
    with pytest.raises(TrainingError, match=r"at step 2 is (nan|inf|not finite)") as caught:
        run(TrainConfig(**settings(save_steps=save_steps, **changes)), quiet())
    assert str(caught.value).endswith(left)
    assert "unharmed" not in str(caught.value)


def test_a_gradient_that_is_not_finite_never_reaches_the_adapters(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_module.MoeTrainer.training_step
    seen: dict[str, Any] = {}

    def spoil(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(self, model, inputs, *args, **kwargs)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if self.state.global_step == 3:
            trainable[-1].grad.view(-1)[0] = float("nan")
            seen.update(parameters=trainable, before=[p.detach().clone() for p in trainable])
        return loss

    monkeypatch.setattr(run_module.MoeTrainer, "training_step", spoil)
    config = TrainConfig(**settings(save_steps=2))
    with pytest.raises(TrainingError, match="A gradient at step 4 is not finite; the step was not") as caught:
        run(config, quiet())
    for parameter, before in zip(seen["parameters"], seen["before"], strict=True):
        assert torch.equal(parameter, before)
    last = Path(config.output_dir) / "checkpoint-2"
    assert str(caught.value).endswith(f"The last checkpoint before that is {last}.")


def test_the_report_is_written_before_the_curve(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise OSError("no room for a picture")

    monkeypatch.setattr(run_module, "write_loss_curve", fails)
    config = TrainConfig(**settings(max_steps=2, eval_steps=0))
    with pytest.raises(OSError, match="no room"):
        run(config, quiet())
    assert json.loads((Path(config.output_dir) / "report.json").read_text())["steps"] == 2


def test_a_missing_matplotlib_is_noticed_at_once() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fourfold.errors import ConfigurationError\n"
        "try:\n    import fourfold.training.run\n"
        "except ConfigurationError as error:\n    assert 'matplotlib' in str(error), error\n"
        "else:\n    raise SystemExit('not noticed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_gpus_are_reported(trained: tuple[RunResult, str], monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = trained
    assert result.to_dict()["unused_gpus"] == max(0, torch.cuda.device_count() - 1)
    console = quiet()
    show(dataclasses.replace(result, device="NVIDIA H100", unused_gpus=3), console)
    assert "NVIDIA H100; 3 more visible, a run uses one" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_adapter_beside_the_path_of_the_data_stops_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_module.add_lora

    def with_one_too_many(model: Any, **kwargs: Any) -> Any:
        model = plain(model, **kwargs)
        model.register_parameter("beside", torch.nn.Parameter(torch.zeros(1)))
        return model

    monkeypatch.setattr(run_module, "add_lora", with_one_too_many)
    with pytest.raises(TrainingError, match=r"1 of 25 trainable parameters .* never be trained: beside\."):
        run(TrainConfig(**settings()), quiet())


def test_experts_that_stayed_unquantized_stop_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the loader had left them alone and nobody said so.
    plain = run_module.AutoModelForCausalLM.from_pretrained

    def forgetful(name: str, quantization_config: Any = None, **kwargs: Any) -> Any:
        return plain(name, **kwargs)

    monkeypatch.setattr(run_module.AutoModelForCausalLM, "from_pretrained", forgetful)
    with pytest.raises(UnquantizedExpertsError, match=r"mlp\.experts\.gate_up_proj"):
        run(TrainConfig(**settings()), quiet())


def write_model_config(folder: Path, tokenizer: Any, config: Any) -> Path:
    """A folder with a configuration and no weights at all."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def unsupported(kind: str) -> Any:
    """Tiny configurations of models whose experts are of another kind."""
    import transformers

    if kind == "llama4":
        return transformers.Llama4TextConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=128,
            intermediate_size_mlp=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            interleave_moe_layer_step=1,
            pad_token_id=0,
            architectures=["Llama4ForCausalLM"],
        )
    if kind == "dbrx":
        return transformers.DbrxConfig(
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=32,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
            architectures=["DbrxForCausalLM"],
        )
    return transformers.JetMoeConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        architectures=["JetMoeForCausalLM"],
    )


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

    monkeypatch.setattr(preflight, "tokenize", must_not)
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

    monkeypatch.setattr(run_module.AutoModelForCausalLM, "from_pretrained", must_not_load)
    monkeypatch.chdir(Path(__file__).parents[2])
    empty = tmp_path / "empty"
    empty.mkdir()
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
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf5"}}, ConfigurationError, "nf5"),
        ({"bnb_config_kwargs": {"bnb_4bit_compute_dtype": "bf61"}}, ConfigurationError, "bnb_config_kwargs"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"optimizer": "paged_adamw_8bit"}, ConfigurationError, "needs a GPU"))
    for changes, kind, said in cases:
        with pytest.raises(kind) as caught:
            run(TrainConfig(**settings(**changes)), quiet())
        assert said in str(caught.value), changes
        assert caught.value.exit_status == 2


@pytest.mark.parametrize("kind", ["llama4", "dbrx", "jetmoe"])
def test_experts_of_another_kind_are_refused_from_the_configuration_alone(
    settings: Settings, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    folder = write_model_config(tmp_path / kind, tokenizer, unsupported(kind))
    with pytest.raises(UnsupportedExpertsError, match="experts") as caught:
        run(TrainConfig(**settings(base_model=str(folder))), quiet())
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
