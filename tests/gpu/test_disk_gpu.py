"""Experts on disk and a GPU that computes with them: the bits of resident ones, memory, faults."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

import fourfold
import offloading
import own_forward
import tiny
from fourfold.errors import CheckpointError
from fourfold.formats import PackFormat
from fourfold.offloading import disk, read_ahead
from fourfold.offloading.disk import DiskStreamer
from offloading import assert_equal, is_mapped, on_disk
from spoiling import Spoiling

pytestmark = pytest.mark.gpu
FORMATS = [PackFormat("nf4", 64, True), PackFormat("nf4"), PackFormat("int8")]


@pytest.fixture(autouse=True)
def _one_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whose gradients are the same each time; and several pieces to read."""
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1000)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=["plain", "spoiling"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "spoiling":
        monkeypatch.setattr(disk, "engine_for", Spoiling)


def steps(model: nn.Module, number: int = 3) -> list[torch.Tensor]:
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=1e-2)
    found = []
    for _ in range(number):
        y = own_forward.output(model, tiny.IDS.cuda())
        (y * torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)).sum().backward()
        found += [y.detach().clone(), *(p.grad.clone() for p in factors if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.usefixtures("poison_memory", "engine")
@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_every_layout_has_the_bits_of_a_resident_model(
    kind: str, fmt: PackFormat, buffers: int, tmp_path: Path
) -> None:
    model = own_forward.lora(offloading.packed_model(kind, fmt, layers=6)).cuda()
    own_forward.checkpoint_layers_(model, False)
    resident = copy.deepcopy(model)
    report = on_disk(model, tmp_path, buffers=buffers)
    assert is_mapped(model)
    assert report.pinned, report.unpinned
    assert_equal(steps(model), steps(resident))


@pytest.mark.usefixtures("engine")
def test_generation_and_back(tmp_path: Path) -> None:
    model = offloading.packed_model("qwen3_moe").cuda().eval()
    resident = copy.deepcopy(model)
    on_disk(model, tmp_path)
    for _ in range(2):
        ours, theirs = (
            m.generate(tiny.IDS.cuda(), max_new_tokens=5, do_sample=False) for m in (model, resident)
        )
        assert torch.equal(ours, theirs)
    fourfold.onload(model)
    assert all(p.is_cuda for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tiny.IDS.cuda()).logits, resident(tiny.IDS.cuda()).logits)


def test_loading_leaves_experts_in_their_files(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4}
    config = tiny.qwen3_moe(**sizes, num_hidden_layers=8)
    with torch.device("cuda"):
        tiny.build(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")

    def load(stored: str, **more: object) -> nn.Module:
        settings = fourfold.MoeBitsAndBytesConfig(
            experts_quant_type="nf4", bnb_4bit_use_double_quant=True, **more
        )
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / stored, quantization_config=settings, device_map={"": 0}, dtype=torch.bfloat16
        )

    resident = load("plain")
    resident.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = resident(tiny.IDS.cuda()).logits
    del resident
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load("packed", experts_device="disk")
    report = model.hf_quantizer.offloaded
    assert is_mapped(model)
    rest = sum(p.nbytes for p in model.parameters() if p.is_cuda)
    assert torch.cuda.memory_allocated() - before <= rest + 2**20
    with torch.no_grad():
        assert torch.equal(model(tiny.IDS.cuda()).logits, expected)
    assert torch.cuda.memory_allocated() - before <= rest + report.buffer_bytes + 2**20
    (made,) = report.streamers
    assert isinstance(made, DiskStreamer)
    assert made.engine.staged_bytes <= report.host_bytes
    assert made.read_bytes >= report.disk_bytes


def test_a_read_that_fails_reaches_the_step_and_the_next_one_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own_forward.lora(offloading.packed_model("qwen3_moe")).cuda()
    own_forward.checkpoint_layers_(model, False)
    resident = copy.deepcopy(model)
    on_disk(model, tmp_path, buffers=1)
    steps(copy.deepcopy(resident), 1)
    original, count = os.preadv, 0

    def preadv(fd: int, places: Any, offset: int) -> int:
        nonlocal count
        count += 1
        return 0 if count > 100 else original(fd, places, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match="it ends at byte"):
        steps(model, 20)
    monkeypatch.setattr(os, "preadv", original)
    model.zero_grad()
    state = {n: p for n, p in resident.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])
    assert_equal(steps(model), steps(resident))
