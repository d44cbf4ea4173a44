"""What is checked before loading is the class that loading makes, also of models with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import published
from fourfold.cli import main
from fourfold.errors import CheckpointError
from fourfold.loading.skeleton import build_skeleton, language_class, load_language_model, model_class
from fourfold.planning.conformance.tiny_models import build, randomise_experts_, shrink
from fourfold.planning.plan import Planner, Settings
from fourfold.planning.report import make_report
from fourfold.training.generation import load_model
from fourfold.training.isolation import narrow_model
from fourfold.training.preflight import make_quantization_config, make_skeleton
from fourfold.training.schema import TrainConfig
from tiny_chat import conversation, write_jsonl

Values = dict[str, Any]
QWEN = "qwen3.5-35b-a3b"


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with images whose text alone no class loads: Mistral 3 around the experts of Mistral 4."""
    parts = {"text_config": {"model_type": "mistral4"}, "vision_config": {"model_type": "pixtral"}}
    config = transformers.AutoConfig.for_model("mistral3", **parts)
    tiny = type(config).from_dict(published._whole_blocks(shrink(config.to_dict())))
    torch.manual_seed(0)
    model = build(tiny, transformers.Mistral3ForConditionalGeneration)
    randomise_experts_(model)
    folder = tmp_path_factory.mktemp("whole") / "model"
    model.save_pretrained(folder)
    published.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with images whose text alone is loaded."""
    return published.write_checkpoint(QWEN, tmp_path_factory.mktemp("text"))


def values(folder: Path, tmp_path: Path, **changes: Any) -> Values:
    data = write_jsonl(tmp_path / "data.jsonl", [conversation(index) for index in range(20)])
    return {
        "base_model": str(folder),
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_target_parameters": "all",
        "datasets": [{"path": str(data)}],
        "val_set_size": 4,
        "sequence_len": 128,
        "micro_batch_size": 8,
        "max_steps": 2,
        "warmup_steps": 0,
        "bf16": False,
        "output_dir": str(tmp_path / "out"),
        **changes,
    }


def tensors(model: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", published.names())
def test_the_skeleton_of_each_published_model_is_what_is_loaded(name: str) -> None:
    config = published.published_config(name)
    with torch.device("meta"):
        loaded = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    skeleton = build_skeleton(config, causal=True)
    assert type(skeleton) is type(loaded)
    assert tensors(skeleton) == tensors(loaded)


@pytest.mark.parametrize("kind", ["whole_model", "text_model"])
def test_the_skeleton_checked_has_the_names_of_the_loaded_model(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    config = TrainConfig(**values(folder, tmp_path))
    skeleton = make_skeleton(config, make_quantization_config(config))
    loaded = load_model(str(folder), 4, torch.bfloat16)
    assert type(skeleton).__mro__[1:] == type(loaded).__mro__[1:]
    names = {"whole_model": "model.language_model.layers.1.mlp", "text_model": "model.layers.1.mlp"}
    assert f"{names[kind]}.experts.gate_up_proj" in tensors(loaded)
    # (a bitsandbytes Linear has its own shape on the skeleton, and that of its bytes when it is loaded)
    assert tensors(skeleton).keys() == tensors(loaded).keys()
    assert {k: v for k, v in tensors(skeleton).items() if "experts" in k and "shared" not in k} == {
        k: v for k, v in tensors(loaded).items() if "experts" in k and "shared" not in k
    }


@pytest.mark.parametrize(
    ("kind", "pattern", "elsewhere"),
    [
        (
            "whole_model",
            r"model\.language_model\.layers\.\d+\.self_attn\.(o|kv_b)_proj",
            r"model\.layers\.\d+\.self_attn\.o_proj",
        ),
        (
            "text_model",
            r"model\.layers\.\d+\.self_attn\.(q|o)_proj",
            r"model\.language_model\.layers\.\d+\.self_attn\.q_proj",
        ),
    ],
)
def test_a_regular_expression_of_targets_is_of_the_loaded_names(
    kind: str,
    pattern: str,
    elsewhere: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names that only the other class has are refused before loading."""
    path = tmp_path / "config.json"  # (JSON is YAML)
    folder = request.getfixturevalue(kind)
    path.write_text(json.dumps(values(folder, tmp_path, lora_target_modules=pattern)), encoding="utf-8")
    assert main(["train", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2
    assert main(["train", str(path), f"lora_target_modules={elsewhere}"]) == 2
    captured = capsys.readouterr()
    assert "lora_target_modules" in captured.err
    assert "loading and packing" not in captured.out
    arguments = ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "2"]
    assert main([*arguments, "--adapter", report["adapter"]]) == 0


def test_packing_is_measured_on_the_class_that_is_loaded(whole_model: Path) -> None:
    config = published.tiny_config(QWEN)
    assert type(narrow_model(config, None)).__name__ == "Qwen3_5MoeForCausalLM"
    whole = transformers.AutoConfig.from_pretrained(whole_model)
    assert type(narrow_model(whole, None)) is transformers.Mistral3ForConditionalGeneration


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_plan_holds_weights_in_the_dtype_that_a_run_loads(bf16: bool, dtype: torch.dtype) -> None:
    """Not in that of the checkpoint."""
    config = published.tiny_config("olmoe-1b-7b")
    config.dtype = torch.float16
    skeleton = Planner(config).skeleton(Settings(bf16=bf16))
    assert {p.dtype for p in skeleton.parameters()} == {dtype}


def test_a_model_that_writes_no_text_is_said(tmp_path: Path) -> None:
    config = transformers.ViTConfig()
    assert language_class(config) is None
    assert model_class(config) is transformers.AutoModel
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a vit, and transformers has no class of that type"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize("name", ["glm-4.5-air", "gpt-oss-20b", QWEN])
def test_a_plan_counts_the_bytes_that_are_loaded(name: str, tmp_path: Path) -> None:
    """Biases of packed Linears too, and tensors that the files hold in fp32: those are loaded in bf16."""
    folder = published.write_checkpoint(name, tmp_path)
    stored = load_file(folder / "model.safetensors")
    for key in stored:
        if key.endswith(("A_log", "linear_attn.norm.weight", "mlp.gate.weight")):
            stored[key] = stored[key].float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(folder), 4, torch.bfloat16)
    settings = TrainConfig(**values(folder, tmp_path))
    planned = Planner(folder).skeleton(Settings(quantization=make_quantization_config(settings)))
    dtypes = [{n: p.dtype for n, p in model.named_parameters()} for model in (planned, loaded)]
    assert dtypes[0] == dtypes[1]
    assert make_report(planned).bytes == make_report(loaded).bytes
