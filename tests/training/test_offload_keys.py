"""``experts_offload`` and ``gpu_budget``: the same run with experts in host memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fourfold
import tiny
from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.experts import PackedExperts
from fourfold.offloading import host
from fourfold.training import planned
from fourfold.training import run as run_module
from fourfold.training.contradictions import ContradictionError
from fourfold.training.offloaded import UnchangedFiles, bring_back
from fourfold.training.preflight import check
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult
from tiny_chat import Settings, quiet

SHORT: dict[str, Any] = {"max_steps": 3, "eval_steps": 0, "gradient_checkpointing": True}


def trained(settings: Settings, **changes: Any) -> tuple[RunResult, str]:
    console = quiet()
    result = run(TrainConfig(**settings(**{**SHORT, **changes})), console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def report_of(result: RunResult) -> dict[str, Any]:
    return json.loads((Path(result.adapter) / "report.json").read_text())


def packed_base(moe_folder: Path, folder: Path) -> str:
    """A packed checkpoint of the tests' model, with its tokenizer."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    tiny.packed_folder(moe_folder, folder, **nf4)
    for file in (*moe_folder.glob("*token*"), *moe_folder.glob("*.jinja")):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


@pytest.mark.parametrize(("stored", "where"), [("plain", "cpu"), ("packed", "cpu"), ("packed", "disk")])
def test_the_same_adapter_from_elsewhere(
    settings: Settings, moe_folder: Path, tmp_path: Path, stored: str, where: str
) -> None:
    base: dict[str, Any] = {}
    if stored == "packed":
        base["base_model"] = packed_base(moe_folder, tmp_path / "packed")
    resident, said = trained(settings, output_dir=str(tmp_path / "resident"), **base)
    assert "host memory" not in said
    away, said = trained(settings, output_dir=str(tmp_path / "away"), experts_offload=where, **base)
    ours, theirs = (load_file(Path(r.adapter) / "adapter_model.safetensors") for r in (away, resident))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert away.curve.train == resident.curve.train
    assert f"experts of 2 modules {'on disk' if where == 'disk' else 'in host memory'}" in said
    found = report_of(away)["offload"]
    assert (found["streamed_modules"], found["resident_modules"]) == (2, 0)
    assert (found["disk_bytes"] > 0) == (where == "disk")
    assert report_of(resident)["offload"] is None


def test_auto_leaves_on_disk_what_host_memory_does_not_hold(
    settings: Settings, moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = packed_base(moe_folder, tmp_path / "packed")
    offload = {"experts_offload": "auto", "gpu_budget": "100 KiB"}
    config = TrainConfig(**settings(**SHORT, base_model=base, **offload))
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    model, _ = run_module.load(config, check(config))
    report = bring_back(model, config, None)
    assert report is not None
    assert report.disk_bytes > 0
    assert "modules on disk" in str(report)
    monkeypatch.setattr(host, "available_bytes", lambda: 2**40)  # (with what is back there is room)
    report = bring_back(model, config, None)
    assert report is not None
    assert (report.disk_bytes, report.host_bytes > 0) == (0, True)
    plain = TrainConfig(**settings(**SHORT, **offload))
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigurationError, match=r"take .* GiB of host memory.*leave them on disk"):
        run_module.load(plain, check(plain))


def test_experts_on_disk_need_a_packed_checkpoint(settings: Settings) -> None:
    config = TrainConfig(**settings(**SHORT, experts_offload="disk"))
    with pytest.raises(ConfigurationError, match=r"experts_offload: disk .*fourfold quantize .* FOLDER`"):
        check(config)


@pytest.mark.parametrize("when", ["on_train_begin", "on_epoch_begin"])
def test_a_checkpoint_that_was_replaced_ends_the_run(
    settings: Settings, moe_folder: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = packed_base(moe_folder, tmp_path / "packed")
    begin = getattr(UnchangedFiles, when)

    def replaced(*arguments: Any, **named: Any) -> None:
        monkeypatch.undo()
        file = tmp_path / "packed" / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
        begin(*arguments, **named)
        pytest.fail("it would have been found by a use of the file only")

    monkeypatch.setattr(UnchangedFiles, when, replaced)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while"):
        trained(settings, base_model=base, experts_offload="disk")


def test_a_budget_brings_some_back(settings: Settings) -> None:
    config = TrainConfig(**settings(**SHORT, experts_offload="auto", gpu_budget="1 GiB"))
    assert config.gpu_budget == 2**30
    model, _ = run_module.load(config, check(config))
    assert all(m.fourfold_host is not None for m in model.modules() if isinstance(m, PackedExperts))
    report = bring_back(model, config, None)
    assert report is not None
    assert (len(report.resident), report.streamed) == (2, [])


def test_auto_without_a_gpu_asks_for_a_budget(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"asks the GPU how much memory is free.*gpu_budget"):
        trained(settings, experts_offload="auto")


def test_several_processes_are_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**settings(**SHORT, experts_offload="cpu"))
    checked = check(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="experts_offload: cpu with 2 processes"):
        run_module.load(config, checked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu_budget": "12GiB"}, "gpu_budget: has no effect without experts_offload: auto"),
        ({"gpu_budget": 5, "experts_offload": "cpu"}, "gpu_budget: has no effect"),
        (
            {"experts_offload": "cpu", "load_in_4bit": False, "adapter": "lora"},
            "experts_offload: is for packed experts",
        ),
        ({"experts_offload": "cpu", "quantize_moe_experts": False}, "experts_offload: is for packed experts"),
        (
            {"experts_offload": "auto", "bnb_config_kwargs": {"experts_quant_type": "none"}},
            "experts_offload: is for packed experts",
        ),
    ],
)
def test_what_has_no_effect_is_refused(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ContradictionError, ValueError), match=message):
        TrainConfig(**settings(**SHORT, **changes))


def test_a_budget_is_a_number_of_bytes(settings: Settings) -> None:
    with pytest.raises(ValueError, match="no number of bytes; write one such as"):
        TrainConfig(**settings(**SHORT, experts_offload="auto", gpu_budget="some"))


def test_a_run_is_planned_with_experts_where_it_loads_them(settings: Settings) -> None:
    for where, budget in ((None, None), ("cpu", None), ("disk", None), ("auto", 2**30)):
        config = TrainConfig(**settings(**SHORT, experts_offload=where, gpu_budget=budget))
        planner, found = planned.planner_of(config)  # (disk: also of what is not packed yet)
        placement = planner.plan(found).placement
        assert (None if placement is None else placement.kind) == where
        if placement is not None:
            assert placement.streamed_modules == (0 if where == "auto" else 2)


def test_a_plan_leaves_out_what_lies_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 0)  # (planning asks for none)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    plans = [
        fourfold.plan(
            tiny.qwen3_moe(num_hidden_layers=6),
            quantization_config=fourfold.MoeBitsAndBytesConfig(**nf4, **more),
            length=16,
        )
        for more in ({}, {"experts_device": "cpu"})
    ]
    resident, away = plans
    assert resident.away == 0
    assert away.away > 0
    assert resident.peak - away.peak == resident.resident - away.resident == away.away
    (experts,) = (p.parts()["experts"] for p in plans[:1])
    assert away.parts()["experts"] == experts * 2 // 6
    assert away.away == experts - experts * 2 // 6
    assert sum(away.parts().values()) == away.peak
    assert away.to_dict()["offload"]["host_bytes"] == experts
    assert resident.to_dict()["offload"] is None
