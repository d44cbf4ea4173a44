"""Where experts are planned to lie, and what a step is planned to wait for, against what runs do."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fourfold
import offloading
import own_forward
import tiny
from fourfold.errors import ConfigurationError
from fourfold.offloading import budget as budgets
from fourfold.offloading.link import measure_link
from fourfold.offloading.traffic import traffic_of
from fourfold.planning.card import CONTEXT_BYTES, room
from fourfold.planning.pace import Pace, measure_products, pace_of
from fourfold.planning.placement import PROCESS_BYTES, ExpertUnits, place
from fourfold.planning.plan import Plan, Planner, Settings
from fourfold.planning.standins import Target

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LAYERS = 6


def qwen(layers: int) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from checkpoint import qwen3_30b_config
    finally:
        sys.path.remove(str(BENCHMARKS))
    return qwen3_30b_config(layers)


def record(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((BENCHMARKS / "results" / name).read_text())
    return loaded


def planned(**changes: Any) -> Plan:
    settings = {"length": 16, "experts_offload": "cpu"} | changes
    return fourfold.plan(tiny.qwen3_moe(num_hidden_layers=LAYERS), **settings)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(qwen(record("offload.json")["layers"]), Target("cuda", (9, 0)))


def settings_of(name: str, **changes: Any) -> Settings:
    measured = record(name)
    config = fourfold.MoeBitsAndBytesConfig(**NF4)
    base = {"batch": measured["batch"], "length": measured["length"], "r": measured.get("rank", 16)}
    return Settings(quantization=config, loss_positions=256, **(base | changes))


@pytest.mark.parametrize("variant", ["half", "streamed"])
def test_bytes_are_those_of_the_benchmark_and_its_step_is_as_long_as_planned(
    planner: Planner, variant: str
) -> None:
    measured = record("offload.json")
    resident, found = ({r["variant"]: r for r in measured["results"]}[v] for v in ("resident", variant))
    asked: dict[str, Any] = {"experts_offload": "cpu"}
    if variant == "half":
        total = found["offload"]["resident_bytes"] + found["offload"]["host_bytes"]
        asked = {"experts_offload": "auto", "gpu_budget": total // 2}
    plan = planner.plan(settings_of("offload.json", **asked))
    placement = plan.placement
    assert placement is not None
    for name in ("resident_modules", "streamed_modules", "resident_bytes", "host_bytes", "buffer_bytes"):
        assert getattr(placement, name) == found["offload"][name]
    assert placement.copied == found["per_step"]["bytes"]
    # (the benchmark's model is made on the GPU: its host memory holds the streamed alone)
    assert found["peak_host_bytes"] - placement.host_bytes == pytest.approx(PROCESS_BYTES, rel=0.01)
    bandwidth = measured["host_to_device_bytes_per_second"]
    pace = pace_of(plan, link=bandwidth, step_seconds=resident["step_ms"] / 1e3)
    assert pace is not None
    assert pace.copying * 1e3 == pytest.approx(found["floor_ms"], rel=1e-6)
    assert pace.step is not None
    assert pace.step * 1e3 == pytest.approx(found["step_ms"], rel=0.1)
    assert pace.bound_by == "compute"  # (which waited for 1 and 2 ms)
    estimated = pace_of(plan)
    assert estimated is not None
    assert estimated.estimated
    assert estimated.computing is not None
    assert estimated.computing * 1e3 == pytest.approx(resident["step_ms"], rel=0.05)
    assert estimated.bound_by == "compute"


def test_the_estimate_of_computing_is_that_of_a_larger_batch_too() -> None:
    measured = record("step.json")
    found = next(r for r in measured["results"] if r["variant"] == "fourfold")
    planner = Planner(qwen(measured["layers"]), Target("cuda", (9, 0)))
    pace = pace_of(planner.plan(settings_of("step.json", experts_offload="cpu")))
    assert pace is not None
    assert pace.computing is not None
    assert pace.computing * 1e3 == pytest.approx(found["step_ms"], rel=0.05)


def test_products_of_a_step_are_counted() -> None:
    """Qwen3-MoE's, written down by hand: forward, and backward to the inputs and the factors."""
    config = tiny.qwen3_moe(num_hidden_layers=1)
    T, B, r, H = 32, 2, 8, config.hidden_size  # (ranks are padded to multiples of 8)
    settings = {"batch": B, "length": T, "r": r, "checkpointing": False}
    plan = fourfold.plan(config, target_modules=("q_proj",), **settings)
    assert plan.activations is not None
    tokens, k = B * T, config.num_experts_per_tok
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k_v, o = heads * d * H, kv * d * H, heads * d * H
    I, E = config.moe_intermediate_size, config.num_experts  # noqa: E741
    attention = 4 * B * heads * T * T * d // 2
    low_rank = r * (heads * d + H)
    experts, factors = 3 * I * H, r * (2 * I + H) + r * (I + H)
    forward = 2 * tokens * (q + 2 * k_v + o + E * H + low_rank) + 2 * tokens * k * (experts + factors)
    backward = 2 * tokens * (q + 2 * k_v + o + E * H + 2 * low_rank) + 2 * tokens * k * (
        experts + 2 * factors
    )
    head = 3 * 2 * B * (T - 1) * H * config.vocab_size
    expected = forward + backward + attention * 7 // 2 + head
    assert plan.activations.flops == pytest.approx(expected, rel=0.02)
    again = fourfold.plan(config, target_modules=("q_proj",), **settings | {"checkpointing": True})
    assert again.activations is not None
    assert again.activations.flops - plan.activations.flops == pytest.approx(forward + attention, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [None, 0.5, 0.7, 1.2])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_plan_puts_experts_where_offload_puts_them_and_counts_what_steps_copy(
    kind: str, share: float | None, checkpointing: bool
) -> None:
    model = own_forward.lora(offloading.packed_model(kind, layers=LAYERS))
    if checkpointing:
        own_forward.checkpoint_layers_(model, False)
    units = ExpertUnits.of(model)
    limit = None if share is None else int(share * sum(units.sizes))
    found = place("auto", units, limit, checkpointing=checkpointing)
    report = fourfold.offload(model, limit)
    assert (found.resident_modules, found.streamed_modules) == (len(report.resident), len(report.streamed))
    names = ("resident_bytes", "host_bytes", "buffer_bytes", "buffers")
    assert [getattr(found, name) for name in names] == [getattr(report, name) for name in names]
    for _ in range(2):
        before = report.counts()["bytes"]
        own_forward.output(model).sum().backward()
    assert report.counts()["bytes"] - before == found.copied


def test_automatic_plans_fill_the_card_and_are_what_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.qwen3_moe(num_hidden_layers=LAYERS)
    planner = Planner(config, Target("cuda", (9, 0)))
    quantization = fourfold.MoeBitsAndBytesConfig(**NF4)
    all_there = planner.plan(Settings(quantization=quantization, length=16))
    units = ExpertUnits.of(planner.skeleton(Settings(quantization=quantization)))
    one = max(units.sizes)
    counts = []
    for missing in (-2.0, 1.1, 2.1, 3.1, 5.0, 40.0):
        card = all_there.peak - int(missing * one) + 2 * CONTEXT_BYTES
        settings = Settings(quantization=quantization, length=16, experts_offload="auto", card=card)
        plan = planner.plan(settings)
        placement = plan.placement
        assert placement is not None
        counts.append(placement.resident_modules)
        assert plan.peak <= room(card) or placement.streamed_modules == LAYERS
        # `fourfold train`: loaded, then `offload` with what the GPU says is free, and the plan's reserve
        others = plan.weights.bytes - plan.experts
        free = card - CONTEXT_BYTES - others
        monkeypatch.setattr(budgets, "free_bytes", lambda device, free=free: free)
        limit = budgets.automatic(torch.device("cuda"), 0, plan.beside_experts(card))
        if limit >= one:
            share = budgets.share_out(units.sizes, limit, 2)
            assert [placement.streamed_modules, placement.buffers] == [sum(share.streamed), share.buffers]
        floor = planner.floor(settings)
        assert floor <= plan.peak
    assert counts[0] == LAYERS
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert len(set(counts)) > 2


def test_a_card_is_named_or_a_budget() -> None:
    with pytest.raises(ConfigurationError, match=r"no card is known.*--gpu 24GiB.*gpu_budget"):
        planned(experts_offload="auto")
    with pytest.raises(ConfigurationError, match=r"budget of 0\.000 GiB .* one module's take"):
        planned(experts_offload="auto", gpu_budget=1000)
    with pytest.raises(ConfigurationError, match="gpu_budget: has no effect without experts_offload: auto"):
        planned(gpu_budget=2**30)
    with pytest.raises(ConfigurationError, match="experts_offload: 'gpu' is not one of cpu, auto, disk"):
        planned(experts_offload="gpu")
    with pytest.raises(ConfigurationError, match="'many' is no number of bytes"):
        planned(experts_offload="auto", gpu_budget="many")
    assert planned(experts_offload="auto", card="24GiB").placement.streamed_modules == 0  # type: ignore[union-attr]


def test_on_disk_all_but_small_scales_and_what_is_read_ahead() -> None:
    disk, host, resident = (planned(experts_offload=kind) for kind in ("disk", "cpu", None))
    assert disk.placement is not None
    assert host.placement is not None
    assert resident.placement is None
    assert disk.placement.on_device == host.placement.on_device
    assert disk.peak == host.peak < resident.peak
    mapped = disk.placement.disk_bytes // LAYERS
    small = disk.placement.host_bytes - 2 * mapped
    assert 0 < small < host.placement.host_bytes // 10
    assert disk.placement.disk_bytes + small == host.placement.host_bytes == disk.experts
    assert disk.placement.read == disk.placement.copied == host.placement.copied > 0
    assert host.placement.read == 0
    assert disk.placement.host_peak < host.placement.host_peak


def test_bytes_on_disk_are_those_of_a_loaded_model(tmp_path: Path) -> None:
    nf4 = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    tiny.save(tiny.qwen3_moe(num_hidden_layers=LAYERS), tmp_path / "plain")
    folder = tiny.packed_folder(tmp_path / "plain", tmp_path / "packed", **nf4)
    model = tiny.load(folder, **nf4, experts_device="disk")
    report = model.hf_quantizer.offloaded
    units = ExpertUnits.of(model)
    found = place("disk", units, None, checkpointing=True, is_cuda=False)
    names = ("resident_bytes", "host_bytes", "disk_bytes", "buffer_bytes", "buffers")
    assert [getattr(found, name) for name in names] == [getattr(report, name) for name in names]
    assert report.disk_bytes > report.host_bytes > 0
    (streamer,) = report.streamers
    on_gpu = place("disk", units, None, checkpointing=True)
    streamer.device = torch.device("meta")  # (one that computes with buffers)
    assert on_gpu.host_bytes == found.host_bytes + streamer.read_ahead_bytes
    assert on_gpu.buffer_bytes == streamer.buffer_bytes


def test_a_cpu_holds_them_itself() -> None:
    planner = Planner(tiny.qwen3_moe(num_hidden_layers=LAYERS), Target("cpu", None))
    quantization = fourfold.MoeBitsAndBytesConfig(**NF4)
    plans = {
        kind: planner.plan(Settings(quantization=quantization, length=16, experts_offload=kind, bf16=False))
        for kind in (None, "cpu", "disk")
    }
    assert plans["cpu"].placement is not None
    assert plans["cpu"].peak == plans[None].peak + plans["cpu"].placement.buffer_bytes
    assert plans["disk"].peak < plans[None].peak  # (mapped pages are the system's)
    assert all(pace_of(plan) is None for plan in plans.values())
    with pytest.raises(ConfigurationError, match="no card is known"):
        planner.plan(Settings(quantization=quantization, length=16, experts_offload="auto", card=2**34))


def test_traffic_is_all_but_what_the_buffers_keep_twice() -> None:
    for checkpointing in (False, True):
        traffic = traffic_of([10] * 8, 3, checkpointing=checkpointing)
        assert (traffic.fills, traffic.bytes) == (2 * (8 - 3), 100)
        assert traffic_of([10, 20], 2, checkpointing=checkpointing).fills == 0
        assert traffic_of([], 2, checkpointing=checkpointing).bytes == 0
        assert traffic_of([7], 2, checkpointing=checkpointing).bytes == 0


def pace(**changes: Any) -> Pace:
    plan = planned(batch=2, length=64, accumulation=changes.pop("accumulation", 1), **changes.pop("plan", {}))
    found = pace_of(plan, **changes)
    assert found is not None
    return found


def test_a_slow_link_binds_and_a_fast_one_does_not() -> None:
    copied = pace(link=1.0).copied
    fast = pace(link=copied * 100.0, step_seconds=1.0)
    assert (fast.bound_by, fast.step) == ("compute", 1.0)
    assert fast.copying == pytest.approx(0.01)
    # forward is a third of computing, and copies half: 0.4 s each here
    slow = pace(link=copied / 0.8, step_seconds=0.9)
    assert slow.bound_by == "link"
    assert slow.step == pytest.approx(0.4 + 0.6)
    assert slow.tokens_to_hide == math.ceil(2 * 64 * 0.4 / 0.3 - 1e-9)
    assert any("bound by the link" in line and "10%" in line for line in slow.lines())
    assert any("hidden behind computing" in line for line in fast.lines())
    whole = pace(link=copied / 0.8, step_seconds=0.9, plan={"checkpointing": False})
    assert whole.bound_by == "compute"  # (half of computing is forward)
    twice = pace(link=copied / 0.8, step_seconds=1.8, accumulation=2)
    assert twice.copied == 2 * copied
    assert twice.step == pytest.approx(2.0)


def test_a_slow_disk_binds() -> None:
    read = pace(plan={"experts_offload": "disk"}).read
    slow = pace(plan={"experts_offload": "disk"}, link=1e12, disk=read / 4.0, step_seconds=1.0)
    assert (slow.bound_by, slow.reading) == ("disk", 4.0)
    assert any("bound by the disk" in line for line in slow.lines())
    assert any("GiB from disk" in line for line in slow.lines())


def test_every_rate_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = pace()
    data = found.to_dict()
    assert data["link"]["source"].startswith("assumed: PCIe 4.0")
    assert data["products"]["source"].startswith("assumed: ")
    assert data["disk"]["source"] == "assumed: NVMe"
    assert data["compute_is_estimated"] is True
    assert pace(link=5e9).to_dict()["link"] == {"per_second": 5e9, "source": "given"}
    assert pace(step_seconds=2.0).to_dict()["compute_is_estimated"] is False
    assert "as given" in " ".join(pace(step_seconds=2.0).lines())


def test_the_card_that_is_here_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourfold.planning import pace as module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "measure_link", lambda device: 11e9)
    monkeypatch.setattr(module, "measure_products", lambda device: 99e12)
    plan = planned()
    here, elsewhere = module.rates_for(plan), copy.copy(plan)
    assert (here.link.value, here.link.source) == (11e9, "measured here")
    assert (here.products.value, here.products.source) == (99e12, "measured here")
    elsewhere.target = Target("cuda", (9, 0))  # another card is planned for
    assert module.rates_for(elsewhere).link.source.startswith("assumed: PCIe 5.0")


def test_measuring_runs_and_counts_bytes() -> None:
    cpu = torch.device("cpu")
    assert measure_link(cpu, nbytes=2**20, repeats=2) > 1e7
    assert measure_products(cpu, size=64, repeats=2) > 1e5
