"""``experts_device="cpu"``: packed experts go to host memory while the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fourfold
import tiny
from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.quantizer import FourfoldQuantizer
from fourfold.offloading import host
from offloading import Driver

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a driver")
NF4 = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def experts(model: nn.Module) -> list[PackedExperts]:
    return [m for m in model.modules() if isinstance(m, PackedExperts)]


@pytest.mark.parametrize("stored", ["plain", "packed"])
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_the_same_model_as_without(kind: str, stored: str, tmp_path: Path) -> None:
    tiny.save(tiny.KINDS[kind](), tmp_path / "plain")
    if stored == "packed":
        tiny.packed_folder(tmp_path / "plain", tmp_path / "packed", **NF4)
    resident = tiny.load(tmp_path / stored, **NF4)
    model = tiny.load(tmp_path / stored, **NF4, experts_device="cpu")
    assert experts(model)
    assert all(m.fourfold_host is not None for m in experts(model))
    assert all(m.fourfold_arrives is None for m in experts(model))
    report = model.hf_quantizer.offloaded
    assert len(report.streamed) == len(experts(model))
    # (the loader's own threads may have begun some of them)
    assert model.hf_quantizer.read_ahead_bytes <= (report.host_bytes if stored == "packed" else 0)
    assert torch.equal(tiny.logits(model), tiny.logits(resident))
    ours, theirs = model.state_dict(), resident.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert fourfold.verify(model).to_dict() == fourfold.verify(resident).to_dict()


@without_cuda
@pytest.mark.parametrize("stored", ["plain", "packed"])
def test_every_packed_tensor_lies_in_pinned_memory_once(stored: str, tmp_path: Path, driver: Driver) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path / "plain")
    if stored == "packed":
        tiny.packed_folder(tmp_path / "plain", tmp_path / "packed", **NF4)
    model = tiny.load(tmp_path / stored, **NF4, experts_device="cpu")
    tensors = [p for m in experts(model) for p in m.parameters(recurse=False)]
    assert {t.data_ptr() for t in tensors} == set(driver.pages)
    assert model.hf_quantizer.offloaded.pinned


def test_saved_and_reloaded_without_a_trace(tmp_path: Path) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path / "plain")
    model = tiny.load(tmp_path / "plain", **NF4, experts_device="cpu")
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert "experts_device" not in written
    resident = tiny.load(tmp_path / "packed")
    assert all(m.fourfold_host is None for m in experts(resident))
    assert torch.equal(tiny.logits(resident), expected)


@pytest.mark.parametrize("passes", [0, 1])
def test_dequantized_from_host_memory(passes: int, tmp_path: Path) -> None:
    """More layers than buffers: while one is unpacked, nothing else of the model may be asked for."""
    tiny.save(tiny.gpt_oss(num_hidden_layers=4), tmp_path / "plain")
    resident = tiny.load(tmp_path / "plain", **NF4).dequantize()
    model = tiny.load(tmp_path / "plain", **NF4, experts_device="cpu")
    for _ in range(passes):
        tiny.logits(model)
    model = model.dequantize()
    assert not experts(model)
    assert all(not hasattr(m, "fourfold_host") for m in model.modules())
    assert torch.equal(tiny.logits(model), tiny.logits(resident))


def test_device_maps_and_warm_up_count_no_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path)
    sizes: dict[bool, set[float]] = {True: set(), False: set()}
    original = FourfoldQuantizer._process_model_after_weight_loading

    def after(self: FourfoldQuantizer, model: nn.Module, **kwargs: object) -> nn.Module:
        for name, parameter in model.named_parameters():
            if self.packing_target(model, name) is not None:
                sizes[self._host is not None].add(self.param_element_size(model, name, parameter))
        return original(self, model, **kwargs)

    monkeypatch.setattr(FourfoldQuantizer, "_process_model_after_weight_loading", after)
    tiny.load(tmp_path, **NF4)
    tiny.load(tmp_path, **NF4, experts_device="cpu")
    assert sizes[True] == {0}
    assert all(size > 0 for size in sizes[False])


def test_too_little_host_memory_is_found_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path)
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigurationError, match=r"packed experts of the model take .* GiB can be had"):
        tiny.load(tmp_path, **NF4, experts_device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NF4 | {"experts_device": "ssd"}, r"experts_device='ssd'; valid are 'cpu' .* 'disk'"),
        (NF4 | {"experts_device": 0}, r"experts_device=0; valid are 'cpu'"),
        (
            {"load_in_4bit": True, "experts_quant_type": "none", "experts_device": "cpu"},
            "is for packed experts, and these stay in high precision",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MoeBitsAndBytesConfig(**settings)


def test_a_map_over_several_devices_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny.save(tiny.qwen3_moe(), tmp_path)
    config = MoeBitsAndBytesConfig(**NF4, experts_device="cpu")
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "": 1}
    with pytest.raises(ConfigurationError, match=r"several devices \(0, 1\).*fourfold\.offload"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=device_map)
