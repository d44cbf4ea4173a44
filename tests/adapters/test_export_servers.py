"""What servers read of exported adapters.

Key lists as vLLM 0.33.0 (`lora_model.py`, `lora_weights.py`) and SGLang 0.5.23 (`lora.py`, `mem_pool.py`)
take them; the tests marked ``servers`` run those modules themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import adapters
import fourfold
import servers
import tiny

# kind -> what vLLM's expert mapping of the model calls the three (two) matrices of an expert: w1, w2, w3
MATRICES = {
    "mixtral": ("w1", "w2", "w3"),
    "qwen3_moe": ("gate_proj", "down_proj", "up_proj"),
    "nemotron_h": ("up_proj", "down_proj"),
    "glm4_moe": ("gate_proj", "down_proj", "up_proj"),
    "deepseek_v3": ("gate_proj", "down_proj", "up_proj"),
}
KINDS = {**tiny.KINDS, "glm4_moe": tiny.glm4_moe, "deepseek_v3": tiny.deepseek_v3}
# vLLM renames these prefixes of checkpoints itself (`hf_to_vllm_mapper` of the model)
PREFIXES = {"nemotron_h": ("backbone.", "model.")}
# (SGLang raises KeyError on a q_proj without a v_proj)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# vLLM and SGLang join the first and the third, and look for these names in the file.
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
KEY = re.compile(
    r"base_model\.model\.(model|backbone)\.layers\.\d+\.(mlp|block_sparse_moe|mixer)\.experts\.(\d+)\."
    r"(gate_proj|up_proj|down_proj|w1|w2|w3)\.lora_[AB]\.weight"
)


def attention(kind: str) -> list[str]:
    return LATENT if kind == "deepseek_v3" else ATTENTION


def export(kind: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    """An adapter of uneven scalings and ranks, exported; what it adds, by PEFT."""
    lora = {"use_rslora": True, "alpha_pattern": {"down_proj": 32}, "rank_pattern": {"o_proj": 2}}
    model = adapters.make(KINDS[kind](), tmp_path, target_modules=attention(kind), **lora)
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    return adapters.deltas(model)


@pytest.mark.parametrize("kind", MATRICES)
def test_key_lists(kind: str, tmp_path: Path) -> None:
    export(kind, tmp_path)
    tensors, config = adapters.read(tmp_path / "out")
    experts: dict[int, set[str]] = {}
    for key in [k for k in tensors if "experts" in k]:
        match = KEY.fullmatch(key)
        assert match is not None
        experts.setdefault(int(match[3]), set()).add(match[4])
    # vLLM: every expert has all of its matrices
    assert experts == {e: set(MATRICES[kind]) for e in range(len(experts))}
    # SGLang: one r for all factors, target_modules a list of names that end the modules' own
    assert {t.shape[0] if "lora_A" in k else t.shape[1] for k, t in tensors.items()} == {config["r"]}
    leaves = {key.split(".")[-3] for key in tensors}
    assert leaves == set(config["target_modules"])
    assert leaves == set(attention(kind)) | set(MATRICES[kind])
    assert config["target_parameters"] is None
    assert not any(config[name] for name in ("use_dora", "lora_bias", "modules_to_save"))


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_names_of_checkpoints_and_back(kind: str, tmp_path: Path) -> None:
    """Every key but LoRA's ending is one of the checkpoint; experts of the dense layer are none."""
    modules = [*attention(kind), "shared_experts.down_proj"]
    model = adapters.make(KINDS[kind](), tmp_path, target_modules=modules)
    theirs = adapters.deltas(model)
    tiny.save(KINDS[kind](), tmp_path / "base")
    stored = {key.removesuffix(".weight") for key in load_file(tmp_path / "base" / "model.safetensors")}
    fourfold.export(tmp_path / "adapter", tmp_path / "out")
    tensors, _ = adapters.read(tmp_path / "out")
    named = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    assert named <= stored
    routed = {name for name in named if ".mlp.experts." in name}
    assert routed == {name for name in stored if ".mlp.experts." in name}
    assert {name.split(".")[2] for name in routed} == {"1"}
    ours = adapters.per_expert_deltas(tmp_path / "out")
    for e in range(len(routed) // 3):
        parts = [ours[f"model.layers.1.mlp.experts.{e}.{n}"] for n in ("gate_proj", "up_proj", "down_proj")]
        up, down = (theirs[f"model.layers.1.mlp.experts.{n}"][e] for n in ("gate_up_proj", "down_proj"))
        assert (torch.cat(parts[:2]) - up).abs().max() <= 1e-6
        assert (parts[2] - down).abs().max() <= 1e-6
    fourfold.export(tmp_path / "out", tmp_path / "back", layout="fused")
    before, after = tmp_path / "adapter", tmp_path / "back"
    assert (before / adapters.WEIGHTS).read_bytes() == (after / adapters.WEIGHTS).read_bytes()
    loaded = PeftModel.from_pretrained(tiny.build(KINDS[kind]()), str(after))
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--servers")
    if given is None:
        pytest.fail("these tests need --servers DIR; tests/helpers/servers.py says how to fill it")
    return Path(given)


@pytest.mark.servers
@pytest.mark.parametrize("kind", MATRICES)
def test_vllm(kind: str, folder: Path, tmp_path: Path) -> None:
    theirs = export(kind, tmp_path)
    first, count = next(iter(theirs.items()))[1], next(iter(theirs.values())).shape[0]
    names = MATRICES[kind]
    with servers.installed("vllm", folder):
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import PackedLoRALayerWeights
        from vllm.lora.peft_helper import PEFTHelper

        helper = PEFTHelper.from_local_dir(str(tmp_path / "out"), None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=16))
        expected = {f"experts.{e}.{n}" for e in range(count) for n in names} | set(attention(kind))
        old, new = PREFIXES.get(kind, ("", ""))
        mapper = SimpleNamespace(_map_name=lambda name: name.replace(old, new, 1) if old else name)
        loaded = LoRAModel.from_local_checkpoint(
            str(tmp_path / "out"), expected, helper, lora_model_id=1, device="cpu", weights_mapper=mapper
        )
        modules = {n.rpartition(".experts.")[0] for n in loaded.loras if ".experts." in n}
        for module in modules:
            triplets = []
            for e in range(count):
                found = [loaded.loras.get(f"{module}.experts.{e}.{n}") for n in names]
                triplets += found if len(found) == 3 else [*found, None]
            packed = PackedLoRALayerWeights.pack_moe(triplets, module, is_non_gated_moe=len(names) == 2)
            w1, w2, w3 = (
                scale * (b @ a)
                for a, b, scale in zip(packed.lora_a, packed.lora_b, packed.scaling, strict=True)
            )
            name = module.replace("block_sparse_moe", "mlp") + ".experts"
            gated = len(names) == 3
            up = theirs[f"{name}.{'gate_up_proj' if gated else 'up_proj'}"]
            assert (torch.cat((w1, w3), dim=1) if gated else w1).sub(up).abs().max() <= 1e-6
            assert (w2 - theirs[f"{name}.down_proj"]).abs().max() <= 1e-6
        assert len(modules) == len(theirs) // 2
    assert first.shape[0] == count


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_sglang(kind: str, folder: Path, tmp_path: Path) -> None:
    theirs = export(kind, tmp_path)
    with servers.installed("sglang", folder):
        import sglang.srt.lora.lora as module
        from sglang.srt.layers.utils.common import get_layer_id
        from sglang.srt.lora.lora import LoRAAdapter
        from sglang.srt.lora.lora_config import LoRAConfig

        module.get_layer_id = get_layer_id
        config = LoRAConfig(path=str(tmp_path / "out"))
        adapter = LoRAAdapter("a", config, SimpleNamespace(num_hidden_layers=2), None, None)
        adapter.initialize_weights_from_tensors(adapters.read(tmp_path / "out")[0])
        r = config.r
        sparse = [i for i in range(2) if f"model.layers.{i}.mlp.experts.down_proj" in theirs]
        assert sparse == ([1] if kind in ("glm4_moe", "deepseek_v3") else [0, 1])
        for layer in sparse:
            weights = adapter.layers[layer].weights
            stacked = [k for k in weights if "gate_up_proj.lora_A" in k]
            count = theirs[f"model.layers.{layer}.mlp.experts.down_proj"].shape[0]
            assert len(stacked) == count
            for key in stacked:
                e = int(re.search(r"experts\.(\d+)\.", key)[1])
                a, b = weights[key], weights[key.replace("lora_A", "lora_B")]
                half = b.shape[0] // 2
                delta = torch.cat((b[:half] @ a[:r], b[half:] @ a[r:])) * adapter.scaling
                up = theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"][e]
                assert (delta - up).abs().max() <= 1e-6
                down = key.replace("gate_up_proj", "down_proj")
                delta = weights[down.replace("lora_A", "lora_B")] @ weights[down] * adapter.scaling
                assert (delta - theirs[f"model.layers.{layer}.mlp.experts.down_proj"][e]).abs().max() <= 1e-6
