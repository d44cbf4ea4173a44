"""`fourfold quantize` on a GPU: the bytes that saving a model loaded there writes; nothing stays there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from fourfold.loading.quantize import quantize_checkpoint

pytestmark = pytest.mark.gpu
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_writes_what_save_pretrained_writes(tmp_path: Path, settings: dict) -> None:
    tiny.save(tiny.mixtral(hidden_size=128, intermediate_size=256), tmp_path / "model")
    config = fourfold.MoeBitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=config, device_map={"": 0}
    )
    model.save_pretrained(tmp_path / "saved")
    del model
    quantize_checkpoint(tmp_path / "model", tmp_path / "ours", config)
    ours, saved = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "saved"))
    assert ours.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in ours.items())


def test_nothing_stays_on_the_gpu(tmp_path: Path) -> None:
    tiny.save(tiny.mixtral(num_hidden_layers=16), tmp_path / "model")
    before, seen = torch.cuda.memory_allocated(), []

    def watch(_done: int, _total: int, _name: str) -> None:
        seen.append(torch.cuda.memory_allocated() - before)

    config = fourfold.MoeBitsAndBytesConfig(**SETTINGS["nf4"])
    written = quantize_checkpoint(
        tmp_path / "model", tmp_path / "out", config, device="cuda", progress=watch, max_shard_size="1MB"
    )
    assert len(seen) > 100
    assert max(seen) < written.bytes / 8
