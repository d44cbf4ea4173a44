"""Keys beyond the first ones, in runs of the tiny model: what each changes is measured, not assumed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourfold.errors import AdapterError, ConfigurationError, FourfoldError
from fourfold.training import run as run_module
from fourfold.training.preflight import check
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult, show
from fourfold.training.trainer import interval, trainer_arguments
from tiny_chat import CHAT_TEMPLATE, Settings, conversation, quiet, write_jsonl

SHORT: dict[str, Any] = {"max_steps": 2, "eval_steps": 0}


def config_of(settings: Settings, **changes: Any) -> TrainConfig:
    return TrainConfig(**settings(**{**SHORT, **changes}))


def adapter_of(result: RunResult) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = Path(result.adapter)
    return load_file(folder / "adapter_model.safetensors"), json.loads(
        (folder / "adapter_config.json").read_text()
    )


def ranks(tensors: dict[str, torch.Tensor], part: str) -> set[int]:
    return {tensor.shape[0] for name, tensor in tensors.items() if part in name and "lora_A" in name}


def test_ranks_alphas_and_exclusions(settings: Settings) -> None:
    config = config_of(
        settings,
        lora_r=4,
        lora_target_modules=r".*self_attn\.(q|k|v)_proj",
        lora_exclude_modules=["k_proj"],
        lora_rank_pattern={"q_proj": 2, "down_proj": 3},
        lora_alpha_pattern={r"layers\.0\.self_attn\.v_proj": 5},
        peft_use_rslora=True,
    )
    console = quiet()
    result = run(config, console)
    show(result, console)
    tensors, written = adapter_of(result)
    assert ranks(tensors, "q_proj") == {2}
    assert ranks(tensors, "v_proj") == {4}
    assert not any("k_proj" in name or "o_proj" in name for name in tensors)
    # 4 experts: gate_up keeps rank 4, down takes 3 (its factors are the outer ones).
    assert ranks(tensors, "experts.base_layer") == {4 * 4}
    assert ranks(tensors, "experts.lora_A") == {4 * 3}
    assert (written["use_rslora"], written["alpha_pattern"]) == (True, {r"layers\.0\.self_attn\.v_proj": 5})
    assert r".*self_attn\.(q|k|v)_proj" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rslora_scales_by_the_root_of_the_rank(settings: Settings) -> None:
    scalings = []
    for changes in ({}, {"peft_use_rslora": True}):
        config = config_of(settings, lora_r=4, lora_alpha=16, **changes)
        checked = check(config)
        model, _ = run_module.load(config, checked)
        model = run_module.with_adapters(model, config, checked)
        found = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
        scalings.append({scaling["default"] for scaling in found})
    assert scalings == [{16 / 4}, {16 / math.sqrt(4)}]


def test_all_linears_and_dropout(settings: Settings) -> None:
    config = config_of(settings, lora_target_linear=True, lora_target_parameters=[], lora_dropout=0.5)
    tensors, written = adapter_of(run(config, quiet()))
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert written["lora_dropout"] == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lora_exclude_modules": ["gate"]},
            "lora_exclude_modules: gate is no target anyway. Targets are",
        ),
        ({"lora_rank_pattern": {"q_porj": 2}}, "lora_rank_pattern: q_porj matches no target"),
        ({"lora_alpha_pattern": {"lm_head": 2}}, "lora_alpha_pattern: lm_head matches no target"),
        ({"lora_target_modules": "self_attn"}, "matches no module"),
        ({"special_tokens": {"pad_token": "<none>"}}, "special_tokens.pad_token: '<none>' is not in the voc"),
        ({"chat_template": "chatml"}, r"chat_template: chatml is written with <|im_start|>"),
        (
            {"chat_template": "jinja", "chat_template_jinja": "none.jinja"},
            "chat_template_jinja: there is no file none.jinja",
        ),
        (
            {"chat_template": "jinja", "chat_template_jinja": "{% for m in messages %}\n{{ m. }}"},
            "chat_template_jinja: the text given, line 2: expected name or number",
        ),
        ({"optimizer": "adamw_torch_4bit"}, "optimizer: adamw_torch_4bit needs the package torchao"),
        ({"use_wandb": True}, "use_wandb: wandb needs the package wandb, which is not installed"),
    ],
)
def test_what_meets_nothing_is_refused_before_loading(
    settings: Settings, changes: dict[str, Any], said: str
) -> None:
    if "needs the package" in said and __import__("importlib").util.find_spec(said.split()[5].rstrip(",")):
        pytest.skip("installed here")
    with pytest.raises(FourfoldError) as caught:
        check(config_of(settings, **changes))
    assert isinstance(caught.value, (ConfigurationError, AdapterError))
    assert said in str(caught.value)


def test_flash_attention_needs_a_gpu(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigurationError, match="flash_attention_2 needs a GPU"):
        check(config_of(settings, flash_attention=True))


def test_the_attention_asked_for_is_the_one_used(settings: Settings) -> None:
    for changes, name in (({"eager_attention": True}, "eager"), ({"attn_implementation": "sdpa"}, "sdpa")):
        config = config_of(settings, **changes)
        model, _ = run_module.load(config, check(config))
        assert model.config._attn_implementation == name


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32(settings: Settings, wanted: bool) -> None:
    before = torch.backends.fp32_precision
    named = "tf32" if wanted else "ieee"
    for setting, after in ((wanted, named), ("auto", before), (wanted, named)):
        torch.backends.fp32_precision = before
        config = config_of(settings, tf32=setting)
        run_module.load(config, check(config))
        assert torch.backends.fp32_precision == after


def test_reentrant_checkpointing_gives_the_same_losses(settings: Settings) -> None:
    curves = [
        run(config_of(settings, **changes), quiet()).curve.train
        for changes in (
            {},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": "offload", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        )
    ]
    for curve in curves[1:]:
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in curves[0]], abs=1e-6)


def test_arguments_of_optimizer_and_schedule(settings: Settings) -> None:
    given = {
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,
        "max_grad_norm": 0.3,
        "save_total_limit": 2,
    }
    config = config_of(settings, warmup_steps=None, warmup_ratio=0.5, **given)
    arguments = trainer_arguments(config, bf16=False, use_cpu=True, examples=48)
    assert {key: getattr(arguments, key) for key in given} == given
    assert arguments.get_warmup_steps(10) == 5
    plain = trainer_arguments(config_of(settings), bf16=False, use_cpu=True, examples=48)
    assert (plain.adam_beta1, plain.adam_beta2, plain.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (plain.max_grad_norm, plain.weight_decay) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        ({}, None),
        ({"save_steps": 0.25}, 0.25),
        ({"saves_per_epoch": 1}, 6),
        ({"saves_per_epoch": 4}, 2),  # of 6 steps
        ({"saves_per_epoch": 100}, 1),
        ({"saves_per_epoch": 0}, 0),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": False}, 0),  # YAML's reading of an unquoted no
        ({"save_strategy": "epoch"}, None),
    ],
)
def test_how_often(settings: Settings, changes: dict[str, Any], every: float | None) -> None:
    config = config_of(settings, save_steps=None)
    config = TrainConfig(**{**config.model_dump(), **changes})
    assert interval(config, "save", 46) == every  # 5.75 batches of 8


def test_evaluations_checkpoints_and_how_many_are_kept(settings: Settings) -> None:
    changes = {"eval_steps": None, "save_steps": None, "max_steps": None, "num_epochs": 2, "warmup_steps": 1}
    config = config_of(settings, **changes, evals_per_epoch=3, saves_per_epoch=2, save_total_limit=2)
    result = run(config, quiet())
    assert [step for step, _ in result.curve.held_out] == [0, 2, 4, 6, 8, 10, 12]
    assert {path.name for path in Path(result.adapter).glob("checkpoint-*")} == {
        "checkpoint-9",
        "checkpoint-12",
    }


def test_a_run_that_goes_on_by_itself(settings: Settings) -> None:
    first = run(config_of(settings, save_steps=1, auto_resume_from_checkpoints=True), quiet())
    assert [step for step, _ in first.curve.train] == [1, 2]
    again = config_of(settings, max_steps=3, save_steps=1, auto_resume_from_checkpoints=True)
    second = run(again, quiet())
    assert [step for step, _ in second.curve.train] == [1, 2, 3]  # the curve of the whole run
    assert [row["step"] for row in second.journal["series"]] == [1, 2, 3]
    assert second.journal["resumed_at"] == [2]
    other = {**again.model_dump(), "weight_decay": 0.1, "max_steps": 4}
    with pytest.raises(ConfigurationError, match=r"weight_decay \(0.0 there\)"):
        check(TrainConfig(**other))


def test_templates_and_tokens(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(CHAT_TEMPLATE.replace("m['role']", "'user' if m['role'] == 'system' else m['role']"))
    given = {"chat_template": "jinja", "chat_template_jinja": str(path)}
    assert check(config_of(settings, **given)).tokenizer.chat_template == path.read_text()
    path.write_text("{% for m in messages %}\n{% endfor")
    with pytest.raises(ConfigurationError, match=f"chat_template_jinja: {path}, line 2: "):
        check(config_of(settings, **given))
    path.write_bytes(b"\xff\xfe{{")
    with pytest.raises(ConfigurationError, match=f"{path} cannot be read as text"):
        check(config_of(settings, **given))
    given["chat_template_jinja"] = CHAT_TEMPLATE
    assert check(config_of(settings, **given)).tokenizer.chat_template == CHAT_TEMPLATE
    own = check(config_of(settings, chat_template="tokenizer_default_fallback_chatml")).tokenizer
    assert own.chat_template == CHAT_TEMPLATE
    tokenizer = check(config_of(settings, special_tokens={"pad_token": "<unk>"})).tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 1)


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name that notes what it is told."""
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    log = tmp_path / "log.jsonl"
    (package / "__init__.py").write_text(
        f"""
import json, os
__version__ = "0.99.0"
def note(*what):
    with open({str(log)!r}, "a") as file:
        file.write(json.dumps(what, default=str) + chr(10))
class Config(dict):
    def update(self, *args, **kwargs): pass
class Run:
    def __getattr__(self, name): return lambda *a, **k: None
    _label = lambda self, **k: None
    summary = {{}}
run, config = None, Config()
def init(**kwargs):
    global run
    run = Run()
    note("init", kwargs, {{k: v for k, v in os.environ.items() if k.startswith("WANDB")}})
    return run
def log(values, *args, **kwargs): note("log", values)
def define_metric(*args, **kwargs): pass
def watch(*args, **kwargs): note("watch", kwargs)
def finish(*args, **kwargs): pass
"""
    )
    (package / "sdk" / "lib").mkdir(parents=True)
    for folder in (package / "sdk", package / "sdk" / "lib"):
        (folder / "__init__.py").touch()
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass")
    dist = tmp_path / "site" / "wandb-0.99.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.99.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    kept = dict(os.environ)
    yield log
    os.environ.clear()
    os.environ.update(kept)
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_losses_reach_the_tracker(settings: Settings, fake_wandb: Path) -> None:
    config = config_of(
        settings,
        eval_steps=1,
        wandb_project="p",
        wandb_entity="e",
        wandb_name="n",
        wandb_mode="offline",
        wandb_run_id="i",
    )
    result = run(config, quiet())
    rows = [json.loads(line) for line in fake_wandb.read_text().splitlines()]
    [(_, kwargs, environment)] = [row for row in rows if row[0] == "init"]
    assert kwargs["project"] == "p"
    assert kwargs["name"] == "n"
    assert environment["WANDB_ENTITY"] == "e"
    assert environment["WANDB_MODE"] == "offline"
    assert (environment["WANDB_RUN_ID"], environment["WANDB_RESUME"]) == ("i", "allow")
    logged = [row[1] for row in rows if row[0] == "log"]
    losses = [values["train/loss"] for values in logged if "train/loss" in values]
    assert losses == pytest.approx([loss for _, loss in result.curve.train], abs=1e-4)
    assert [step for step, _ in result.curve.train] == [1, 2]  # no evaluation swallowed one
    held_out = [values["eval/loss"] for values in logged if "eval/loss" in values]
    assert held_out == pytest.approx([loss for _, loss in result.curve.held_out[1:]], abs=1e-6)


def test_words_and_fields_of_other_files(settings: Settings, tmp_path: Path) -> None:
    words = {"user": "human", "assistant": "gpt"}
    records = [
        {
            "conversations": [
                {"from": words[turn["role"]], "value": turn["content"]}
                for turn in conversation(index)["messages"]
            ]
        }
        for index in range(48)
    ]
    path = write_jsonl(tmp_path / "sharegpt.jsonl", records)
    entry = {
        "path": str(path),
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    }
    plain = check(config_of(settings)).train
    assert check(config_of(settings, datasets=[entry])).train.digest == plain.digest
    # The same from a table of another kind, half of it.
    import datasets

    table = tmp_path / "t.parquet"
    datasets.Dataset.from_list(records).to_parquet(str(table))
    entry |= {"path": str(table), "split": "train[:50%]"}
    half = check(config_of(settings, datasets=[entry])).train
    assert len(half.dataset) == 24
    assert half.dataset[3] == plain.dataset[3]
    folder = {**entry, "path": str(tmp_path), "data_files": "sharegpt.jsonl", "split": "train"}
    assert check(config_of(settings, datasets=[folder])).train.digest == plain.digest
