"""Plain `BitsAndBytesConfig` served in the whole process, on request, and left alone otherwise."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

import foreign_checkpoints
import fourfold
import tiny
from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.loading.quantizer import FourfoldQuantizer
from tiny import logits

ENTRIES = ("bitsandbytes_4bit", "bitsandbytes_8bit")


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    fourfold.disable()
    assert [AUTO_QUANTIZER_MAPPING[e] for e in ENTRIES] == [Bnb4BitHfQuantizer, Bnb8BitHfQuantizer]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    tiny.save(tiny.mixtral(), path)
    return path


def load(folder: Path, config: BitsAndBytesConfig | None = None):
    arguments = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def assert_same_tensors(model, other) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def plain(**settings) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**settings)


SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_plain_configuration_packs_experts_as_ours_does(folder: Path, tmp_path: Path, settings) -> None:
    assert fourfold.enable()
    model = load(folder, plain(**settings))
    assert isinstance(tiny.experts_of(model), PackedExperts)
    fourfold.verify(model)
    dtype = {"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in settings else {}
    ours = load(folder, fourfold.MoeBitsAndBytesConfig(**settings, **dtype))
    assert torch.equal(logits(model), logits(ours))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "fourfold"
    fourfold.disable()
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_what_is_made_is_what_it_says() -> None:
    """The entries of the registry are called, and make one of three quantizers."""
    fourfold.enable()
    for entry, settings in zip(ENTRIES, ({"load_in_4bit": True}, {"load_in_8bit": True}), strict=True):
        made = [
            AUTO_QUANTIZER_MAPPING[entry](plain(**settings), pre_quantized=stored) for stored in (False, True)
        ]
        assert type(made[0]) is FourfoldQuantizer
        assert isinstance(made[1], FourfoldQuantizer if entry == ENTRIES[0] else Bnb8BitHfQuantizer)
        assert made[1].quantization_config.load_in_8bit == (entry == ENTRIES[1])


def test_settings_of_4_bit_beside_8_bit_are_ignored_as_in_stock(folder: Path) -> None:
    fourfold.enable()
    config = plain(load_in_8bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    assert tiny.experts_of(load(folder, config)).fourfold_format.quant_type == "int8"
    with pytest.raises(ConfigurationError, match="nothing is to be quantized"):
        load(folder, plain())


def test_off_by_default_and_undone(folder: Path) -> None:
    def is_packed() -> bool:
        model = load(folder, plain(load_in_4bit=True))
        return isinstance(tiny.experts_of(model), PackedExperts)

    assert not is_packed()
    fourfold.enable()
    first = [AUTO_QUANTIZER_MAPPING[e] for e in ENTRIES]
    assert fourfold.enable()
    assert [AUTO_QUANTIZER_MAPPING[e] for e in ENTRIES] == first
    assert is_packed()
    fourfold.disable()
    fourfold.disable()
    assert not is_packed()


def test_what_somebody_else_puts_there_meanwhile_is_kept() -> None:
    class Other(Bnb4BitHfQuantizer):
        pass

    fourfold.enable()
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Other
    fourfold.disable()
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is Other
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] is Bnb8BitHfQuantizer
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Bnb4BitHfQuantizer


def test_a_dense_model_stays_plain(tmp_path: Path) -> None:
    tiny.save(tiny.dense(), tmp_path / "dense")
    stock = load(tmp_path / "dense", plain(load_in_4bit=True))
    fourfold.enable()
    model = load(tmp_path / "dense", plain(load_in_4bit=True))
    assert_same_tensors(model, stock)
    model.save_pretrained(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    assert_same_tensors(load(tmp_path / "out"), stock)


def test_a_plain_4_bit_checkpoint_gets_its_experts_packed(folder: Path, tmp_path: Path) -> None:
    stock = load(folder, plain(load_in_4bit=True))
    stock.save_pretrained(tmp_path)
    fourfold.enable()
    model = load(tmp_path)
    fourfold.verify(model)
    assert_same_tensors(model, load(folder, plain(load_in_4bit=True)))
    skip_experts(tmp_path)
    assert_same_tensors(load(tmp_path), stock)
    fourfold.verify(load(tmp_path))
    fourfold.disable()
    load(tmp_path)


@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_with_experts_quantized_one_by_one_is_taken_over(tmp_path: Path, double: bool) -> None:
    config = tiny.qwen3_moe(moe_intermediate_size=64)
    stored, _, _ = foreign_checkpoints.bitsandbytes(config, tmp_path, double=double)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    dtype = {"bnb_4bit_compute_dtype": torch.bfloat16}
    wanted = load(stored, fourfold.MoeBitsAndBytesConfig(**settings, **dtype))
    fourfold.enable()
    for given in (None, plain(**settings, **dtype)):
        model = load(stored, given)
        fourfold.verify(model)
        assert_same_tensors(model, wanted)
        assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path / "packed")
    fourfold.disable()
    assert_same_tensors(load(tmp_path / "packed"), wanted)


def test_a_plain_8_bit_checkpoint_with_experts_is_refused_for_the_right_reason(
    folder: Path, tmp_path: Path
) -> None:
    load(folder, plain(load_in_8bit=True)).save_pretrained(tmp_path)
    fourfold.enable()
    with pytest.raises(
        ConfigurationError, match=r"model\.layers\.0\.mlp\.experts and 1 more.*high precision"
    ):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    scale = {"model.layers.0.mlp.experts.0.w1.SCB": torch.ones(96)}
    save_file(tensors | scale, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="one by one, which cannot be read"):
        load(tmp_path)
    save_file(tensors, file, metadata={"format": "pt"})
    skip_experts(tmp_path)
    fourfold.verify(load(tmp_path))


def skip_experts(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "mlp.experts"]
    (folder / "config.json").write_text(json.dumps(config))


def future_by_parameter(stock):
    class Future(stock):
        def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
            return param_name.endswith("gate_up_proj") or super().param_needs_quantization(model, param_name)

    return Future


def future_by_module(stock):
    class Future(stock):
        def _process_model_before_weight_loading(self, model, **kwargs) -> None:
            super()._process_model_before_weight_loading(model, **kwargs)
            model.experts = torch.nn.ModuleDict()

    return Future


@pytest.mark.parametrize("future", [future_by_parameter, future_by_module])
@pytest.mark.parametrize(
    ("entry", "stock"), zip(ENTRIES, (Bnb4BitHfQuantizer, Bnb8BitHfQuantizer), strict=True)
)
def test_steps_aside_where_transformers_quantizes_experts(
    monkeypatch, caplog: pytest.LogCaptureFixture, future, entry: str, stock
) -> None:
    theirs = future(stock)
    with monkeypatch.context() as patch:
        patch.setitem(AUTO_QUANTIZER_MAPPING, entry, theirs)
        before = dict(AUTO_QUANTIZER_MAPPING)
        with caplog.at_level(logging.WARNING, "fourfold"):
            assert not fourfold.enable()
        assert "by itself" in caplog.text
        assert before == AUTO_QUANTIZER_MAPPING


def test_names_are_lazy() -> None:
    code = "import sys, fourfold; fourfold.disable; assert 'transformers' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, fourfold; 'enable' in dir(fourfold); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
