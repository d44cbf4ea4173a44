"""Offloaded experts give the very bits of a model that is on its device: outputs, gradients, steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import needs
import offload_invariance
import offloading
import own_forward
import tiny
from fourfold.experts import PackedExperts
from fourfold.formats import PackFormat
from fourfold.kernels import linear
from fourfold.offloading import streamer
from fourfold.offloading.api import offload
from offloading import assert_equal, steps

needs.triton()
FORMATS = list(offload_invariance.FORMATS.values())
ENGINES = ["early", "late"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Copies at the earliest and at the latest moment that is allowed."""
    if request.param == "late":
        monkeypatch.setattr(streamer, "engine_for", lambda device: offloading.LateEngine())
    return request.param


def trained(model: nn.Module, checkpointing: str | None, **arguments: Any) -> list[torch.Tensor]:
    model = own_forward.lora(model)
    if checkpointing is not None:
        own_forward.checkpoint_layers_(model, checkpointing == "reentrant")
    if arguments:
        report = offload(model, **arguments)
        assert report.streamed
    return steps(model)


def compare(model: nn.Module, checkpointing: str | None, buffers: int = 2, **arguments: Any) -> None:
    resident = trained(copy.deepcopy(model), checkpointing)
    assert_equal(trained(model, checkpointing, buffers=buffers, **arguments), resident)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_every_layout_in_every_format(kind: str, fmt: PackFormat, engine: str) -> None:
    compare(offloading.packed_model(kind, fmt), "non-reentrant")


@pytest.mark.parametrize(
    ("checkpointing", "buffers"),
    [(None, 2), ("non-reentrant", 1), ("non-reentrant", 3), ("reentrant", 2), ("reentrant", 1)],
)
def test_every_kind_of_checkpointing(checkpointing: str | None, buffers: int, engine: str) -> None:
    compare(offloading.packed_model("qwen3_moe"), checkpointing, buffers)


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
@pytest.mark.parametrize("model_type", own_forward.TYPES)
def test_experts_that_keep_their_forward(model_type: str, checkpointing: str | None, engine: str) -> None:
    """One buffer: these models have two layers, and would keep both."""
    if not own_forward.is_known(model_type):
        pytest.skip("this version of transformers has no such model")
    model, _ = own_forward.pair(model_type)
    if checkpointing and not model.supports_gradient_checkpointing:
        pytest.skip("the model has no checkpointing")
    compare(model.requires_grad_(False), checkpointing, 1)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_some_modules_stay(share: float, engine: str) -> None:
    model = offloading.packed_model("qwen3_moe", layers=7)
    sizes = [streamer.Unit([m]).nbytes for m in model.modules() if isinstance(m, PackedExperts)]
    budget = int(share * sum(sizes))
    report = offload(copy.deepcopy(model), budget)
    assert report.resident
    assert report.streamed
    assert report.resident_bytes + report.buffer_bytes <= budget
    compare(model, "non-reentrant", budget=budget)


def test_the_layer_in_one_step(engine: str) -> None:
    """What runs on CUDA by default, through Triton's interpreter."""
    from fourfold.formats import PackedStack, StackShape
    from fourfold.formats.quantize import pack_stack
    from fourfold.formats.remote import RemoteStack
    from fourfold.kernels import LowRank, route
    from fourfold.kernels.layer import silu_experts

    E, T, k, H, I, R = 4, 9, 2, 64, 32, 4  # noqa: E741

    def stacks(seed: int) -> list[PackedStack]:
        torch.manual_seed(seed)
        made = []
        for shape in (StackShape(E, 2 * I, H, 2), StackShape(E, H, I)):
            stack = PackedStack.empty(offloading.NF4, shape, "cpu")
            pack_stack(stack, torch.randn(E, shape.rows, shape.columns) * 0.1, "experts")
            made.append(stack)
        return made

    layers = [stacks(seed) for seed in range(4)]
    modules = [offloading.module_of(*layer) for layer in layers]
    made = streamer.Streamer([streamer.Unit([m]) for m in modules], torch.device("cpu"))
    hosts = [streamer.HostExperts(made, number, 0) for number in range(len(modules))]

    def results(away: bool) -> list[torch.Tensor]:
        torch.manual_seed(9)
        x = torch.randn(T, H).requires_grad_()
        index = torch.stack([torch.randperm(E)[:k] for _ in range(T)])
        weights, routing = torch.rand(T, k).requires_grad_(), route(index, E)
        shapes = [(E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R)]
        factors = [(torch.randn(s) * 0.1).requires_grad_() for s in shapes]
        y = x
        for layer, module, host in zip(layers, modules, hosts, strict=True):
            up, down = layer
            if away:
                up, down = (host.stack(p) for p in module.fourfold_layout.projections)
                assert isinstance(up, RemoteStack)
            low = (LowRank(*factors[:2]), LowRank(*factors[2:]))
            y = silu_experts(y, weights, routing, up, down, *low, compute_dtype=torch.float32)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weights, *factors])]

    for _ in range(2):
        assert_equal(results(True), results(False))


def test_a_stack_kept_from_forward_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that these tests are for: tensors of a buffer that are used after it was given away."""
    import contextlib

    monkeypatch.setattr(streamer, "engine_for", lambda device: offloading.LateEngine())
    model = own_forward.lora(offloading.packed_model("qwen3_moe"))
    expected = steps(copy.deepcopy(model), 1)
    original, kept = linear.in_use, {}

    @contextlib.contextmanager
    def keeping(stack: Any) -> Any:
        if id(stack) in kept:
            yield kept[id(stack)]
            return
        with original(stack) as kept[id(stack)]:
            yield kept[id(stack)]

    monkeypatch.setattr(linear, "in_use", keeping)
    offload(model)
    found = steps(model, 1)
    assert torch.equal(found[0], expected[0])  # (forward brings each once)
    assert not all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


def test_an_exception_inside_a_step_leaves_the_next_one_right(engine: str) -> None:
    model = own_forward.lora(offloading.packed_model("qwen3_moe"))
    own_forward.checkpoint_layers_(model, False)
    expected = steps(copy.deepcopy(model))
    report = offload(model)
    gates = [m for m in model.modules() if isinstance(m, PackedExperts)]

    def broken(*_: Any) -> Any:
        raise FloatingPointError("on the way")

    for gate in gates:
        apply = gate._apply_gate
        gate._apply_gate = broken
        with pytest.raises(FloatingPointError):
            own_forward.output(model, tiny.IDS)
        gate._apply_gate = apply
    for number in range(3):  # in backward, at several depths
        y = own_forward.output(model, tiny.IDS)
        apply, gates[number]._apply_gate = gates[number]._apply_gate, broken
        with pytest.raises(FloatingPointError):
            y.sum().backward()
        gates[number]._apply_gate = apply
    model.zero_grad()
    (schedule,) = (s.schedule() for s in report.streamers)
    assert all(not slot.users for slot in schedule.slots)
    assert_equal(steps(model), expected)


def test_evaluation_and_generation(engine: str) -> None:
    model = own_forward.lora(offloading.packed_model("qwen3_moe")).eval()
    plain = copy.deepcopy(model)
    offload(model)
    for mode in (torch.inference_mode, torch.no_grad):  # (buffers are made in the first)
        with mode():
            assert torch.equal(model(tiny.IDS).logits, plain(tiny.IDS).logits)
    ours, theirs = (m.generate(tiny.IDS, max_new_tokens=5, do_sample=False) for m in (model, plain))
    assert torch.equal(ours, theirs)
    assert_equal(steps(model), steps(plain))


def test_accumulated_gradients(engine: str) -> None:
    model = own_forward.lora(offloading.packed_model("qwen3_moe"))
    plain = copy.deepcopy(model)
    offload(model)
    for m in (model, plain):
        for _ in range(3):
            own_forward.output(m, tiny.IDS).square().mean().backward()
    ours, theirs = ([p.grad for p in m.parameters() if p.requires_grad] for m in (model, plain))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
def test_decoding_brings_the_experts_that_are_hit(fmt: PackFormat, engine: str) -> None:
    model = tiny.build(tiny.qwen3_moe(num_experts=24, num_experts_per_tok=2, num_hidden_layers=4))
    plain = copy.deepcopy(offloading.pack_(model, fmt))
    report = offload(model)
    sizes = [unit.nbytes for unit in report.streamers[0].units]
    prompt = tiny.IDS[:, :1]
    with torch.no_grad():
        for ids in (prompt, tiny.IDS[:1, 3:5], tiny.IDS):  # (the last hits too many)
            assert torch.equal(model(ids).logits, plain(ids).logits)
            if ids is not tiny.IDS:
                counts = report.counts()
                assert counts["fills"] == 0
        assert report.counts()["fills"] > 0
    assert report.counts()["parts"] == 2 * 4
    ours, theirs = (m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, plain))
    assert torch.equal(ours, theirs)
    assert max(sizes) < streamer.WHOLE_BYTES  # (so tensors were brought whole; see the next test)


def test_large_tensors_are_brought_expert_by_expert(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamer, "WHOLE_BYTES", 16)
    model = tiny.build(tiny.qwen3_moe(num_experts=24, num_experts_per_tok=2, num_hidden_layers=4))
    plain = copy.deepcopy(offloading.pack_(model))
    report = offload(model)
    sizes = [unit.nbytes for unit in report.streamers[0].units]
    with torch.no_grad():
        for ids in (tiny.IDS[:1, :1], tiny.IDS[:1, 4:7], tiny.IDS[1:, 2:4]):
            before = report.counts()["bytes"]
            assert torch.equal(model(ids).logits, plain(ids).logits)
            assert report.counts()["bytes"] - before <= sum(sizes) // 4
    parts = report.counts()["parts"]
    model(tiny.IDS[:1, :1])  # (a backward may follow, which would bring them again)
    assert report.counts()["parts"] == parts
    model = own_forward.lora(model)  # (and nothing of it is left behind)
    assert_equal(steps(model), steps(own_forward.lora(plain)))
