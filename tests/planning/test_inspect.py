"""Parameters of a packed checkpoint, counted as weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from fourfold.planning.inspect import inspect_model


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_a_packed_checkpoint_has_as_many_expert_parameters_more_than_it_stores(
    tmp_path: Path, kind: str, settings: dict[str, bool]
) -> None:
    model = AutoModelForCausalLM.from_config(tiny.KINDS[kind](), dtype=torch.float32)
    model.save_pretrained(tmp_path / "float")
    config = fourfold.MoeBitsAndBytesConfig(
        **settings, llm_int8_skip_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    packed = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    before, after = inspect_model(tmp_path / "float"), inspect_model(tmp_path / "packed")
    assert after.expert_params == before.expert_params
    assert after.total_params == before.total_params == sum(p.numel() for p in model.parameters())
