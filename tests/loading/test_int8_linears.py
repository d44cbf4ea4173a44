"""Linears in INT8 hold what transformers' own operation makes of them, which takes a way over the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fourfold
import tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_int8_linears_are_those_of_stock(device: str, tmp_path) -> None:
    tiny.save(tiny.mixtral(), tmp_path)
    arguments = {"device_map": {"": device}, "dtype": torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), **arguments
    )
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=fourfold.MoeBitsAndBytesConfig(load_in_8bit=True), **arguments
    )
    count = 0
    for name, module in stock.named_modules():
        if type(module).__name__ != "Linear8bitLt":
            continue
        count += 1
        theirs, own = module.weight, ours.get_submodule(name).weight
        assert type(own) is type(theirs)
        assert own.device == theirs.device
        assert torch.equal(own, theirs)
        assert torch.equal(own.SCB, theirs.SCB)
        assert own.has_fp16_weights == theirs.has_fp16_weights
        assert own.CB.data_ptr() == own.data_ptr()
        assert not own.requires_grad
    assert count >= 4
