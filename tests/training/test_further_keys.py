"""Keys beside adapters' rank and the optimizer: each does what it says, seen from outside."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import OptimizerNames

import fourfold
import tiny
from fourfold.errors import AdapterError, ConfigurationError, TrainingError
from fourfold.training import preflight
from fourfold.training import run as run_module
from fourfold.training.callbacks import FiniteGradients
from fourfold.training.key_types import NOT_YET_OPTIMIZERS, NOT_YET_SCHEDULERS, Optimizer, Scheduler
from fourfold.training.preflight import check
from fourfold.training.run import run
from fourfold.training.schedules import SETTINGS
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult, show
from fourfold.training.templates import FAMILIES, is_of_family
from fourfold.training.trainer import trainer_arguments
from fourfold.training.watch import EarlyStop
from tiny_chat import Settings, quiet

SHORT = {"max_steps": 3, "eval_steps": 0}


def losses(settings: Settings, **changes: Any) -> list[float]:
    return [loss for _, loss in run(TrainConfig(**settings(**{**SHORT, **changes})), quiet()).curve.train]


def adapter(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_absent_targets_leave_experts_alone(settings: Settings, tmp_path: Path) -> None:
    run(TrainConfig(**settings(**SHORT, lora_target_parameters=None, lora_dropout=0.05)), quiet())
    names = adapter(tmp_path / "out")
    assert names
    assert all("self_attn" in name for name in names)


def test_whole_modules_are_trained_and_saved(settings: Settings, tmp_path: Path, moe_folder: Path) -> None:
    whole = ["embed_tokens", "lm_head", "mlp.gate"]
    changes = {"lora_modules_to_save": whole, "bf16": True}
    run(TrainConfig(**settings(**SHORT, **changes)), quiet())
    saved, base = adapter(tmp_path / "out"), load_file(moe_folder / "model.safetensors")
    kept = {name.removeprefix("base_model.model."): t for name, t in saved.items() if "lora_" not in name}
    assert set(kept) == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
    }
    for name, tensor in kept.items():
        stored = base.get(name, base.get(name.replace("mlp.gate", "block_sparse_moe.gate")))
        assert stored is not None, name
        assert tensor.dtype == torch.float32, name  # bf16 would round small updates away
        assert not torch.equal(tensor, stored.bfloat16().float()), name
    again = {"lora_model_dir": str(tmp_path / "out"), "output_dir": str(tmp_path / "again")}
    going_on = losses(settings, bf16=True, **again)
    assert going_on[0] < losses(settings, output_dir=str(tmp_path / "new"), **changes)[0] - 0.1


def test_going_on_with_a_saved_adapter(
    trained: tuple[RunResult, str], settings: Settings, tmp_path: Path
) -> None:
    result, _ = trained
    changes = {"lora_model_dir": result.adapter, "learning_rate": 1e-8}
    continued = run(TrainConfig(**settings(**SHORT, **changes)), quiet())
    assert sorted(continued.adapters["target_parameters"]) == sorted(result.adapters["target_parameters"])
    assert continued.after is not None
    assert result.after is not None
    assert continued.after.mean == pytest.approx(result.after.mean, abs=1e-4)
    assert continued.before is not None  # what it begins with: that adapter, not the base model
    assert continued.before.mean == pytest.approx(result.after.mean, abs=1e-4)
    assert continued.sample["before"] == result.sample["after"]
    before = adapter(result.adapter)
    for name, tensor in adapter(tmp_path / "out").items():
        assert torch.allclose(tensor, before[name], atol=1e-6), name


def test_a_saved_adapter_that_does_not_fit_is_found_before_loading(
    trained: tuple[RunResult, str],
    settings: Settings,
    dense_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result, _ = trained
    monkeypatch.setattr(run_module, "load", lambda *args: pytest.fail("weights were read"))
    saved = {"lora_model_dir": result.adapter}
    with pytest.raises(ConfigurationError, match=r"lora_r \(8 there\), peft_use_rslora \(False there\)"):
        run(TrainConfig(**settings(**saved, lora_r=4, peft_use_rslora=True)), quiet())
    with pytest.raises(ConfigurationError, match="lora_target_modules"):
        run(TrainConfig(**settings(**saved, lora_target_modules=["gate"])), quiet())
    dense = {"base_model": str(dense_folder), "lora_target_parameters": None}
    with pytest.raises(AdapterError, match=r"lora_\*: PEFT cannot put|belongs to another"):
        run(TrainConfig(**settings(**saved, **dense)), quiet())
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    (narrow / "adapter_config.json").write_bytes((Path(result.adapter) / "adapter_config.json").read_bytes())
    from safetensors.torch import save_file

    tensors = adapter(result.adapter)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :32].contiguous()}, narrow / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"q_proj.lora_A.weight is \[8, 32\] there and \[8, 64\] on this"):
        run(TrainConfig(**settings(lora_model_dir=str(narrow))), quiet())


def test_lora_plus_groups_the_factors(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**settings(**SHORT, loraplus_lr_ratio=16, weight_decay=0.1, optimizer="adamw_torch"))
    seen: dict[str, Any] = {}

    def look(trainer: Any, checkpoint: Any, *rest: Any) -> None:
        optimizer = trainer.create_optimizer()
        named = {id(p): name for name, p in trainer.model.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                seen[named[id(p)]] = (group["lr"], group["weight_decay"])
        raise TrainingError("far enough")

    monkeypatch.setattr(run_module, "train", look)
    with pytest.raises(TrainingError, match="far enough"):
        run(config, quiet())
    monkeypatch.undo()
    for name, (rate, decay) in seen.items():
        assert rate == pytest.approx(0.02 * (16 if "lora_B" in name else 1)), name
        assert decay == 0.1
    assert any("experts" in name and "lora_B" in name for name in seen)
    plain = losses(settings)
    assert losses(settings, loraplus_lr_ratio=1) == pytest.approx(plain, abs=1e-6)
    assert losses(settings, loraplus_lr_ratio=16)[-1] != pytest.approx(plain[-1], abs=1e-3)


def test_the_balancing_term_is_part_of_the_loss_and_reaches_a_trained_router(
    settings: Settings, tmp_path: Path
) -> None:
    plain, weighted = losses(settings), losses(settings, router_aux_loss_coef=0.5)
    # Two experts of four a token, evenly: 2 is the least the term can be (top-k times a share of 1).
    assert weighted[0] - plain[0] == pytest.approx(0.5 * 2.0, abs=0.2)
    trained = {"lora_modules_to_save": ["mlp.gate"], "learning_rate": 1e-3}
    moved = []
    for coefficient in (0.0, 100.0):
        out = str(tmp_path / f"with-{coefficient}")
        losses(settings, router_aux_loss_coef=coefficient, output_dir=out, **trained)
        moved.append(adapter(out)["base_model.model.model.layers.0.mlp.gate.weight"])
    assert not torch.allclose(moved[0], moved[1], atol=1e-4)


def test_merged_after_the_run(settings: Settings, tmp_path: Path) -> None:
    result = run(TrainConfig(**settings(**SHORT, merge_lora=True)), quiet())
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert merged
    assert "merging" in result.seconds
    assert result.merged == str(tmp_path / "out" / "merged")
    console = quiet()
    show(result, console)
    assert "merged" in console.file.getvalue()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["merged"], "merging" in report["seconds"]) == (result.merged, True)
    by_hand = fourfold.merge(result.config["base_model"], tmp_path / "out", tmp_path / "by-hand")
    for name, tensor in load_file(Path(by_hand.folder) / "model.safetensors").items():
        assert torch.equal(merged[name], tensor), name


def test_uploaded_as_the_trainer_does(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    calls: list[str] = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(run_module.MoeTrainer, "init_hf_repo", lambda self, *a, **k: calls.append("made"))
    monkeypatch.setattr(run_module.MoeTrainer, "push_to_hub", lambda self, *a, **k: calls.append("pushed"))
    config = TrainConfig(**settings(**SHORT, hub_model_id="me/adapter", hub_strategy="end"))
    arguments = trainer_arguments(config, bf16=False, use_cpu=True, examples=48)
    assert (arguments.push_to_hub, arguments.hub_model_id, arguments.hub_private_repo) == (
        True,
        "me/adapter",
        True,
    )
    assert arguments.hub_strategy == "end"
    run(config, quiet())
    assert calls == ["made", "pushed"]
    plain = trainer_arguments(TrainConfig(**settings()), bf16=False, use_cpu=True, examples=48)
    assert not plain.push_to_hub


def test_arguments_of_the_trainer(settings: Settings) -> None:
    def of(**changes: Any) -> Any:
        config = TrainConfig(**settings(**changes))
        return trainer_arguments(config, bf16=False, use_cpu=True, examples=48)

    assert of(neftune_noise_alpha=5).neftune_noise_alpha == 5
    assert of().neftune_noise_alpha is None
    compiled = of(torch_compile=True, torch_compile_backend="eager", torch_compile_mode="default")
    assert (compiled.torch_compile, compiled.torch_compile_backend, compiled.torch_compile_mode) == (
        True,
        "eager",
        "default",
    )
    assert not of(torch_compile="auto").torch_compile  # on a CPU
    named = of(use_trackio=True, trackio_project_name="mine", trackio_run_name="first")
    assert (named.report_to, named.project, named.run_name) == (["trackio"], "mine", "first")
    curve = of(cosine_min_lr_ratio=0.1)
    assert (curve.lr_scheduler_type, curve.lr_scheduler_kwargs) == (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
    )
    assert of(fp16=True).fp16
    restarts = of(lr_scheduler="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2.0})
    assert restarts.lr_scheduler_kwargs == {"num_cycles": 2}


def test_compiled_and_noisy_runs(settings: Settings) -> None:
    plain = losses(settings)
    assert losses(settings, torch_compile=True, torch_compile_backend="eager") == pytest.approx(
        plain, abs=1e-5
    )
    noisy = losses(settings, neftune_noise_alpha=5)
    assert noisy[0] != pytest.approx(plain[0], abs=1e-4)
    assert noisy == losses(settings, neftune_noise_alpha=5)


def test_each_schedule_takes_the_settings_of_the_table(settings: Settings) -> None:
    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(SETTINGS) == set(get_args(Scheduler))
    for name, known in SETTINGS.items():
        taken = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters) - common
        assert set(known) <= taken, name
        assert taken - set(known) <= {"num_cycles", "min_lr", "power", "lr_end"} or not taken, name
    names = {name.value for name in TYPE_TO_SCHEDULER_FUNCTION}
    assert names <= {*get_args(Scheduler), *NOT_YET_SCHEDULERS}
    stable = {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}}
    assert len(losses(settings, **stable)) == 3


def test_every_optimizer_of_transformers_is_taken_or_refused_by_name() -> None:
    assert {name.value for name in OptimizerNames} <= {*get_args(Optimizer), *NOT_YET_OPTIMIZERS}
    assert set(preflight.BNB_OPTIMIZERS) <= set(get_args(Optimizer))


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad", "adafactor"])
def test_further_optimizers_train(settings: Settings, optimizer: str) -> None:
    assert losses(settings, optimizer=optimizer)[-1] < 3.4


@pytest.mark.parametrize(
    ("evaluations", "stops"),
    [([3.0, 2.0, 1.0], False), ([3.0, 2.0, 2.0], False), ([3.0, 2.0, 2.5, 2.1], True), ([1.0], False)],
)
def test_no_lower_loss_for_so_many_evaluations_ends_the_run(evaluations: list[float], stops: bool) -> None:
    state = SimpleNamespace(log_history=[{"loss": 1.0}, *({"eval_loss": loss} for loss in evaluations)])
    control = SimpleNamespace(should_training_stop=False)
    EarlyStop(2).on_epoch_end(None, state, control)  # type: ignore[arg-type]
    assert control.should_training_stop is stops


def test_a_run_that_is_stopped_early_is_saved_and_evaluated(settings: Settings, tmp_path: Path) -> None:
    # At such a rate the held-out loss rises at once.
    changes = {"eval_steps": 1, "learning_rate": 3.0, "lr_scheduler": "constant", "warmup_steps": 0}
    result = run(TrainConfig(**settings(early_stopping_patience=2, **changes)), quiet())
    assert result.steps < 12
    assert result.after is not None
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_scaler_of_fp16_may_skip_steps_and_no_more() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    model, state = torch.nn.ParameterList([parameter]), SimpleNamespace(global_step=4)
    watch = FiniteGradients(lambda: " on training example 7", tolerated=2)

    def step(gradient: float) -> None:
        parameter.grad = torch.tensor([gradient])
        watch.on_pre_optimizer_step(None, state, None, model=model)  # type: ignore[arg-type]

    for gradient in (torch.inf, torch.inf, 1.0, torch.nan, torch.inf):
        step(gradient)
    with pytest.raises(TrainingError, match="step 5 is not finite; the step was not taken on training ex"):
        step(torch.inf)


def test_fp16_is_what_the_model_is_loaded_in(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(name: str, **kwargs: Any) -> Any:
        seen.update(kwargs)
        raise RuntimeError("far enough")

    monkeypatch.setattr(preflight, "check_device", lambda config: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(RuntimeError, match="far enough"):
        run(TrainConfig(**settings(fp16=True, bf16="auto")), quiet())
    assert seen["dtype"] == torch.float16
    assert "trust_remote_code" not in seen


def test_code_of_a_repository_runs_only_where_it_is_trusted(
    settings: Settings, moe_folder: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "custom"
    shutil.copytree(moe_folder, folder)
    (folder / "custom.py").write_text(
        "import os\n"
        "from transformers import MixtralConfig, MixtralForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class CustomConfig(MixtralConfig):\n    model_type = 'custom_kind'\n"
        "class CustomModel(MixtralForCausalLM):\n    config_class = CustomConfig\n"
    )
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"model_type": "custom_kind", "architectures": ["CustomModel"]}
    stored["auto_map"] = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    (folder / "config.json").write_text(json.dumps(stored))
    base = {"base_model": str(folder), "lora_target_parameters": None}
    with pytest.raises(fourfold.errors.FourfoldError) as caught:
        check(TrainConfig(**settings(**base)))
    assert caught.value.exit_status == 2
    assert not (tmp_path / "ran").exists()
    check(TrainConfig(**settings(**base, trust_remote_code=True)))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("template", "model_type", "own"),
    [
        ("qwen3_5", "qwen3_5_moe", True),
        ("qwen3", "qwen3_5_moe", False),
        ("qwen3_5", "qwen3_moe", False),
        ("gemma4", "gemma4", True),
        ("gemma", "gemma4", False),
        ("llama3", "llama", True),
        ("llama3", "llama4", False),
        ("mistral_v7_tekken", "mistral4", True),
        ("qwen_25", "qwen2_moe", True),
        ("deepseek_v3", "deepseek_v2", False),
        ("alpaca", "mixtral", False),
    ],
)
def test_names_of_families(template: str, model_type: str, own: bool) -> None:
    assert template in FAMILIES
    assert is_of_family(template, model_type) is own


def test_the_familys_name_is_the_tokenizers_own_template(
    settings: Settings, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny.qwen3_moe(vocab_size=32).save_pretrained(folder)  # no weights at all
    tokenizer.save_pretrained(folder)
    own = {"base_model": str(folder), "lora_target_parameters": None}
    found = check(TrainConfig(**settings(**own, chat_template="qwen3"))).tokenizer.chat_template
    assert found == tokenizer.chat_template
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match=r"qwen3 is the family of .* brings no template"):
        check(TrainConfig(**settings(**own, chat_template="qwen3")))
