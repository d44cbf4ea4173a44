"""LoRA on a GPU: the numbers of stock PEFT on a CPU, no host synchronisation, nothing of the size of W.

Every test is a function of the device, and runs on a CPU in the default suite.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fourfold
import own_forward
import parity
import tiny
from allocations import Allocations
from fourfold.experts import find_experts
from fourfold.experts.plain import PlainExperts
from fourfold.formats import PackFormat

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXACT = {"cpu": 1e-5, "cuda": 1e-4}
"""Of the output and of the worst factor's gradient in fp32: the bounds of the other tests on each device."""
NF4, INT8 = PackFormat("nf4", 64, True), PackFormat("int8")
CASES = [
    *(("packed", kind, fmt) for kind in parity.OWN_FORWARD for fmt in (NF4, INT8)),
    *(("prepared", kind, None) for kind in (*tiny.KINDS, *parity.DECORATED)),
    *(("packed", kind, NF4) for kind in (*tiny.KINDS, *parity.DECORATED)),
]
SEEDS = 3


def both(
    form: str, kind: str, fmt: PackFormat | None, dtype: torch.dtype, **settings: object
) -> tuple[nn.Module, nn.Module]:
    """Ours, packed or prepared, and stock's model of the same numbers in fp32; on a CPU."""
    if not parity.is_known(kind):
        pytest.skip(f"this transformers has no {kind}")
    model = parity.build(kind, **settings)
    routed = all(getattr(found.layout, "routed", False) for found in find_experts(model))
    if kind not in parity.OWN_FORWARD and not routed:
        pytest.skip(f"this transformers does not decorate the experts of {kind}")
    if fmt is not None:
        ours, stock = own_forward.pair_of(model, fmt, dtype)
    else:
        stock = model.to(dtype)
        stock.config._experts_implementation = "eager"
        ours = fourfold.prepare(copy.deepcopy(stock), gradient_checkpointing=False)
        assert any(isinstance(module, PlainExperts) for module in ours.modules())
    assert form == ("packed" if fmt else "prepared")
    return ours, stock.float()


def seen(
    model: nn.Module, ids: torch.Tensor = own_forward.IDS
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Output, gradients and the experts chosen, all brought to the CPU."""
    model.zero_grad()
    with parity.Chosen() as routed:
        y = own_forward.output(model, ids)
    probe = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    (y.float() * probe).sum().backward()
    found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if "lora_" in n}
    return y.detach().float().cpu(), found, [chosen.cpu() for chosen in routed.chosen]


def alike(ours: list[torch.Tensor], stock: list[torch.Tensor]) -> bool:
    assert len(ours) == len(stock) > 0
    return all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("form", "kind", "fmt"), CASES, ids=str)
def test_output_and_gradients_in_fp32(form: str, kind: str, fmt: PackFormat | None, device: str) -> None:
    ours, stock = both(form, kind, fmt, torch.float32)
    # What is beside the experts in whole fp32 as well (cuDNN rounds the inputs of convolutions to TF32).
    with torch.backends.cudnn.flags(allow_tf32=False), sdpa_kernel(SDPBackend.MATH):
        y, found, chosen = seen(own_forward.lora(ours).to(device))
        wanted_y, wanted, wanted_chosen = seen(own_forward.lora(stock))
    differ = [int((a != b).any(-1).sum()) for a, b in zip(chosen, wanted_chosen, strict=True)]
    assert alike(chosen, wanted_chosen), f"tokens at other experts, layer by layer: {differ}"
    assert (y - wanted_y).norm() <= EXACT[device] * wanted_y.norm()
    assert found.keys() == wanted.keys()
    assert all(gradient.any() for gradient in wanted.values())
    assert parity.worst(found, wanted) <= EXACT[device]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("form", "kind", "fmt"), CASES, ids=str)
def test_output_and_gradients_in_bf16(form: str, kind: str, fmt: PackFormat | None, device: str) -> None:
    """Mean of three adapters and inputs; those where rounding sends a token to other experts are left out."""
    settings = parity.ROUNDED_SETTINGS.get(kind, {})
    ours, stock = both(form, kind, fmt, torch.bfloat16, **settings)
    errors = []
    for seed in range(10 * SEEDS):
        torch.manual_seed(seed)
        ids = torch.randint(1, 64, own_forward.IDS.shape)
        y, found, chosen = seen(own_forward.lora(copy.deepcopy(ours), seed=seed).to(device), ids)
        wanted_y, wanted, wanted_chosen = seen(own_forward.lora(copy.deepcopy(stock), seed=seed), ids)
        if alike(chosen, wanted_chosen):
            off = float((y - wanted_y).norm() / wanted_y.norm())
            errors.append((off, parity.together(found, wanted)))
        if len(errors) == SEEDS:
            break
    assert len(errors) == SEEDS
    of_output, of_gradients = (sum(column) / SEEDS for column in zip(*errors, strict=True))
    assert of_output < parity.BF16_NOISE
    assert of_gradients < parity.BF16_NOISE


@contextlib.contextmanager
def no_host_synchronisation(device: str) -> Iterator[None]:
    """On CUDA every wait of the host for the device is an error; a CPU waits for nothing."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def experts_of(model: nn.Module) -> nn.Module:
    """The outermost wrapper around the first experts module."""
    return next(m for n, m in model.named_modules() if n.endswith(".experts"))


def call(experts: nn.Module, device: str, tokens: int = 24, hidden: int = 64, count: int = 4) -> Any:
    """Something to run again: forward and backward of an experts module, routed or dense, on fixed input."""
    x_TH = torch.randn(tokens, hidden).to(device, torch.bfloat16)
    index = torch.stack([torch.randperm(count)[:2] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, 2).to(device, torch.bfloat16)
    base = experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts
    dense = hasattr(base, "expert_dim")  # (llama4's: as many rows for every expert)

    def step() -> torch.Tensor:
        x = x_TH.clone().requires_grad_()
        y = experts(x) if dense else experts(x, index, weights)
        y.float().square().sum().backward()
        return y

    return step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("form", "kind", "fmt"),
    [
        # (privacy_filter's own forward multiplies in fp32, and so does ours: a loop on a GPU)
        *(case for case in CASES if case[1] not in (*parity.OWN_FORWARD, "privacy_filter")),
        # Its own forward never asks the device; those that take one expert after the other do.
        ("packed", "llama4", NF4),
        ("packed", "llama4", INT8),
    ],
    ids=str,
)
def test_no_host_synchronisation(form: str, kind: str, fmt: PackFormat | None, device: str) -> None:
    ours, _ = both(form, kind, fmt, torch.bfloat16)
    experts = experts_of(own_forward.lora(ours).to(device))
    step = call(experts, device)
    step()  # kernels are compiled
    experts.zero_grad()
    with no_host_synchronisation(device):
        y = step()
    assert y.isfinite().all()
    gradients = [p.grad for n, p in experts.named_parameters() if "lora_" in n]
    assert len(gradients) == 4
    assert all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.gpu
def test_a_synchronisation_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_synchronisation("cuda"):
        torch.ones(3, device="cuda").sum().item()


EXPERTS, HIDDEN, INNER = 4, 1024, 512
RANK = 8  # (others are padded to it on CUDA)
STACK = EXPERTS * HIDDEN * INNER  # elements of the smaller projection
SIZES = {
    "mixtral": {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INNER},
    "gpt_oss": {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INNER},
    "llama4": {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INNER},
    "longcat_flash": {"n_routed_experts": EXPERTS, "hidden_size": HIDDEN, "expert_ffn_hidden_size": INNER},
}


def measure(experts: nn.Module, device: str) -> tuple[list[int], list[int], int]:
    """Of forward and backward: storages made, those alive between the two, and the peak on CUDA in bytes."""
    step = call(experts, device, tokens=2 * EXPERTS, hidden=HIDDEN, count=EXPERTS)
    step()
    experts.zero_grad()
    gc.collect()
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    alive: list[int] = []
    with Allocations() as made:
        handle = experts.register_forward_hook(lambda *_: alive.extend(made.alive()))
        step()
    handle.remove()
    return made.sizes, alive, torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


def large(sizes: list[int]) -> int:
    return sum(size >= STACK for size in sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("form", "kind", "fmt"),
    [
        ("packed", "mixtral", NF4),
        ("packed", "gpt_oss", INT8),
        ("prepared", "mixtral", None),
        ("prepared", "gpt_oss", None),
    ],
    ids=str,
)
def test_in_low_rank_form_nothing_of_the_size_of_the_stack_is_allocated(
    form: str, kind: str, fmt: PackFormat | None, device: str
) -> None:
    ours, stock = both(form, kind, fmt, torch.bfloat16, **SIZES[kind])
    base, _, base_peak = measure(experts_of(ours.requires_grad_(False).to(device)), device)
    made, alive, peak = measure(experts_of(own_forward.lora(ours, r=RANK).to(device)), device)
    # (on CUDA a packed projection is decoded as a whole, with adapters or without)
    assert large(made) <= large(base)
    assert sum(made) - sum(base) < STACK
    assert sum(alive) < STACK
    if device == "cuda":
        assert peak - base_peak < STACK * 2  # bytes of bf16
    made, alive, _ = measure(experts_of(own_forward.lora(stock.bfloat16(), r=RANK).to(device)), device)
    assert large(made) > large(base)  # stock's wrapper is caught
    assert large(alive) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["longcat_flash", "llama4"])
def test_own_forwards_keep_no_sum_for_backward(kind: str, device: str) -> None:
    """One expert at a time where the forward takes them so; a whole projection where it multiplies all."""
    ours, stock = both("packed", kind, NF4, torch.bfloat16, **SIZES[kind])
    made, alive, _ = measure(experts_of(own_forward.lora(ours, r=RANK).to(device)), device)
    assert sum(alive) < STACK  # (of single experts too)
    assert (large(made) > 0) == (kind == "llama4")
    _, alive, _ = measure(experts_of(own_forward.lora(stock.bfloat16(), r=RANK).to(device)), device)
    assert large(alive) > 0  # stock's wrapper is caught
