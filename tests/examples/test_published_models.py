"""The examples for published models: each is valid, names targets that the model has, and trains a tiny model
of the same architecture from files like the published ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

import fourfold
import published
from fourfold.adapters.peft_lora import check_targets
from fourfold.cli import main
from fourfold.loading.skeleton import build_skeleton
from fourfold.training.read_config import load_config
from fourfold.training.targets import resolve
from tiny_chat import conversation, write_jsonl

NAMES = published.names()
# What a test changes of a file: the model and the data, and how long it takes.
SHORT = {
    "val_set_size": 4,
    "sequence_len": 128,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "warmup_ratio": None,
    "warmup_steps": 0,
    "evals_per_epoch": None,
    "eval_steps": 0,
    "saves_per_epoch": None,
    "save_steps": 0,
    "save_total_limit": None,
    "optimizer": "adamw_torch",  # (bitsandbytes' needs a GPU)
}


def example(name: str) -> Path:
    return published.EXAMPLES / f"{name}.yaml"


def settings(name: str) -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load(example(name).read_text())
    return result


def on_meta(config: PretrainedConfig) -> Any:
    """The model that is trained, without weights: of a model with images maybe the text alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_there_is_an_example_for_each_published_configuration() -> None:
    assert len(NAMES) == 12
    assert sorted(path.parent.name for path in published.CONFIGS.glob("*/config.json")) == NAMES
    assert sorted(published.PARAMETERS) == sorted(published.EXPERT_KEYS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_says_everything(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(example(name)), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["given_differently"] == result["not_yet"] == result["remarks"] == []
    text = example(name).read_text()
    assert settings(name)["output_dir"] == f"outputs/{name}"
    for command in ("validate", "train"):
        assert f"#   fourfold {command} examples/{name}.yaml\n" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_is_the_published_models(name: str) -> None:
    """Its number of parameters is that of the model's card."""
    whole = build_skeleton(published.CONFIGS / name)
    count = sum(parameter.numel() for parameter in whole.parameters()) / 1e9
    assert count == pytest.approx(published.PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_targets_that_the_published_model_has(name: str) -> None:
    model, values = on_meta(published.published_config(name)), settings(name)
    check_targets(model, values["lora_target_modules"], values["lora_target_parameters"])
    assert values["lora_target_parameters"] == fourfold.expert_targets(model)


def wrapped(model: Any, values: dict[str, Any]) -> set[str]:
    """Where an adapter of these targets has factors: modules, and experts modules once for each parameter."""
    modules, parameters = values["lora_target_modules"], values["lora_target_parameters"]
    suffixes = tuple(modules) if isinstance(modules, list) else tuple(resolve(model, modules))
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".{name}".endswith(f".{s}") for s in suffixes)
    }
    for name, _ in model.named_parameters():
        if any(f".{name}".endswith(f".{target}") for target in parameters):
            owner = name.rpartition(".")[0]
            found.add(f"{owner}.base_layer" if owner in found else owner)
    return found


def train(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The report of two steps through the command line, with the example's own settings but `SHORT`."""
    data = write_jsonl(tmp_path / "data.jsonl", [conversation(index) for index in range(36)])
    changes = {
        "base_model": str(folder),
        "datasets": [{"path": str(data)}],
        "output_dir": str(tmp_path / "out"),
        **SHORT,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    status = main(["train", str(example(name)), *overrides, "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    result: dict[str, Any] = json.loads(captured.out)
    return result


def check_run(name: str, report: dict[str, Any]) -> None:
    """Experts were packed, and every factor of the named targets, and of no other, was trained and saved."""
    model, values = on_meta(published.tiny_config(name)), settings(name)
    assert report["steps"] == 2
    assert report["model"]["unquantized"] == report["model"]["left_on_request"] == []
    assert {entry["format"] for entry in report["model"]["experts"]} == {"NF4 /64 double-quantized"}
    held = {row["dtype"] for row in report["model"]["rows"] if row["role"] == "experts"}
    assert held == {"NF4 /64 double-quantized"}

    adapter = load_file(Path(report["adapter"]) / "adapter_model.safetensors")
    places = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key) for key in adapter}
    assert places == wrapped(model, values)
    assert len(adapter) == 2 * len(places)
    ranks = values.get("lora_rank_pattern") or {}
    for key, factor in adapter.items():
        assert factor.isfinite().all(), key
        assert factor.any(), f"{key} is zero: it got no gradient"
    for target in values["lora_target_parameters"]:
        owner, _, parameter = target.rpartition(".")
        first = target == values["lora_target_parameters"][0]
        suffix = f"{owner}.base_layer.lora_A.weight" if first else f"{owner}.lora_A.weight"
        rank = ranks.get(f"experts.{parameter}", values["lora_r"])
        rows = {factor.shape[0] for key, factor in adapter.items() if key.endswith(suffix)}
        assert rows == {4 * rank}, f"{target}: 4 experts of rank {rank}"
    saved = json.loads((Path(report["adapter"]) / "adapter_config.json").read_text())
    assert sorted(saved["target_parameters"]) == sorted(values["lora_target_parameters"])


def follow_the_head(
    name: str, folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other commands that the file's head names, with the tiny model in place of the published one."""
    places = {str(settings(name)["base_model"]): str(folder), f"outputs/{name}": str(adapter)}
    places |= {f"{kind}/{name}": str(tmp_path / kind) for kind in ("merged", "served", "packed")}
    lines = re.findall(
        r"^#   fourfold ((?:quantize|generate|merge|export) .*)$", example(name).read_text(), re.MULTILINE
    )
    verbs = {line.split()[0] for line in lines}
    assert verbs >= {"generate"}
    assert verbs & {"merge", "export"}
    for line in lines:
        arguments = shlex.split(line.split("      ")[0])
        if arguments[0] == "generate":
            arguments += ["--max-new-tokens", "2"]
        status = main([places.get(argument, argument) for argument in arguments])
        assert status == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_a_tiny_model_from_files_like_the_published_ones(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published.write_checkpoint(name, tmp_path)
    keys = published.keys_of(folder)
    assert published.EXPERT_KEYS[name] in {re.sub(r"\.layers\.\d+\.", ".layers.N.", key) for key in keys}
    if name in published.EXTRA_LAYERS:
        assert any(key.startswith(published.EXTRA_LAYERS[name][1]) for key in keys)
    report = train(name, folder, tmp_path, capsys)
    check_run(name, report)
    follow_the_head(name, folder, Path(report["adapter"]), tmp_path, capsys)


def test_a_release_in_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "qwen3-30b-a3b"
    folder = published.write_checkpoint(name, tmp_path, fp8=True)
    assert "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv" in published.keys_of(folder)
    assert published.settings_of(folder)["quantization_config"]["quant_method"] == "fp8"
    check_run(name, train(name, folder, tmp_path, capsys))


def test_a_wrong_target_is_noticed() -> None:
    """The checks above see an adapter that lacks a target or has one more."""
    model, values = on_meta(published.tiny_config("olmoe-1b-7b")), settings("olmoe-1b-7b")
    places = wrapped(model, values)
    assert len(places) == 2 * (4 + 2)
    fewer = values | {"lora_target_parameters": values["lora_target_parameters"][:1]}
    assert len(wrapped(model, fewer)) == 2 * (4 + 1)


def test_no_example_reads_code_from_the_hub() -> None:
    for name in NAMES:
        assert "trust_remote_code" not in settings(name)
        assert load_config(example(name)).quantized
