"""Packing while loading, saving, reloading, dequantizing: through transformers' ordinary calls."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationMethod

import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError, NoExpertsError, UnsupportedExpertsError
from fourfold.experts import PackedExperts, find_experts
from fourfold.formats import PackFormat
from fourfold.loading import spread
from tiny import IDS, load, logits, packed_folder

Config = fourfold.MoeBitsAndBytesConfig
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
    "experts alone, nf4": {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "experts alone, int8": {"experts_quant_type": "int8"},
    "linears 8 bit, experts 4 bit, blocks of 32": {
        "load_in_8bit": True,
        "experts_quant_type": "nf4",
        "experts_blocksize": 32,
    },
}


@pytest.fixture(scope="module", params=tiny.KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save(tiny.KINDS[request.param](), folder)
    return request.param, folder


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_experts_alone_equal_bitsandbytes_round_trip(checkpoint, quant_type: str) -> None:
    """The sharp test: the whole model against itself with each expert passed through bitsandbytes."""
    kind, folder = checkpoint
    ours = load(folder, experts_quant_type=quant_type)
    theirs = tiny.round_trip_(load(folder), PackFormat(quant_type))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(load(folder)), atol=1e-4), kind


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_save_and_reload_are_bit_exact(mixtral: Path, tmp_path: Path, settings) -> None:
    model = load(mixtral, **settings)
    fourfold.verify(model)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert torch.equal(logits(model), logits(again))
    assert not any(p.requires_grad for n, p in again.named_parameters() if "experts" in n)
    again.save_pretrained(tmp_path / "again")  # stock transformers cannot save a reloaded 4-bit model
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "fourfold"
    assert stored["format_version"] == 1
    assert "load_in_4bit" not in stored


def test_every_kind_saves_and_reloads(checkpoint, tmp_path: Path) -> None:
    _, folder = checkpoint
    model = load(folder, experts_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))


@pytest.mark.parametrize("reloaded", [False, True])
def test_dequantize_gives_the_models_own_class_numbers_and_keys(
    checkpoint, tmp_path: Path, reloaded: bool
) -> None:
    kind, folder = checkpoint
    model = load(folder, experts_quant_type="nf4")
    before = logits(model)
    if reloaded:
        model.save_pretrained(tmp_path / "packed")  # makes a string of config.dtype, too
        model = load(tmp_path / "packed")
    plain = fourfold.dequantize(model)
    assert not any(isinstance(m, PackedExperts) for m in plain.modules())
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    ours = load_file(tmp_path / "plain" / "model.safetensors")
    assert set(ours) == set(load_file(folder / "model.safetensors")), kind
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path / "plain")), before, rtol=1e-5, atol=1e-5)


def test_linears_are_those_of_plain_bitsandbytes(mixtral: Path) -> None:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    ours = load(mixtral, experts_quant_type="none", bnb_4bit_compute_dtype=torch.float32, **settings)
    plain = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
    stock = AutoModelForCausalLM.from_pretrained(mixtral, quantization_config=plain)
    named = dict(stock.named_modules())
    compared = 0
    for name, module in ours.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            wanted = named[name].weight
            assert torch.equal(module.weight, wanted), name
            assert torch.equal(state.absmax, wanted.quant_state.absmax), name
            assert torch.equal(state.offset, wanted.quant_state.offset), name
            compared += 1
    assert compared == 2 * 4


def test_peak_while_loading_is_one_expert_above_the_result(mixtral: Path, monkeypatch) -> None:
    """No fused tensor of a projection is ever made from a per-expert checkpoint."""
    import fourfold.formats.quantize as quantize

    merged: list[int] = []
    stack, pack, launch = torch.stack, quantize.Packer.pack_, quantize.Packer.pack_matrices_
    packed: list[torch.Size] = []
    batches: list[int] = []

    def spy(packer, expert, part, w_NK):
        packed.append(w_NK.shape)
        return pack(packer, expert, part, w_NK)

    def spy_launch(packer, first, w_MnK):
        batches.append(w_MnK.nbytes)
        return launch(packer, first, w_MnK)

    monkeypatch.setattr(torch, "stack", lambda t, *a, **k: merged.append(len(t)) or stack(t, *a, **k))
    monkeypatch.setattr(quantize.Packer, "pack_", spy)
    monkeypatch.setattr(quantize.Packer, "pack_matrices_", spy_launch)
    one = 96 * 64 * 4
    monkeypatch.setattr(quantize, "BATCH_BYTES_ELSEWHERE", 2 * one)
    load(mixtral, experts_quant_type="nf4")
    assert merged == []
    assert packed.count(torch.Size((96, 64))) == 2 * 2 * 4  # gate and up, layers, experts
    assert packed.count(torch.Size((64, 96))) == 2 * 4
    assert batches == [2 * one] * (2 * 3 * 4 // 2)
    load(mixtral, load_in_8bit=True, experts_quant_type="none")
    assert merged  # what the spy would have seen


def test_head_and_routers_stay_in_high_precision_whatever_is_skipped(tmp_path: Path) -> None:
    import bitsandbytes

    tiny.save(tiny.qwen3_moe(tie_word_embeddings=False), tmp_path)
    model = load(tmp_path, load_in_4bit=True, llm_int8_skip_modules=["q_proj"])
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.named_modules()}
    assert kinds["lm_head"] is torch.nn.Linear
    assert kinds["q_proj"] is torch.nn.Linear
    assert kinds["k_proj"] is bitsandbytes.nn.Linear4bit
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32


def test_linear_routers_are_found_by_shape() -> None:
    from fourfold.loading.skips import router_names

    model = tiny.build(tiny.mixtral())
    block = model.model.layers[0].mlp
    block.gate = torch.nn.Linear(64, 4)
    block.shared = torch.nn.Linear(64, 96)
    assert router_names(model, list(find_experts(model))) == ["model.layers.0.mlp.gate"]


def test_skipped_experts_stay_as_they_are_and_survive_saving(mixtral: Path, tmp_path: Path) -> None:
    model = load(mixtral, load_in_4bit=True, llm_int8_skip_modules=["model.layers.0.mlp.experts"])
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert not isinstance(first, PackedExperts)
    assert isinstance(second, PackedExperts)
    report = fourfold.verify(model)
    assert report.left_on_request == ["model.layers.0.mlp.experts"]
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert fourfold.verify(again).left_on_request == ["model.layers.0.mlp.experts"]


def test_a_dense_model_is_plain_bitsandbytes(tmp_path: Path) -> None:
    tiny.save(tiny.dense(), tmp_path / "dense")
    model = load(tmp_path / "dense", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert fourfold.verify(model).experts == []
    model.save_pretrained(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    with pytest.raises(NoExpertsError):
        load(tmp_path / "dense", experts_quant_type="nf4")


@pytest.mark.parametrize("width", [96, 32])
def test_linears_that_this_cpu_would_compute_wrongly_are_refused(
    tmp_path: Path, width: int, monkeypatch
) -> None:
    from fourfold.loading import cpu_linears

    monkeypatch.setattr(cpu_linears, "decodes_rows_of", lambda *_: False)
    tiny.save(tiny.mixtral(head_dim=width // 4), tmp_path)
    with pytest.raises(ConfigurationError, match=rf"self_attn.o_proj \({width}\)") as raised:
        load(tmp_path, load_in_4bit=True)
    patterns = json.loads(re.search(r"skip_modules=(\[.+?\])", str(raised.value)).group(1).replace("'", '"'))
    model = load(tmp_path, load_in_4bit=True, llm_int8_skip_modules=patterns)
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear


def test_the_probe_of_this_cpu_agrees_with_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    from fourfold.loading.cpu_linears import decodes_rows_of

    assert decodes_rows_of(128, 64, "nf4")
    for columns in (32, 96, 160):
        w = torch.randn(64, columns)
        error = (
            bnb.dequantize_4bit(*bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")) - w
        ).norm() / w.norm()
        assert decodes_rows_of(columns, 64, "nf4") == (error < 0.12)


def test_gates_of_shared_experts_stay_in_high_precision() -> None:
    from fourfold.loading.skeleton import build_skeleton

    config = transformers.Qwen2MoeConfig(**tiny.COMMON, hidden_size=64, num_experts=4, decoder_sparse_step=1)
    model = build_skeleton(config, Config(load_in_4bit=True))
    assert type(model.model.layers[0].mlp.shared_expert_gate) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.shared_expert.up_proj) is not torch.nn.Linear


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(mixtral: Path, tmp_path: Path, device_map) -> None:
    config = Config(experts_quant_type="nf4")
    mapped = AutoModelForCausalLM.from_pretrained(mixtral, quantization_config=config, device_map=device_map)
    assert torch.equal(logits(mapped), logits(load(mixtral, experts_quant_type="nf4")))


def test_device_maps_count_packed_bytes(mixtral: Path) -> None:
    """`device_map="auto"` and the allocator's warm-up multiply by this; bf16 would be four times as much."""
    model = load(mixtral, experts_quant_type="nf4")
    experts = tiny.experts_of(model)
    quantizer = model.hf_quantizer
    for name in ("gate_up_proj", "down_proj"):
        packed = getattr(experts, name)
        shape = experts.fourfold_layout.model_shape(experts.fourfold_layout.projection(name))
        full = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        size = quantizer.param_element_size(model, f"model.layers.0.mlp.experts.{name}", full)
        assert size * full.numel() == packed.numel()
    head = model.lm_head.weight
    assert quantizer.param_element_size(model, "lm_head.weight", head) == head.element_size()


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_dequantize_where_no_linear_is_quantized(mixtral: Path, tmp_path: Path, bits: str) -> None:
    linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = load(mixtral, **{bits: True}, llm_int8_skip_modules=linears)
    model.save_pretrained(tmp_path / "packed")
    wanted = logits(model)
    for again in (model, load(tmp_path / "packed")):
        plain = fourfold.dequantize(again)
        assert torch.allclose(logits(plain), wanted, atol=1e-5)
        assert not hasattr(plain, "is_loaded_in_4bit")
        assert not hasattr(plain, "is_loaded_in_8bit")


def test_dequantize_under_the_hooks_of_a_device_map(mixtral: Path) -> None:
    from accelerate.hooks import attach_execution_device_hook

    model = load(mixtral, experts_quant_type="nf4")
    wanted = logits(model)
    attach_execution_device_hook(model, "cpu")
    assert torch.equal(logits(model), wanted)
    assert torch.allclose(logits(fourfold.dequantize(model)), wanted, atol=1e-5)


def test_expert_parallelism_is_refused(mixtral: Path) -> None:
    model = load(mixtral, experts_quant_type="nf4")
    tiny.experts_of(model)._is_expert_parallel = True
    with pytest.raises(
        UnsupportedExpertsError, match=r"layers\.0.*expert parallelism.*Load the model without"
    ):
        logits(model)


def test_guards_of_quantized_models_are_kept(mixtral: Path) -> None:
    model = load(mixtral, load_in_4bit=True)
    assert model.is_loaded_in_4bit
    assert model.quantization_method == QuantizationMethod.BITS_AND_BYTES
    with pytest.raises(ValueError, match="dtype"):
        model.to(torch.bfloat16)


def test_compute_dtype_is_the_models_unless_set(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Config(**settings)
    )
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16
    assert model.model.layers[0].mlp.experts.compute_dtype is None
    model = load(tmp_path, bnb_4bit_compute_dtype="bfloat16", **settings)
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16
    assert model.model.layers[0].mlp.experts.compute_dtype == torch.bfloat16


def test_training_after_evaluation_still_reaches_lower_layers(mixtral: Path) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes' evaluation makes 4-bit Linears that have no backward."""
    model = load(mixtral, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model.eval()
    before = logits(model)
    assert torch.equal(before, logits(model))
    model.train()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad.abs().sum() > 0
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


# --- what must not load
# -----------------------------------------------------------------------------------------


def test_a_newer_format_is_refused(mixtral: Path, tmp_path: Path) -> None:
    folder = packed_folder(mixtral, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="newer fourfold"):
        load(folder)


def test_packed_tensors_may_also_have_the_names_of_the_original(mixtral: Path, tmp_path: Path) -> None:
    """As a checkpoint that was packed without building the model has them."""
    folder = packed_folder(mixtral, tmp_path / "packed")
    expected = logits(load(folder))
    tensors = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"\.mlp\.", ".block_sparse_moe.", name): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"].pop("tensor_names") == "model"
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert torch.equal(logits(model), expected)
    fourfold.dequantize(model).save_pretrained(tmp_path / "plain")
    original = {key for file in mixtral.glob("*.safetensors") for key in load_file(file)}
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) == original


def test_unknown_tensor_names_are_refused(mixtral: Path, tmp_path: Path) -> None:
    folder = packed_folder(mixtral, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["tensor_names"] = "sorted"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="newer fourfold"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing is to be quantized"),
        ({"experts_quant_type": "none"}, "nothing is to be quantized"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"load_in_4bit": True, "experts_quant_type": "int4"}, "valid are"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "nf5"),
        ({"load_in_8bit": True, "experts_blocksize": 32}, "experts_blocksize"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type='nf4' has no meaning"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": True}, "double"),
        ({"load_in_4bit": True, "bnb_4bit_qant_type": "nf4"}, "bnb_4bit_qant_type"),
    ],
)
def test_contradictory_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Config(**settings)


def test_experts_that_cannot_be_packed_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    """Each expert is a row of two embeddings; the message names the setting for both."""
    from fourfold.loading.skeleton import build_skeleton

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
    model = {"model_type": "doge", "architectures": ["DogeForCausalLM"], "is_moe": True, "num_experts": 16}
    (tmp_path / "config.json").write_text(json.dumps(model | sizes | {"pad_token_id": 0}))
    with pytest.raises(UnsupportedExpertsError, match="row of an embedding") as raised:
        build_skeleton(tmp_path, Config(load_in_4bit=True))
    named = re.search(r"llm_int8_skip_modules=\[(.+?)\]", str(raised.value)).group(1)
    patterns = re.findall(r"'(.+?)'", named)
    assert patterns == ["mlp.down_embed", "mlp.up_embed"]
    with pytest.raises(UnsupportedExpertsError, match="up_embed"):
        build_skeleton(tmp_path, Config(load_in_4bit=True, llm_int8_skip_modules=patterns[:1]))
    build_skeleton(tmp_path, Config(load_in_4bit=True, llm_int8_skip_modules=patterns))
    build_skeleton(tmp_path, Config(load_in_4bit=True, experts_quant_type="none"))


def test_an_older_transformers_is_told_before_loading(monkeypatch: pytest.MonkeyPatch, mixtral: Path) -> None:
    """(Its expert parallelism masks in the router, and cuts no scales.)"""
    monkeypatch.setattr(spread, "_has_implementations", lambda: False)
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(mixtral))
    model.config.distributed_config = SimpleNamespace(enable_expert_parallel=True, tp_size=2)
    with pytest.raises(ConfigurationError, match=r"transformers>=5\.23"):
        spread.is_wanted(model)
