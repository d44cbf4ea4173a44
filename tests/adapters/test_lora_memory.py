"""What LoRA allocates: in low-rank form nothing of the size of W or BA; stock is the negative control."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fourfold
import tiny
from allocations import Allocations
from fourfold.experts import find_experts, pack_module_, unpack_module_
from fourfold.formats import PackFormat

EXPERTS = 8


def allocated(model: nn.Module) -> list[int]:
    """By the first layer's experts, forward and backward."""
    experts = next(m for n, m in model.named_modules() if n.endswith("mlp.experts"))
    torch.manual_seed(0)
    x_TH = torch.randn(6, 64, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(6)])
    with Allocations() as seen:
        experts(x_TH, index, torch.full((6, 2), 0.5)).sum().backward()
    return seen.sizes


@pytest.fixture
def packed() -> nn.Module:
    model = tiny.build(tiny.mixtral(num_local_experts=EXPERTS, intermediate_size=128)).requires_grad_(False)
    for found in list(find_experts(model)):
        pack_module_(found.module, PackFormat("nf4", 64, True), found.name, found.layout)
    return model


def with_lora(model: nn.Module) -> nn.Module:
    targets = fourfold.expert_targets(model)
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    return get_peft_model(model, config)


def exceeds(lora: list[int], base: list[int]) -> tuple[bool, bool]:
    """Whether one storage, and whether all that LoRA adds, is of the size of the smaller projection."""
    stack = EXPERTS * 64 * 128
    return max(lora) >= stack, sum(lora) - sum(base) >= stack


def test_low_rank_form_allocates_nothing_of_the_size_of_the_stack(packed) -> None:
    base = allocated(packed)
    assert exceeds(allocated(with_lora(packed)), base) == (False, False)


def test_nor_does_it_on_unquantized_experts_that_were_prepared(packed) -> None:
    for found in list(find_experts(packed)):
        unpack_module_(found.module, torch.float32)
    base = allocated(packed)
    prepared = fourfold.prepare(packed, gradient_checkpointing=False)
    assert exceeds(allocated(with_lora(prepared)), base) == (False, False)


def test_stocks_wrapper_is_caught(packed) -> None:
    plain = copy.deepcopy(packed)
    for found in list(find_experts(plain)):
        unpack_module_(found.module, torch.float32)
    base = allocated(plain)
    assert exceeds(allocated(with_lora(plain)), base) == (True, True)
