"""A packed checkpoint written without the model: what `save_pretrained` writes, in little memory, or not at
all."""

import gc
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

import foreign_checkpoints
import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError, UnsupportedExpertsError
from fourfold.loading import cpu_linears
from fourfold.loading.quantize import _copy_companions as copy_companions
from fourfold.loading.quantize import quantize_checkpoint
from fourfold.loading.shards import parse_size

Config = fourfold.MoeBitsAndBytesConfig
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SETTINGS = {
    "nf4": NF4,
    "int8": {"load_in_8bit": True},
    "experts alone, fp4": {"experts_quant_type": "fp4"},
    "linears alone": {**NF4, "experts_quant_type": "none"},
    "some skipped": {**NF4, "llm_int8_skip_modules": ["model.layers.0.mlp.experts", "q_proj"]},
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_checkpoint(ours: Path, saved: Path) -> None:
    a, b = tensors_of(ours), tensors_of(saved)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((saved / name).read_text())


@pytest.fixture
def widths_do_not_matter(monkeypatch) -> None:
    """This CPU's bitsandbytes may refuse to compute what it packs rightly; here nothing is computed."""
    monkeypatch.setattr(cpu_linears, "decodes_rows_of", lambda *_: True)


KINDS = {**tiny.KINDS, "dense": tiny.dense, "tied": lambda: tiny.qwen3_moe(tie_word_embeddings=True)}


@pytest.mark.usefixtures("widths_do_not_matter")
@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, s) for k in KINDS for s in SETTINGS if k != "dense" or "experts_quant_type" not in SETTINGS[s]],
)
def test_writes_what_save_pretrained_writes(tmp_path: Path, kind: str, name: str) -> None:
    settings = SETTINGS[name]
    tiny.save(KINDS[kind](), tmp_path / "model", max_shard_size="100KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=Config(**settings))
    model.save_pretrained(tmp_path / "saved")
    written = quantize_checkpoint(
        tmp_path / "model", tmp_path / "ours", Config(**settings), max_shard_size="30KB"
    )
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "saved")
    assert len(written.files) > 1
    assert written.files == sorted(f.name for f in (tmp_path / "ours").glob("*.safetensors"))
    assert written.ignored_keys == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    before, after = model.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


FOREIGN = {
    "mxfp4": lambda folder: foreign_checkpoints.mxfp4(folder),
    "fp8": lambda folder: foreign_checkpoints.fp8(foreign_checkpoints.deepseek_v3(), folder),
    "bitsandbytes v4": lambda folder: foreign_checkpoints.bitsandbytes(
        tiny.qwen3_moe(moe_intermediate_size=64), folder, double=True
    ),
    "bitsandbytes v5": lambda folder: foreign_checkpoints.bitsandbytes(
        tiny.qwen3_moe(moe_intermediate_size=64), folder, double=True, experts=False
    ),
}


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request, tmp_path_factory) -> Path:
    return FOREIGN[request.param](tmp_path_factory.mktemp("foreign"))[0]


@pytest.mark.usefixtures("widths_do_not_matter")
@pytest.mark.parametrize("name", ["nf4", "linears alone", "some skipped"])
def test_reads_the_formats_that_loading_reads(foreign: Path, tmp_path: Path, name: str) -> None:
    settings = SETTINGS[name]
    model = AutoModelForCausalLM.from_pretrained(foreign, quantization_config=Config(**settings))
    model.save_pretrained(tmp_path / "saved")
    written = quantize_checkpoint(foreign, tmp_path / "ours", Config(**settings), max_shard_size="30KB")
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "saved")
    assert written.ignored_keys == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_other_keys_of_such_a_source_are_still_reported(tmp_path: Path) -> None:
    source, _ = FOREIGN["fp8"](tmp_path)
    damage(source, lambda t: t.update({"model.extra.weight": torch.ones(2)}))
    written = quantize_checkpoint(source, tmp_path / "out", Config(**NF4))
    assert written.ignored_keys == ["model.extra.weight"]


def test_packs_on_a_cpu_what_it_could_not_compute(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu_linears, "decodes_rows_of", lambda *_: False)
    tiny.save(tiny.mixtral(head_dim=24), tmp_path / "model")
    with pytest.raises(ConfigurationError, match="wrongly"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=Config(**NF4))
    config = Config(**NF4)
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", config)
    assert not config.only_written


def test_tied_weights_that_the_file_holds_twice_or_under_the_other_name(tmp_path: Path) -> None:
    """Both names with the same numbers, both with different ones, the copy alone: as stock loading does."""
    tiny.save(tiny.qwen3_moe(tie_word_embeddings=True), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("model.embed_tokens.weight")
    cases = {
        "same": {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()},
        "different": {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1},
        "copy": {"lm_head.weight": embedding},
    }
    for name, changed in cases.items():
        save_file(tensors | changed, file, metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=Config(**NF4))
        model.save_pretrained(tmp_path / f"{name}-saved")
        quantize_checkpoint(tmp_path / "model", tmp_path / name, Config(**NF4))
        assert_same_checkpoint(tmp_path / name, tmp_path / f"{name}-saved")


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python can reach, storages counted once; mapped files are none."""
    storages = {}
    for thing in gc.get_objects():
        # (compilers leave tensors behind that hold nothing)
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_holds_one_projection_and_one_shard(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(num_hidden_layers=24), tmp_path / "model", max_shard_size="200KB")
    projection = 4 * 2 * 96 * 64 * 4
    for shard, bounded in (("50KB", True), ("5GB", False)):
        gc.collect()
        start, seen = live_bytes(), []

        def watch(done: int, total: int, _name: str, start=start, seen=seen) -> None:
            if done % 13 == 0 or done == total:
                seen.append(live_bytes() - start)

        written = quantize_checkpoint(
            tmp_path / "model", tmp_path / shard, Config(**NF4), max_shard_size=shard, progress=watch
        )
        assert len(seen) > 15
        allowed = parse_size("50KB") + projection
        assert written.bytes > 3 * allowed
        # The second case is what the first would look like if anything were held on to.
        assert (max(seen) < allowed) == bounded


def test_copies_known_files_and_no_code(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    known = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"]
    for name in [*known, "modeling_own.py", "pytorch_model.bin", "model.safetensors.bak"]:
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "rag.jinja").write_text("{}")
    written = quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))
    assert sorted(written.copied) == sorted([*known, "additional_chat_templates/rag.jinja"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*known, "additional_chat_templates", "config.json", "generation_config.json", "model.safetensors"]
    )


def test_a_model_from_the_hub_brings_all_of_its_chat_templates(tmp_path: Path, monkeypatch) -> None:
    repository = {
        name: tmp_path / "hub" / name
        for name in (
            "tokenizer.json",
            "additional_chat_templates/rag.jinja",
            "additional_chat_templates/x.py",
        )
    }
    for file in repository.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")

    def download(_model: str, *, allow_patterns: list[str], **_settings: object) -> str:
        for name in repository.keys() - set(filter_repo_objects(repository, allow_patterns=allow_patterns)):
            repository[name].unlink()
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "out").mkdir()
    copied = copy_companions("somebody/model", tmp_path / "out")
    assert copied == ["tokenizer.json", "additional_chat_templates/rag.jinja"]
    assert not repository["additional_chat_templates/x.py"].exists()


def drop(tensors: dict[str, torch.Tensor], pattern: str) -> None:
    for key in [key for key in tensors if pattern in key]:
        del tensors[key]


def damage(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: drop(t, "layers.1.input_layernorm"), r"lacks model\.layers\.1\.input_layernorm\.weight"),
        (lambda t: drop(t, "layers.1.self_attn.q_proj"), r"lacks model\.layers\.1\.self_attn\.q_proj"),
        (lambda t: drop(t, "layers.1.block_sparse_moe.experts."), r"experts\.gate_up_proj"),
        (lambda t: drop(t, "layers.1.block_sparse_moe.experts.2.w1"), r"experts\.gate_up_proj.*3 of 4"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32)}),
            r"model\.norm\.weight is \[32\] in the checkpoint",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(64, 64)}),
            r"layers\.1\.self_attn\.k_proj\.weight is \[64, 64\] in the checkpoint",
        ),
        (
            lambda t: t["model.layers.1.block_sparse_moe.experts.2.w2.weight"].fill_(float("nan")),
            r"layers\.1\.mlp\.experts\.down_proj: weights of expert\(s\) 2",
        ),
        *[
            (
                lambda t, name=name: t[name].view(-1)[3:4].fill_(float("inf")),
                rf"{name.replace('block_sparse_moe', 'mlp')} hold NaN or infinite",
            )
            for name in (
                "model.embed_tokens.weight",
                "model.layers.1.post_attention_layernorm.weight",
                "model.layers.1.block_sparse_moe.gate.weight",
            )
        ],
    ],
)
def test_a_damaged_source_is_an_error_with_the_tensors_name(tmp_path: Path, change, said: str) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    damage(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=said):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("fp8", "model.norm.weight", r"model\.norm\.weight hold NaN"),
        ("fp8", "model.layers.1.mlp.gate.e_score_correction_bias", "e_score_correction_bias hold NaN"),
        (
            "bitsandbytes v4",
            "model.layers.1.mlp.experts.2.up_proj.weight.nested_absmax",
            "gate_up_proj_absmax_scale hold NaN",
        ),
        (
            "bitsandbytes v4",
            "model.layers.1.self_attn.k_proj.weight.nested_absmax",
            r"k_proj\.weight\.absmax hold NaN",
        ),
    ],
)
def test_numbers_that_are_none_in_the_formats_that_loading_reads(
    tmp_path: Path, name: str, key: str, said: str
) -> None:
    (tmp_path / "made").mkdir()
    source, _ = FOREIGN[name](tmp_path / "made")[:2]
    damage(source, lambda t: t[key].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=said):
        quantize_checkpoint(source, tmp_path / "out", Config(**NF4))
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_linears_beyond_what_int8_holds_are_refused_by_name(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    name = "model.layers.1.self_attn.q_proj.weight"
    damage(tmp_path / "model", lambda t: t[name].view(-1)[:1].fill_(1e5))
    said = rf"{name}: .*beyond the range of fp16.*skip_modules=\['model\.layers\.1\.self_attn\.q_proj'\]"
    with pytest.raises(CheckpointError, match=said):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(load_in_8bit=True))
    with pytest.raises(CheckpointError, match=said):
        tiny.load(tmp_path / "model", load_in_8bit=True)
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))


def test_other_wrong_sources(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.save(tiny.mixtral(), model)

    def refused(said: str, source: Path = model) -> None:
        with pytest.raises(CheckpointError, match=said):
            quantize_checkpoint(source, tmp_path / "out2", Config(**NF4))

    refused("there is no model folder", tmp_path / "nowhere")
    quantize_checkpoint(model, tmp_path / "out", Config(**NF4))
    refused("quantized already", tmp_path / "out")
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    refused("truncated")
    file.unlink()
    refused("only safetensors")
    (model / "pytorch_model.bin").write_bytes(b"no")
    refused("only safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../out/model.safetensors"}}')
    refused("outside its folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize(
    "index", [b'{"weight_map": {"a": 1}}', b'{"weight_map": {}}', b"\xff\xfe", b"[" * 100_000, b"null"]
)
def test_an_index_that_is_none(tmp_path: Path, index: bytes) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model", max_shard_size="200KB")
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=r"index\.json is no index of a checkpoint"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))


@pytest.mark.parametrize("stored", ["fp8", [], 4])
def test_a_quantization_that_is_none(tmp_path: Path, stored: object) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    with pytest.raises(CheckpointError, match="cannot read the configuration"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))


def _quantize_as(tmp_path: Path, architecture: object) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [architecture]}))
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))


@pytest.mark.parametrize("name", ["AutoConfig", "MixtralConfig", "logging"])
def test_an_architecture_that_is_no_model_is_passed_over(tmp_path: Path, name: str) -> None:
    _quantize_as(tmp_path, name)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["architectures"] == ["MixtralForCausalLM"]


def test_an_architecture_that_is_no_name(tmp_path: Path) -> None:
    """Some versions of transformers look at the field themselves; others leave it to us."""
    refused = None
    try:
        _quantize_as(tmp_path, 3)
    except CheckpointError as error:
        refused = str(error)
    assert refused is None or "'architectures'" in refused
    assert (tmp_path / "out").exists() == (refused is None)


@pytest.mark.parametrize("out", ["file/out", "o" * 250])
def test_where_nothing_can_be_written(tmp_path: Path, out: str) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        quantize_checkpoint(tmp_path / "model", tmp_path / out, Config(**NF4))
    with pytest.raises(ConfigurationError, match="device 'meta' cannot be used"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4), device="meta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


def test_the_class_when_the_configuration_does_not_name_it(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["architectures"] == ["MixtralForCausalLM"]
    fourfold.verify(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    part = {"model_type": "vitpose_backbone", "architectures": ["NoSuchBackbone"]}
    file.write_text(json.dumps(part))
    with pytest.raises(CheckpointError, match=r"no model for its config\.json"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out2", Config(**NF4))


def test_experts_that_cannot_be_packed_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch
) -> None:
    from fourfold.experts import layout

    tiny.save(tiny.mixtral(), tmp_path / "model")
    monkeypatch.setattr(layout, "_read_decorated", lambda _: "it is upside down")
    with pytest.raises(UnsupportedExpertsError, match="upside down"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", Config(**NF4))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("200 MB", 2 * 10**8), ("1.5KiB", 1536)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_size(text)
