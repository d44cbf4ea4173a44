"""Offloaded experts on a GPU: the bits of resident ones, no host synchronisation, memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import fourfold
import offloading
import own_forward
import tiny
from fourfold.experts import PackedExperts
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.offloading import streamer
from fourfold.offloading.api import OffloadReport, offload, onload
from fourfold.offloading.budget import free_bytes
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from offloading import assert_equal
from spoiling import Spoiling
from tiny_chat import Settings, quiet

pytestmark = pytest.mark.gpu
FORMATS = [PackFormat("nf4", 64, True), PackFormat("nf4"), PackFormat("int8")]
MODULES = 6


@pytest.fixture(autouse=True)
def _one_attention() -> Iterator[None]:
    """Whose gradients are the same each time."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=["plain", "spoiling"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "spoiling":
        monkeypatch.setattr(streamer, "engine_for", Spoiling)
    return request.param


def steps(model: nn.Module, number: int = 3) -> list[torch.Tensor]:
    """Outputs, gradients and factors of some steps, in bf16 as trained."""
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    found = []
    for _ in range(number):
        with torch.autocast("cuda", torch.bfloat16):
            y = own_forward.output(model, tiny.IDS)
        (y.float() * torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)).sum().backward()
        found += [y.detach().clone(), *(p.grad.clone() for p in factors if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        found += [p.detach().clone() for p in factors]
    return found


def lora(model: nn.Module, checkpointing: str | None) -> nn.Module:
    model = own_forward.lora(model.cuda())
    if checkpointing is not None:
        own_forward.checkpoint_layers_(model, checkpointing == "reentrant")
    return model


@pytest.mark.usefixtures("poison_memory")  # (and so the same sums each time)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_every_layout_has_the_bits_of_a_resident_model(kind: str, fmt: PackFormat, engine: str) -> None:
    model = lora(offloading.packed_model(kind, fmt), "non-reentrant")
    plain = copy.deepcopy(model)
    resident = steps(plain)
    report = offload(model)
    assert report.pinned, report.unpinned
    assert_equal(steps(model), resident)


@pytest.mark.usefixtures("poison_memory")  # (and so the same sums each time)
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_every_kind_of_checkpointing(checkpointing: str | None, buffers: int, engine: str) -> None:
    model = lora(offloading.packed_model("qwen3_moe"), checkpointing)
    again, plain = copy.deepcopy(model), copy.deepcopy(model)
    resident = steps(plain)
    assert_equal(steps(again), resident)  # (else the comparison would say nothing)
    offload(model, buffers=buffers)
    assert_equal(steps(model), resident)


@pytest.mark.usefixtures("poison_memory")  # (and so the same sums each time)
@pytest.mark.parametrize("model_type", own_forward.TYPES)
def test_experts_that_keep_their_forward(model_type: str, engine: str) -> None:
    if not own_forward.is_known(model_type):
        pytest.skip("this version of transformers has no such model")
    model, _ = own_forward.pair(model_type)
    if model_type == "inkling_text":  # whose mask transformers 5.17 cannot bring into bf16 for sdpa
        model.set_attn_implementation("eager")
    model = lora(model.requires_grad_(False), None)
    resident = steps(copy.deepcopy(model))
    offload(model, buffers=1)
    assert_equal(steps(model), resident)


def test_generation(engine: str) -> None:
    model = lora(offloading.packed_model("qwen3_moe"), None).eval()
    plain = copy.deepcopy(model)
    offload(model)
    ids = tiny.IDS.cuda()
    ours, theirs = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, plain))
    assert torch.equal(ours, theirs)
    assert_equal(steps(model), steps(plain))


def test_decoding_brings_the_experts_that_are_hit(engine: str) -> None:
    chain = Chain()
    x = torch.randn(2, chain.H, device="cuda")

    def decoded() -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return [chain(x[:rows], False) for rows in (1, 2, 1, 2)]

    resident, total = decoded(), packed_bytes(chain)
    report = offload(chain)
    for _ in range(2):
        before = report.counts()["bytes"]
        assert_equal(decoded(), resident)
        assert report.counts()["bytes"] - before < 4 * total // 2
    assert report.counts()["fills"] == 0
    assert report.counts()["parts"] == 2 * 4 * MODULES
    x = torch.randn(chain.T, chain.H, device="cuda")
    streamed = passes(chain, x, True)
    onload(chain)
    assert_equal(streamed, passes(chain, x, True))


class Chain(nn.Module):
    """Experts modules one behind the other, and nothing else; sizes at which kernels of every kind run."""

    E, H, I, T, K = 32, 1024, 512, 512, 4  # noqa: E741

    def __init__(self, number: int = MODULES) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.experts = nn.ModuleList(self._module() for _ in range(number))
        self.register_buffer("index", torch.stack([torch.randperm(self.E)[: self.K] for _ in range(self.T)]))
        self.register_buffer("weights", torch.rand(self.T, self.K))
        self.cuda()

    def _module(self) -> PackedExperts:
        """Random bytes are NF4 weights too; scales that keep the sums in range."""
        made = []
        for shape in (StackShape(self.E, 2 * self.I, self.H, 2), StackShape(self.E, self.H, self.I)):
            stack = PackedStack.empty(offloading.NF4, shape, "cpu")
            stack.data.random_(0, 256)
            stack.absmax.random_(0, 256)
            assert stack.absmax_scale is not None
            assert stack.absmax_offset is not None
            stack.absmax_scale.view(torch.float32).fill_(0.01)
            stack.absmax_offset.view(torch.float32).fill_(0.05)
            made.append(stack)
        return offloading.module_of(*made)

    def forward(self, x: torch.Tensor, recomputed: bool) -> torch.Tensor:
        for module in self.experts:
            routing = (self.index[: len(x)], self.weights[: len(x)])
            arguments = (nn.functional.layer_norm(x, x.shape[-1:]), *routing)
            if recomputed:
                y = checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                y = module(*arguments)
            x = x + y
        return x


def passes(chain: Chain, x: torch.Tensor, recomputed: bool) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = chain(x, recomputed)
    y.float().square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, y.detach(), x.grad]


@pytest.mark.parametrize("recomputed", [False, True])
def test_no_host_synchronisation_and_the_same_bits(recomputed: bool, engine: str) -> None:
    chain = Chain()
    x = torch.randn(chain.T, chain.H, device="cuda")
    for _ in range(2):
        resident = passes(chain, x, recomputed)
    assert all(t.isfinite().all() for t in resident)
    report = offload(chain)
    for _ in range(2):
        assert_equal(passes(chain, x, recomputed), resident)
    before = report.counts()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [passes(chain, x, recomputed) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours in found:
        assert_equal(ours, resident)
    after = report.counts()
    assert after["misses"] == before["misses"]
    assert after["fills"] - before["fills"] == 3 * 2 * (MODULES - 2)


def packed_bytes(model: nn.Module) -> int:
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    return sum(p.nbytes for m in experts for p in m.parameters(recurse=False))


def peak(chain: Chain, x: torch.Tensor) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        passes(chain, x, True)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def test_the_gpu_holds_the_buffers_alone_and_gets_everything_back() -> None:
    chain = Chain()
    x = torch.randn(chain.T, chain.H, device="cuda")
    total, one = packed_bytes(chain), packed_bytes(chain) // MODULES
    passes(chain, x, True)  # (workspaces and tables are made once)
    resident, held = peak(chain, x), torch.cuda.memory_allocated()
    report = offload(chain)
    assert torch.cuda.memory_allocated() <= held - total
    slack = 2**20
    assert peak(chain, x) <= resident - total + report.buffer_bytes + slack
    assert report.buffer_bytes <= 2 * one + slack
    half = offload(chain, budget=4 * one + slack)
    assert len(half.resident) == 2
    assert half.pinned
    assert peak(chain, x) <= resident - total + 4 * one + 2 * slack
    onload(chain)
    gc.collect()
    assert abs(torch.cuda.memory_allocated() - held) <= slack
    assert all(p.is_cuda for p in chain.parameters())


def test_a_copy_under_way_does_not_write_to_memory_that_others_got() -> None:
    chain = Chain(3)
    x = torch.randn(chain.T, chain.H, device="cuda")
    report = offload(chain)
    passes(chain, x, False)
    (streamer,) = report.streamers
    nbytes = streamer._memory[0].nbytes
    torch.cuda.synchronize()
    with torch.cuda.stream(streamer.engine.stream):
        torch.cuda._sleep(200_000_000)  # (a copy that takes its time)
    streamer.schedule()._fill(0, streamer.schedule().slots[0])
    del chain, report, streamer
    gc.collect()
    others = [torch.full((nbytes,), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert all(bool((t == 7).all()) for t in others)


def test_moving_the_model_leaves_experts_in_host_memory() -> None:
    chain = Chain(2)
    offload(chain)
    chain.to("cuda")
    chain.to(torch.bfloat16)
    assert all(p.device.type == "cpu" and p.is_pinned() for p in chain.parameters())


def test_pinned_memory_comes_and_goes() -> None:
    """Pages that go must take their registration along: others come to the same addresses."""
    chain = Chain(3)
    x = torch.randn(chain.T, chain.H, device="cuda")
    resident = passes(chain, x, False)
    reports: list[OffloadReport] = []
    for _ in range(4):
        reports.append(offload(chain, pin=True))
        assert_equal(passes(chain, x, False), resident)
        onload(chain)
        gc.collect()
    assert all(report.pinned for report in reports)


def test_pageable_memory_serves_as_well() -> None:
    chain = Chain(3)
    x = torch.randn(chain.T, chain.H, device="cuda")
    resident = passes(chain, x, True)
    report = offload(chain, pin=False)
    assert not report.pinned
    assert not any(p.is_pinned() for p in chain.parameters())
    assert_equal(passes(chain, x, True), resident)


def test_the_automatic_budget_keeps_all_where_there_is_room() -> None:
    chain = Chain(3)
    report = offload(chain, "auto", reserve=0)
    assert not report.streamed
    total = packed_bytes(chain)
    wanted = total * 5 // 6  # room for two buffers
    tight = offload(chain, "auto", reserve=total + free_bytes(torch.device("cuda")) - wanted)
    assert len(tight.streamed) == 3
    assert tight.buffers == 2


def test_loading_never_holds_the_experts_on_the_gpu(tmp_path: Path) -> None:
    """Packed on the way and read packed; then a step, and back onto the GPU."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4}
    config = tiny.qwen3_moe(**sizes, num_hidden_layers=8)
    with torch.device("cuda"):
        made = tiny.build(config).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "plain")
    del made

    def load(stored: str, **more: object) -> nn.Module:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        settings = fourfold.MoeBitsAndBytesConfig(
            experts_quant_type="nf4", bnb_4bit_use_double_quant=True, **more
        )
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / stored, quantization_config=settings, device_map={"": 0}, dtype=torch.bfloat16
        )

    resident = load("plain")
    resident.save_pretrained(tmp_path / "packed")
    total = packed_bytes(resident)
    with torch.no_grad():
        expected = resident(tiny.IDS.cuda()).logits
    del resident
    for stored in ("plain", "packed"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = load(stored, experts_device="cpu")
        held = torch.cuda.memory_allocated() - before
        assert torch.cuda.max_memory_allocated() - before <= held + total // 4
        report = model.hf_quantizer.offloaded
        assert report.pinned, report.unpinned
        assert report.host_bytes == total
        experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
        assert all(p.device.type == "cpu" and p.is_pinned() for m in experts for p in m.parameters())
        with torch.no_grad():
            assert torch.equal(model(tiny.IDS.cuda()).logits, expected)
        onload(model)
        with torch.no_grad():
            assert torch.equal(model(tiny.IDS.cuda()).logits, expected)
        del model, experts, report


@pytest.mark.usefixtures("poison_memory")
def test_a_run_from_host_memory_has_the_losses_of_a_resident_one(settings: Settings, tmp_path: Path) -> None:
    curves = {}
    for where in (None, "cpu", "auto"):
        changes = {"bf16": True, "gradient_checkpointing": True, "eval_steps": 0, "max_steps": 4}
        out = str(tmp_path / str(where))
        config = TrainConfig(**settings(**changes, experts_offload=where, output_dir=out))
        result = run(config, quiet())
        curves[where] = result.curve.train
        if where is not None:
            assert result.offload is not None
            assert (result.offload["streamed_modules"] > 0) == (where == "cpu")
    assert curves["cpu"] == curves["auto"] == curves[None]
