"""`fourfold merge`: which base an adapter may be merged into."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import fourfold
import tiny
from fourfold.errors import AdapterError
from merging import NF4, assert_refused, edit, make_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.save(tiny.qwen3_moe(), tmp_path / "base", max_shard_size="100KB")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize("how", ["a copy", "lora on the head", "lora on the embedding", "a trained head"])
def test_another_vocabulary(base: Path, tmp_path: Path, how: str) -> None:
    """Tokens were added before training: what the adapter holds of them has no place in the base."""
    changes = {
        "a copy": {},
        "lora on the head": {"target_modules": ["lm_head"]},
        "lora on the embedding": {"target_modules": ["embed_tokens"]},
        "a trained head": {"modules_to_save": ["lm_head"]},
    }[how]
    model = tiny.load(base, **NF4)
    model.resize_token_embeddings(104, mean_resizing=False)
    vocabulary = {name: t.clone() for name, t in model.state_dict().items() if t.shape == (104, 64)}
    assert len(vocabulary) == 2
    arguments = {"r": 4, "target_modules": ["q_proj"], "target_parameters": fourfold.expert_targets(model)}
    wrapped = get_peft_model(model, LoraConfig(**(arguments | changes)))
    # (PEFT saves embeddings of itself where the vocabulary is not the base's)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=how == "a copy")
    said = r"resized to 104 tokens.*the base has 96\. Merge into the resized base.*--any-base"
    assert_refused(AdapterError, said, base, tmp_path / "adapter")
    plain = tiny.load(base)
    plain.resize_token_embeddings(104, mean_resizing=False)
    plain.load_state_dict(vocabulary, strict=False)
    plain.save_pretrained(tmp_path / "resized")
    if how == "lora on the embedding":
        assert_refused(AdapterError, "Embedding", tmp_path / "resized", tmp_path / "adapter", any_base=True)
    else:
        fourfold.merge(tmp_path / "resized", tmp_path / "adapter", tmp_path / "out", any_base=True)


def test_a_base_that_nobody_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit(adapter / "fourfold.json", base=None)
    said = r"does not say which base.*base: null.*Nothing tells whether.*--any-base"
    assert_refused(AdapterError, said, base, adapter)
    assert_refused(AdapterError, said, base, adapter, "dequantized")
    assert fourfold.merge(base, adapter, tmp_path / "out", any_base=True).planned == 2 * 3


def test_a_model_packed_without_a_name(base: Path, tmp_path: Path) -> None:
    """Its packed copy has base: null, and what is trained on that as well."""
    tiny.packed_folder(base, tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())
    stored["quantization_config"]["base"] = None
    (tmp_path / "packed" / "config.json").write_text(json.dumps(stored))
    model = tiny.load(tmp_path / "packed")
    lora = LoraConfig(r=2, target_modules=[], target_parameters=fourfold.expert_targets(model))
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "fourfold.json").read_text())["base"] is None
    assert_refused(AdapterError, "does not say which base", base, tmp_path / "adapter")


@pytest.mark.parametrize("how", ["type", "shapes"])
def test_another_type_or_shape_even_of_the_same_weights(base: Path, adapter: Path, how: str) -> None:
    shapes = {"mlp.experts.gate_up_proj": [2, 6, 64, 64], "mlp.experts.down_proj": [3, 6, 64, 32]}
    change = {"type": {"model_type": "mixtral"}, "shapes": {"shapes": shapes}}[how]
    edit(adapter / "fourfold.json", **change)
    said = {"type": "a model of type mixtral, and", "shapes": r"packed experts of .*\[3, 6, 64, 32\]"}[how]
    assert_refused(AdapterError, said, base, adapter)
    fourfold.merge(base, adapter, base.parent / "out", any_base=True)


FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_what_was_left_unpacked_is_compared_where_it_matters(base: Path, tmp_path: Path) -> None:
    skips = ["layers.1.mlp.experts", "k_proj"]
    model = tiny.load(base, **FOUR, llm_int8_skip_modules=skips)
    parameters = ["layers.0.mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], target_parameters=parameters)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "fourfold.json"
    left = json.loads(file.read_text())["left"]
    assert left == [
        "lm_head",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.experts",
        "model.layers.1.self_attn.k_proj",
    ]
    fourfold.merge(base, tmp_path / "adapter", tmp_path / "first", "dequantized")
    edit(file, left=[name for name in left if "layers.0" not in name])
    said = r"with model\.layers\.0\.self_attn\.k_proj packed, in high precision here .*dequantized"
    assert_refused(AdapterError, said, base, tmp_path / "adapter", "dequantized")
    edit(file, left=[*left, "model.layers.1.self_attn.q_proj"])
    said = r"with model\.layers\.1\.self_attn\.q_proj in high precision, packed here"
    assert_refused(AdapterError, said, base, tmp_path / "adapter", "dequantized")
    fourfold.merge(base, tmp_path / "adapter", tmp_path / "out")  # original: it changes nothing
    data = json.loads(file.read_text())
    del data["left"]  # as older releases wrote it
    file.write_text(json.dumps(data))
    fourfold.merge(base, tmp_path / "adapter", tmp_path / "last", "dequantized")
