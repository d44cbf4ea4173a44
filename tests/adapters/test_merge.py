"""`fourfold.merge`: the written checkpoint is the base plus the adapter, and nothing else is touched."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from tiny import logits

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# (double-quantized: there it shows which matrices were quantized apart)
EXPERTS = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
OTHERS = {"llama4": tiny.llama4, "dbrx": tiny.dbrx, "jetmoe": tiny.jetmoe}


def lora(model, **changes) -> PeftModel:
    arguments = {
        "r": 5,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,
    }
    if "target_parameters" not in changes:
        arguments["target_parameters"] = fourfold.expert_targets(model)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**(arguments | changes)))


def merged_by_stock(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """fp32, in memory, by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_near(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    """Equal as far as fp32 goes, and far from the base: what the adapter does is there."""
    assert (wanted - base).norm() > 0.05 * base.norm()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture(params=tiny.KINDS)
def kind(request, tmp_path: Path) -> Path:
    # (bitsandbytes' 4-bit Linears are wrong on CPUs where a width is no multiple of 64)
    changes = {"moe_shared_expert_intermediate_size": 64} if request.param == "nemotron_h" else {}
    tiny.save(tiny.KINDS[request.param](**changes), tmp_path / "base", max_shard_size="100KB")
    return tmp_path / "base"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.save(tiny.qwen3_moe(), tmp_path / "base")
    return tmp_path / "base"


def packed_adapter(base: Path, out: Path, settings=None, **changes) -> Path:
    lora(tiny.load(base, **(settings or NF4)), **changes).save_pretrained(out)
    return out


def test_merged_into_the_original_it_is_the_adapter_on_the_original(kind: Path, tmp_path: Path) -> None:
    adapter = packed_adapter(kind, tmp_path / "adapter")
    report = fourfold.merge(kind, adapter, tmp_path / "out")
    model = tiny.load(kind)
    plain = logits(model)
    assert_near(
        logits(tiny.load(tmp_path / "out")), logits(PeftModel.from_pretrained(model, str(adapter))), plain
    )
    assert report.planned == len(load_file(adapter / "adapter_model.safetensors")) // 2


def test_dequantized_it_is_the_model_that_was_trained(kind: Path, tmp_path: Path) -> None:
    adapter = packed_adapter(kind, tmp_path / "adapter")
    fourfold.merge(kind, adapter, tmp_path / "out", base_weights="dequantized")
    trained = PeftModel.from_pretrained(fourfold.dequantize(tiny.load(kind, **NF4)), str(adapter))
    assert_near(logits(tiny.load(tmp_path / "out")), logits(trained), logits(tiny.load(kind)))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"experts_quant_type": "fp4", "experts_blocksize": 32},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "experts_quant_type": "int8"},
        {**NF4, "llm_int8_skip_modules": ["layers.0.mlp.experts", "k_proj"]},
    ],
    ids=["int8", "experts alone", "mixed", "skips"],
)
def test_dequantized_weights_are_the_trained_ones_in_every_format(
    base: Path, tmp_path: Path, settings: dict
) -> None:
    adapter = packed_adapter(base, tmp_path / "adapter", settings)
    fourfold.merge(base, adapter, tmp_path / "out", base_weights="dequantized")
    model = fourfold.dequantize(tiny.load(base, **settings))
    wanted = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    found = tiny.load(tmp_path / "out").state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind_of", OTHERS)
@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
def test_undecorated_experts(tmp_path: Path, kind_of: str, base_weights: str) -> None:
    """LoRA of stock PEFT on the unpacked model; `fourfold.json` as a packed one would have it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny.save(OTHERS[kind_of](), base)
    model = tiny.load(base)
    names = [
        name for name, p in model.named_parameters() if "experts" in name or "mlp" in name or "moe" in name
    ]
    targets = [
        n
        for n in names
        if dict(model.named_parameters())[n].ndim == 3 or (kind_of == "dbrx" and "experts.mlp" in n)
    ]
    assert targets
    lora(model, target_modules=[], target_parameters=targets).save_pretrained(adapter)
    packed = tiny.load(base, **EXPERTS)
    from fourfold.adapters import provenance

    provenance.write(packed, adapter)
    fourfold.merge(base, adapter, tmp_path / "out", base_weights=base_weights)
    plain = tiny.load(base) if base_weights == "original" else fourfold.dequantize(packed)
    wanted = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    found = tiny.load(tmp_path / "out").state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


PATTERNS = {
    "rank_pattern": {"layers.0.mlp.experts.down_proj": 3, "layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 31},
}


@pytest.mark.parametrize(
    "changes",
    [
        PATTERNS,
        {"use_rslora": True},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []},
        {"target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
        {"target_parameters": None, "target_modules": ["o_proj", "lm_head"]},
    ],
    ids=["patterns", "rslora", "down alone", "gate_up alone", "router", "linears alone"],
)
def test_every_setting_gives_what_stock_merges(base: Path, tmp_path: Path, changes: dict) -> None:
    lora(tiny.load(base), **changes).save_pretrained(tmp_path / "adapter")
    report = fourfold.merge(base, tmp_path / "adapter", tmp_path / "out")
    wanted, found = merged_by_stock(base, tmp_path / "adapter"), tiny.load(tmp_path / "out").state_dict()
    before = tiny.load(base).state_dict()
    changed = [name for name, tensor in wanted.items() if not torch.equal(tensor, before[name])]
    assert len(changed) == report.planned
    for name, tensor in wanted.items():
        if name in changed:
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found[name], before[name]), name


def test_one_rounding_in_bf16(tmp_path: Path) -> None:
    tiny.build(tiny.qwen3_moe()).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    lora(tiny.load(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    fourfold.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    wanted = merged_by_stock(tmp_path / "base", tmp_path / "adapter")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        # (sums of another order may round a handful of ties the other way)
        assert (tensor != wanted[name].to(torch.bfloat16)).float().mean() < 1e-3, name


def model_in_bf16(base: Path):
    settings = fourfold.MoeBitsAndBytesConfig(**NF4)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings)


def test_dequantized_weights_were_packed_in_the_models_dtype(base: Path, tmp_path: Path) -> None:
    """A base in fp32 that is loaded in bf16 is rounded before it is packed, and other codes come out."""
    lora(model_in_bf16(base), init_lora_weights=True).save_pretrained(tmp_path / "adapter")  # (adds zero)
    fourfold.merge(base, tmp_path / "adapter", tmp_path / "out", "dequantized")
    found = tiny.load(tmp_path / "out").state_dict()
    for name, tensor in fourfold.dequantize(model_in_bf16(base)).state_dict().items():
        if "experts" in name or "q_proj" in name:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name].to(torch.bfloat16), tensor), name


def test_what_is_not_touched_is_the_bases_bytes(base: Path, tmp_path: Path) -> None:
    shutil.rmtree(base)
    tiny.save(tiny.qwen3_moe(), base, max_shard_size="60KB")
    (base / "tokenizer.json").write_text('{"odd":   "spaces"}')
    (base / "assets").mkdir()
    (base / "assets" / "logo.svg").write_text("<svg/>")
    (base / ".git").mkdir()
    (base / ".git" / "HEAD").write_text("ref")
    (base / "consolidated.safetensors").write_bytes(b"of the base alone")
    adapter = packed_adapter(base, tmp_path / "adapter")
    report = fourfold.merge(base, adapter, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "assets/logo.svg", "config.json", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
        assert name in report.copied
    assert report.left_out == ["consolidated.safetensors"]
    assert not (out / ".git").exists()
    assert not (out / "consolidated.safetensors").exists()
    weights = sorted(p.name for p in base.glob("model-*.safetensors"))
    assert report.files == weights
    assert len(weights) > 3
    touched = 0
    for name in weights:
        with safe_open(base / name, "pt") as old, safe_open(out / name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            for key in old.keys():  # noqa: SIM118
                same = torch.equal(old.get_tensor(key), new.get_tensor(key))
                expected = any(part in key for part in ("mlp.experts", "q_proj", "v_proj"))
                assert same != expected, key
                touched += expected
    assert report.keys == touched == 2 * (6 * 3 + 2)


@pytest.mark.parametrize("stored", ["as the model", "turned over"])
def test_fused_keys_in_both_orientations(tmp_path: Path, stored: str) -> None:
    """The checkpoint of qwen3_vl_moe's kind: fused, in-by-out in the files and out-by-in in the model."""
    config = tiny.transformers.Qwen3VLMoeConfig(
        text_config={
            **tiny.COMMON,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        architectures=["Qwen3VLMoeForConditionalGeneration"],
    )
    cls = tiny.transformers.Qwen3VLMoeForConditionalGeneration
    torch.manual_seed(0)
    base = tmp_path / "base"
    cls(config).to(torch.float32).save_pretrained(base)
    file = base / "model.safetensors"
    tensors = load_file(file)
    fused = [k for k in tensors if ".experts." in k]
    assert len(fused) == 4
    shapes = {
        k: tuple(v.shape) for k, v in cls.from_pretrained(base).state_dict().items() if ".experts." in k
    }
    want_turned = stored == "turned over"
    for key in fused:
        shape = next(s for k, s in shapes.items() if k.rpartition("layers")[2] == key.rpartition("layers")[2])
        if (tuple(tensors[key].shape) != shape) != want_turned:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    model = cls.from_pretrained(base, quantization_config=fourfold.MoeBitsAndBytesConfig(**EXPERTS))
    lora(model, target_modules=r".*language_model.*q_proj").save_pretrained(tmp_path / "adapter")
    for base_weights in ("original", "dequantized"):
        out = tmp_path / base_weights
        fourfold.merge(base, tmp_path / "adapter", out, base_weights)
        plain = (
            cls.from_pretrained(base)
            if base_weights == "original"
            else fourfold.dequantize(model_again(cls, base))
        )
        wanted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload().state_dict()
        found = cls.from_pretrained(out).state_dict()
        assert {k: v.shape for k, v in load_file(out / "model.safetensors").items()} == {
            k: v.shape for k, v in tensors.items()
        }
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def model_again(cls, base: Path):
    settings = fourfold.MoeBitsAndBytesConfig(**EXPERTS)
    return cls.from_pretrained(base, quantization_config=settings)
