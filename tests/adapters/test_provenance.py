"""`fourfold.json`: which base an adapter belongs to, written and read wherever PEFT writes and reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import fourfold
import needs
import tiny
from fourfold.adapters import provenance
from fourfold.adapters.peft_lora import load_adapter
from fourfold.errors import AdapterError
from fourfold.loading.quantize import quantize_checkpoint
from tiny import IDS

NF4 = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    tiny.save(tiny.qwen3_moe(), tmp_path / "original")
    return tmp_path / "original"


def with_lora(model, **changes) -> PeftModel:
    arguments = {"r": 2, "target_parameters": fourfold.expert_targets(model), "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**(arguments | changes)))


def adapter(folder: Path, out: Path, **settings) -> Path:
    with_lora(tiny.load(folder, **settings)).save_pretrained(out)
    return out


def stored_base(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["base"]


@pytest.mark.parametrize("way", ["saved", "quantized"])
def test_a_packed_copy_remembers_its_original(original: Path, tmp_path: Path, way: str) -> None:
    packed = tmp_path / "packed"
    if way == "saved":
        tiny.packed_folder(original, packed, **NF4)
    else:
        quantize_checkpoint(original, packed, fourfold.MoeBitsAndBytesConfig(**NF4))
    base = stored_base(packed)
    assert base["name"] == str(original)
    assert base["revision"] is None
    assert len(base["fingerprint"]) == 32
    tiny.load(packed).save_pretrained(tmp_path / "again")
    assert stored_base(tmp_path / "again") == base


def test_one_configuration_for_two_models(original: Path, tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(), tmp_path / "other")
    config = fourfold.MoeBitsAndBytesConfig(**NF4)
    auto = tiny.transformers.AutoModelForCausalLM
    models = [auto.from_pretrained(f, quantization_config=config) for f in (original, tmp_path / "other")]
    found = [provenance.describe(model)["base"]["name"] for model in models]
    assert found == [str(original), str(tmp_path / "other")]


def test_the_commit_on_the_hub_is_the_revision(original: Path, tmp_path: Path) -> None:
    config = tiny.transformers.AutoConfig.from_pretrained(original)
    config._commit_hash = "0123abcd"
    settings = fourfold.MoeBitsAndBytesConfig(**NF4)
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(
        original, config=config, quantization_config=settings
    )
    assert provenance.describe(model)["base"]["revision"] == "0123abcd"


def test_what_is_written(original: Path, tmp_path: Path) -> None:
    packed = tiny.packed_folder(original, tmp_path / "packed", **NF4, llm_int8_skip_modules=["lm_head"])
    out = adapter(packed, tmp_path / "adapter")
    said = json.loads((out / "fourfold.json").read_text())
    assert said["base"] == stored_base(packed)
    assert said["experts"] == {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
    assert said["linears"]["bits"] is None
    assert said["skips"] == ["lm_head"]
    assert said["shapes"] == {
        "mlp.experts.gate_up_proj": [2, 6, 64, 64],
        "mlp.experts.down_proj": [2, 6, 64, 32],
    }
    named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(original)


def test_several_adapters_and_selected_ones(original: Path, tmp_path: Path) -> None:
    model = with_lora(tiny.load(original, **NF4))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "all"))
    assert (tmp_path / "all" / "fourfold.json").is_file()
    assert (tmp_path / "all" / "second" / "fourfold.json").is_file()
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["second"])
    found = [str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("fourfold.json")]
    assert found == ["second/fourfold.json"]
    model.save_pretrained(str(tmp_path / "none"), is_main_process=False)
    assert not list((tmp_path / "none").rglob("fourfold.json"))


def test_trainer_checkpoints(original: Path, tmp_path: Path) -> None:
    model = with_lora(fourfold.prepare(tiny.load(original, **NF4)))
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, arguments, train_dataset=rows).train()
    assert provenance.read(tmp_path / "run" / "checkpoint-1")["base"]["name"] == str(original)


def test_adapters_of_transformers_own_mixin(original: Path, tmp_path: Path) -> None:
    needs.transformers_mixin()
    packed = tiny.packed_folder(original, tmp_path / "packed", **NF4)
    model = tiny.load(packed)
    targets = fourfold.expert_targets(model)
    model.add_adapter(LoraConfig(r=2, target_parameters=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert provenance.read(tmp_path / "adapter")["base"]["name"] == str(original)
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(original)
    again = tiny.load(original, **NF4)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    other = tiny.load(original, experts_quant_type="fp4")
    with pytest.raises(AdapterError, match="packed as NF4"):
        other.load_adapter(str(tmp_path / "adapter"))
    assert not any("lora" in name for name, _ in other.named_modules())


def test_a_folder_that_is_not_there_is_said_so_by_peft(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Can't find"):
        PeftModel.from_pretrained(tiny.load(original, **NF4), str(tmp_path / "no" / "such"))


def test_models_without_packed_experts_are_left_alone(original: Path, tmp_path: Path) -> None:
    with_lora(tiny.load(original)).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "fourfold.json").exists()
    packed = tiny.load(original, **NF4)
    with_lora(fourfold.dequantize(packed)).save_pretrained(tmp_path / "dequantized")
    assert not (tmp_path / "dequantized" / "fourfold.json").exists()


@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained])
def test_the_base_it_was_trained_on(original: Path, tmp_path: Path, load) -> None:
    """On the fly, from a packed copy, and from where the original has moved to."""
    out = adapter(original, tmp_path / "adapter", **NF4)
    packed = tiny.packed_folder(original, tmp_path / "packed", **NF4)
    moved = original.rename(tmp_path / "moved")
    for model in (tiny.load(packed), tiny.load(moved, **NF4)):
        load(model, str(out))


@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("format", "NF4 /64 double-quantized, and"),
        ("linears", "Linears"),
        ("weights", "other weights lie there"),
        ("shape", "experts of"),
        ("name", "elsewhere, and this is"),
    ],
)
def test_another_base_is_an_error(original: Path, tmp_path: Path, load, other: str, said: str) -> None:
    out = adapter(original, tmp_path / "adapter", **NF4)
    settings = dict(NF4)
    if other == "format":
        settings["bnb_4bit_use_double_quant"] = False
    elif other == "linears":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    elif other == "weights":
        file = original / "model.safetensors"
        tensors = load_file(file)
        key = next(k for k in tensors if k.endswith("q_proj.weight"))
        save_file(tensors | {key: tensors[key] + 1}, file, metadata={"format": "pt"})
    elif other == "shape":
        tiny.save(tiny.qwen3_moe(num_experts=4), original)
    else:
        said_base = json.loads((out / "fourfold.json").read_text())
        said_base["base"] |= {"name": "somebody/elsewhere", "fingerprint": None}
        (out / "fourfold.json").write_text(json.dumps(said_base))
    model = tiny.load(original, **settings)
    with pytest.raises(AdapterError, match=said) as caught:
        load(model, str(out))
    assert "remove" in str(caught.value)
    assert not any("lora" in name for name, _ in model.named_modules())
    if other != "shape":
        assert load_adapter(model, out, any_base=True)


@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained])
@pytest.mark.parametrize(
    "skips", [["lm_head", "k_proj"], ["layers.0.mlp.experts"], ["layers.0.self_attn.q_proj"]]
)
def test_other_modules_left_alone(original: Path, tmp_path: Path, load, skips: list[str]) -> None:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    wrapped = with_lora(tiny.load(original, **four, llm_int8_skip_modules=["layers.1.mlp.experts"]))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    again = tiny.load(original, **four, llm_int8_skip_modules=["layers.1.mlp.experts"])
    load(again, str(tmp_path / "adapter"))
    packed = [] if "layers.0.mlp.experts" in skips else ["layers.1.mlp.experts"]
    model = tiny.load(original, **four, llm_int8_skip_modules=[*packed, *skips])
    with pytest.raises(AdapterError, match=r"in high precision.*llm_int8_skip_modules"):
        load(model, str(tmp_path / "adapter"))


def test_what_is_left_is_the_same_with_any_adapter_on_it(original: Path) -> None:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["k_proj"]}
    bare = provenance.describe(tiny.load(original, **four))["left"]
    assert bare == ["lm_head"] + [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    lora = {"target_modules": ["k_proj", "q_proj"], "modules_to_save": ["lm_head"]}
    model = tiny.load(original, **four)
    targets = fourfold.expert_targets(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_parameters=targets, **lora))
    assert provenance.describe(wrapped)["left"] == bare
    assert provenance.describe(tiny.load(original, **NF4))["left"] == []  # no Linear is quantized


def test_a_second_adapter_is_checked_too(original: Path, tmp_path: Path) -> None:
    wrong = adapter(original, tmp_path / "wrong", experts_quant_type="fp4")
    model = with_lora(tiny.load(original, **NF4))
    with pytest.raises(AdapterError, match="FP4 /64, and these are NF4"):
        model.load_adapter(str(wrong), adapter_name="second")


@pytest.mark.parametrize("broken", ["{", "[]", '{"version": 99}', '{"version": 1}'])
def test_a_broken_file(original: Path, tmp_path: Path, broken: str) -> None:
    out = adapter(original, tmp_path / "adapter", **NF4)
    (out / "fourfold.json").write_text(broken)
    with pytest.raises(AdapterError, match="cannot be understood"):
        load_adapter(tiny.load(original, **NF4), out)


def test_stock_peft_reads_what_lies_beside(original: Path, tmp_path: Path) -> None:
    out = adapter(original, tmp_path / "adapter", **NF4)
    bare = shutil.copytree(out, tmp_path / "bare")
    (bare / "fourfold.json").unlink()
    answers = [tiny.logits(PeftModel.from_pretrained(tiny.load(original), str(f))) for f in (out, bare)]
    assert torch.equal(*answers)


def test_hotswapping_compares_the_base_as_well(original: Path, tmp_path: Path) -> None:
    model = with_lora(tiny.load(original, **NF4))
    wrong = adapter(original, tmp_path / "wrong", experts_quant_type="fp4")
    before = tiny.logits(model)
    with pytest.raises(AdapterError, match="packed as FP4"):
        hotswap_adapter(model, str(wrong), adapter_name="default", torch_device="cpu")
    assert torch.equal(tiny.logits(model), before)
    right = adapter(original, tmp_path / "right", **NF4)
    hotswap_adapter(model, str(right), adapter_name="default", torch_device="cpu")
    assert not torch.equal(tiny.logits(model), before)


def test_an_adapter_that_needs_its_base_is_not_told_to_lose_its_mark(original: Path, tmp_path: Path) -> None:
    model = tiny.load(original, **NF4)
    other = adapter(original, tmp_path / "other", experts_quant_type="fp4")
    file = Path(other) / "fourfold.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init": "loftq"}))
    with pytest.raises(AdapterError, match="right on its own base alone") as raised:
        PeftModel.from_pretrained(model, str(other))
    assert "remove" not in str(raised.value)


def test_a_swap_that_failed_leaves_nothing_behind(original: Path, tmp_path: Path, monkeypatch) -> None:
    from peft.utils import hotswap

    model = with_lora(tiny.load(original, **NF4))
    wrong = adapter(original, tmp_path / "wrong", experts_quant_type="fp4")
    right = adapter(original, tmp_path / "right", **NF4)
    with monkeypatch.context() as patch:
        patch.setattr(hotswap, "_insert_adapter_name_into_state_dict", None)  # fails after reading
        with pytest.raises(TypeError):
            hotswap.hotswap_adapter(model, str(wrong), "default", torch_device="cpu")
    state = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(Path(right) / "adapter_model.safetensors").items()
    }
    config = PeftConfig.from_pretrained(str(right))
    hotswap.hotswap_adapter_from_state_dict(
        model, state, "default", config
    )  # of another adapter: not refused
