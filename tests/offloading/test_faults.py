"""What goes wrong on the way, or at the same time, leaves offloaded experts as they were and usable."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fourfold
import offloading
import own_forward
import tiny
from fourfold.errors import ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.offloading import api, budget, streamer
from fourfold.offloading.engine import CudaEngine
from fourfold.offloading.streamer import HostExperts, Streamer

LAYERS = 3


class BrokenError(Exception):
    """On the way."""


def step(model: nn.Module) -> list[torch.Tensor]:
    """Output and gradients of a step."""
    model.zero_grad()
    y = own_forward.output(model)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 3
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def experts(model: nn.Module) -> list[PackedExperts]:
    return [m for m in model.modules() if isinstance(m, PackedExperts)]


def trainable(checkpointing: bool | None) -> nn.Module:
    model = own_forward.lora(offloading.packed_model("qwen3_moe", layers=LAYERS))
    if checkpointing is not None:
        own_forward.checkpoint_layers_(model, checkpointing)
    return model


class Fuse:
    """Raises at its ``at``-th call, and counts them."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise BrokenError


def inside_uses(fuse: Fuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the buffer was given, before anything was computed with it."""
    use = Streamer.use

    @contextlib.contextmanager
    def broken(self: Streamer, unit: int) -> Iterator[Any]:
        with use(self, unit) as stacks:
            fuse()
            yield stacks

    monkeypatch.setattr(Streamer, "use", broken)


def behind_uses(fuse: Fuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """After all that was computed with the buffer, before it is given back."""
    use = Streamer.use

    @contextlib.contextmanager
    def broken(self: Streamer, unit: int) -> Iterator[Any]:
        with use(self, unit) as stacks:
            yield stacks
            fuse()

    monkeypatch.setattr(Streamer, "use", broken)


def in_copies(fuse: Fuse, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = offloading.LateEngine.fill

    def broken(self: offloading.LateEngine, copies: Any, after: list[Any]) -> int:
        fuse()
        return fill(self, copies, after)

    monkeypatch.setattr(offloading.LateEngine, "fill", broken)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("place", [inside_uses, behind_uses, in_copies])
def test_an_exception_at_any_point_of_a_step_leaves_the_next_one_right(
    place: Callable[[Fuse, pytest.MonkeyPatch], None],
    checkpointing: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward, recomputation and backward: at every use of a buffer and every copy that a step makes."""
    monkeypatch.setattr(streamer, "engine_for", lambda device: offloading.LateEngine())
    model = trainable(checkpointing)
    expected = step(copy.deepcopy(model))
    report = fourfold.offload(model)
    assert_equal(step(model), expected)
    broken = 0
    for at in range(1, 100):
        fuse = Fuse(at)
        with monkeypatch.context() as patch:
            place(fuse, patch)
            try:
                step(model)
            except BrokenError:
                broken += 1
        (schedule,) = (s.schedule() for s in report.streamers)
        assert all(not slot.users and slot.part_of is None for slot in schedule.slots), at
        assert_equal(step(model), expected)
        if fuse.calls < at:
            break
    assert broken == at - 1 >= (2 * (LAYERS - 2) if place is in_copies else 3 * LAYERS)


def test_an_exception_while_decoding_leaves_the_next_token_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamer, "engine_for", lambda device: offloading.LateEngine())
    model = tiny.build(tiny.qwen3_moe(num_experts=24, num_experts_per_tok=2, num_hidden_layers=LAYERS))
    plain = copy.deepcopy(offloading.pack_(model))
    report = fourfold.offload(model)
    ids = tiny.IDS[:1, :1]
    with torch.no_grad():
        expected = plain(ids).logits
        for at in range(1, LAYERS + 1):
            with monkeypatch.context() as patch:
                in_copies(Fuse(at), patch)
                with pytest.raises(BrokenError):
                    model(ids)
            assert torch.equal(model(ids).logits, expected)
    assert report.counts()["fills"] == 0
    assert report.counts()["parts"] > LAYERS


def test_two_models_share_nothing() -> None:
    models = [own_forward.lora(offloading.packed_model("qwen3_moe", layers=LAYERS), seed=s) for s in (1, 2)]
    expected = [step(copy.deepcopy(model)) for model in models]
    for model in models:
        fourfold.offload(model)
    for _ in range(2):  # (in turns, and one inside of the other)
        for model, wanted in zip(models, expected, strict=True):
            assert_equal(step(model), wanted)
    y = own_forward.output(models[0])
    assert_equal(step(models[1]), expected[1])
    assert torch.equal(y, expected[0][0])
    fourfold.onload(models[0])
    assert_equal(step(models[1]), expected[1])


@pytest.mark.parametrize("decoding", [False, True])
def test_threads_that_compute_at_once(decoding: bool) -> None:
    """Two threads, two buffers for each (a module that computes, and the one inside of its use)."""
    model = tiny.build(tiny.qwen3_moe(num_experts=24, num_experts_per_tok=2, num_hidden_layers=LAYERS))
    offloading.pack_(model)
    inputs = [tiny.IDS[:, :1], tiny.IDS[:, 1:2]] if decoding else [tiny.IDS, tiny.IDS.flip(1)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
    fourfold.offload(model, buffers=3)
    start, found = threading.Barrier(2), [True, True]
    failures: list[BaseException] = []

    def compute(which: int) -> None:
        start.wait()
        try:
            for _ in range(15):
                with torch.no_grad():
                    found[which] &= torch.equal(model(inputs[which]).logits, expected[which])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=compute, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert found == [True, True]


def test_buffers_that_go_while_a_thread_computes() -> None:
    """Uses that were begun keep their memory; what begins then finds new buffers."""
    model = offloading.packed_model("qwen3_moe", layers=LAYERS)
    expected = tiny.logits(model)
    (made,) = fourfold.offload(model).streamers
    found, over = [], threading.Event()

    def compute() -> None:
        found.extend(torch.equal(tiny.logits(model), expected) for _ in range(10))
        over.set()

    thread = threading.Thread(target=compute)
    thread.start()
    closed = 0
    while not over.wait(0.001):
        made.close()
        closed += 1
    thread.join()
    assert closed > 1
    assert found == [True] * 10
    assert made.counts.fills >= 10 * (LAYERS - 2)


def test_a_backward_after_onload_has_the_gradients_of_its_forward() -> None:
    model = trainable(None)
    expected = step(copy.deepcopy(model))
    fourfold.offload(model)
    y = own_forward.output(model)
    fourfold.onload(model)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert_equal([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], expected)


def test_counts_go_on_when_buffers_are_made_anew() -> None:
    model = offloading.packed_model("qwen3_moe", layers=LAYERS)
    report = fourfold.offload(model)
    tiny.logits(model)
    once = report.counts()["bytes"]
    report.streamers[0].close()
    tiny.logits(model)
    assert once > 0
    assert report.counts()["bytes"] == 2 * once


def test_a_copy_of_a_loaded_model_computes_for_itself(tmp_path: Path) -> None:
    """(Its quantizer holds the report of where experts lie.)"""
    tiny.save(tiny.qwen3_moe(), tmp_path)
    model = tiny.load(tmp_path, experts_quant_type="nf4", experts_device="cpu")
    expected = tiny.logits(model)
    twin = copy.deepcopy(model)
    assert twin.hf_quantizer.offloaded.host_bytes == model.hf_quantizer.offloaded.host_bytes
    assert twin.hf_quantizer.offloaded.streamers == []
    assert twin.hf_quantizer.offloaded.counts()["fills"] == 0
    fourfold.offload(twin)
    del model
    assert torch.equal(tiny.logits(twin), expected)


def test_experts_that_another_hand_moved_are_refused_at_the_next_forward() -> None:
    """A GPU's stand-in computes; the parameters are given others, as sharding does."""
    model = offloading.packed_model("qwen3_moe", layers=2)
    fourfold.offload(model)
    module = experts(model)[1]
    host: Any = module.fourfold_host
    assert isinstance(host, HostExperts)
    host.streamer.device = torch.device("meta")
    host._refuse_moved()
    name = module.packed_names()[0]
    moved = module._parameters[name].to("meta")  # type: ignore[union-attr]
    module._parameters[name] = nn.Parameter(moved, requires_grad=False)
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.experts: .* moved to meta .*onload"):
        host.hold(torch.device("meta"))


def test_too_little_device_memory_is_found_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device: 2**30)
    cuda = torch.device("cuda:0")
    budget.check_device_room(cuda, 2**30 + 5, 5, "they")
    budget.check_device_room(torch.device("cpu"), 2**60, 0, "they")
    with pytest.raises(ConfigurationError, match=r"they take 2\.00 GiB of cuda:0, .* 1\.00 GiB.*budget"):
        budget.check_device_room(cuda, 2**31, 5, "they")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(api, "check_device_room", lambda _, come, go, what: asked.append((come, go)))
    model = offloading.packed_model("qwen3_moe", layers=LAYERS)
    one = streamer.Unit(experts(model)[:1]).nbytes
    held = sum(p.nbytes for m in experts(model) for p in m.parameters(recurse=False))
    fourfold.offload(model)  # (on a CPU nothing comes, and what goes lies there as well)
    tiny.logits(model)
    fourfold.offload(model, 3 * one)
    assert asked == [(2 * one, held), (0, 2 * one)]  # (buffers of before)

    def refuse(*_: Any) -> None:
        raise ConfigurationError("no room")

    monkeypatch.setattr(api, "check_device_room", refuse)
    for act in (fourfold.offload, fourfold.onload):
        model = offloading.packed_model("qwen3_moe", layers=LAYERS)
        if act is fourfold.onload:
            monkeypatch.setattr(api, "check_device_room", lambda *_: None)
            fourfold.offload(model)
            monkeypatch.setattr(api, "check_device_room", refuse)
        kept = [m.fourfold_host for m in experts(model)]
        with pytest.raises(ConfigurationError, match="no room"):
            act(model)
        assert [m.fourfold_host for m in experts(model)] == kept


class _Event:
    """An event of a clock that stands at the number of events recorded."""

    clock = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = -1

    def record(self, stream: Any = None) -> None:
        _Event.clock += 1
        self.at = _Event.clock

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return float(other.at - self.at)


class _Stream:
    cuda_stream = 7

    def wait_event(self, event: _Event) -> None: ...


def test_times_of_waits_are_added_up_as_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a million steps keeps a few hundred events."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    engine = CudaEngine(torch.device("cuda"))
    engine.wait(engine.mark())
    assert engine.waited_ms() == 0.0
    engine.timed = True
    for _ in range(1000):
        engine.wait(engine.mark())
    assert len(engine._waits) <= 256
    assert engine.waited_ms() == 1000.0
    assert engine.waited_ms() == 0.0
    assert engine.line() == 7
