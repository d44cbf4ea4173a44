"""What a run's report says of experts in host memory: where they lay, what was copied, how long it waited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fourfold
import offloading
from fourfold.errors import ConfigurationError
from fourfold.offloading import streamer
from fourfold.planning.standins import Target
from fourfold.training import offload_watch
from fourfold.training import run as run_module
from fourfold.training.callbacks import Curve
from fourfold.training.contradictions import ContradictionError
from fourfold.training.offloaded import bring_back
from fourfold.training.planned import planner_of
from fourfold.training.report_page import page
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import show
from tiny_chat import Settings, quiet

SHORT: dict[str, Any] = {"max_steps": 4, "eval_steps": 2, "gradient_checkpointing": True}


class Timed:
    """Engines whose every wait takes a millisecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[offloading.LateEngine] = []
        self.waits = 0
        monkeypatch.setattr(streamer, "engine_for", self.engine)

    def engine(self, device: torch.device) -> offloading.LateEngine:
        outer = self

        class Engine(offloading.LateEngine):
            def wait(self, event: int) -> None:
                outer.waits += 1
                super().wait(event)

        self.engines.append(Engine())
        return self.engines[-1]


def trained(settings: Settings, **changes: Any) -> tuple[dict[str, Any], str, str]:
    console = quiet()
    result = run(TrainConfig(**settings(**{**SHORT, **changes})), console)
    show(result, console)
    folder = Path(result.adapter)
    loaded = json.loads((folder / "report.json").read_text())
    return loaded, console.file.getvalue(), (folder / "report.html").read_text()  # type: ignore[attr-defined]


def least_budget(settings: Settings) -> int:
    planner, planned = planner_of(TrainConfig(**settings(**SHORT)), Target("cpu", None))
    return max(planner._units(planned).sizes)


def test_copies_of_training_steps_are_counted_and_their_waits_measured(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(An engine that knows time: a millisecond for each wait.)"""
    made = Timed(monkeypatch)
    budget = least_budget(settings)
    report, said, html = trained(settings, experts_offload="auto", gpu_budget=budget)
    offload = report["offload"]
    assert (offload["streamed_modules"], offload["buffers"]) == (2, 1)
    training = offload["training"]
    # with one buffer forward brings one module and backward the other; a step after evaluations learns anew
    assert training["steps"] == 4
    assert 4 * 2 <= training["copied_modules"] <= 4 * 2 + 8
    assert training["copied_bytes"] == training["copied_modules"] * budget
    assert training["copied_bytes_per_step"] == training["copied_bytes"] / 4
    waits = 1e3 * training["waited_seconds"]
    assert 4 * 2 * 3 <= waits < made.waits  # (most were evaluations' and samples')
    assert training["waited_share"] == pytest.approx(training["waited_seconds"] / report["training_seconds"])
    assert not any(engine.timed for engine in made.engines)
    for text in (" ".join(said.replace("│", " ").split()), html):
        assert "in host memory" in text
        assert "waited for" in text
        assert "of training" in text
    assert "Where experts lay" in html


def test_on_a_cpu_no_wait_is_measured(settings: Settings) -> None:
    report, said, html = trained(settings, experts_offload="cpu")
    training = report["offload"]["training"]
    assert training["waited_seconds"] is None
    assert training["copied_bytes"] == 0  # (two layers, two buffers: filled before the first step)
    assert "not measured" in said
    assert "not measured (a CPU copies and computes in turn)" in html
    assert "could not be pinned" not in html


def test_resident_experts_are_not_worth_a_section(trained: Any) -> None:
    report = json.loads((Path(trained[0].adapter) / "report.json").read_text())
    assert report["offload"] is None
    assert "Where experts lay" not in page(report)


def test_a_run_that_breaks_says_what_was_copied_until_then(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fourfold.training.trainer import MoeTrainer

    step, calls = MoeTrainer.training_step, []

    def breaking(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third step")
        return step(self, *arguments, **named)

    monkeypatch.setattr(MoeTrainer, "training_step", breaking)
    with pytest.raises(RuntimeError, match="the third step"):
        trained(settings, output_dir=str(tmp_path), experts_offload="cpu")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == "failed"
    assert report["offload"]["training"]["steps"] == 2


PAGEABLE = {
    "resident_modules": 3,
    "streamed_modules": 5,
    "resident_bytes": 3 * 2**30,
    "host_bytes": 5 * 2**30,
    "buffer_bytes": 2**30,
    "buffers": 2,
    "devices": ["cuda:0"],
    "pinned": False,
    "unpinned": "cudaHostRegister returned 2 (<out of memory>)",
}


def test_memory_that_is_not_pinned_is_warned_of_on_a_gpu() -> None:
    html = page({"offload": PAGEABLE})
    assert "could not be pinned (cudaHostRegister returned 2 (&lt;out of memory&gt;))" in html
    assert "ulimit -l" in html
    assert "experts_pin_memory: true" in html
    assert offload_watch.warning(PAGEABLE | {"pinned": True, "unpinned": None}) == ""
    assert offload_watch.warning(PAGEABLE | {"devices": ["cpu"]}) == ""
    assert offload_watch.warning(None) == ""


def test_experts_on_disk_have_lines_of_their_own() -> None:
    rows = dict(offload_watch.rows(PAGEABLE | {"disk_bytes": 2**33, "pinned": True}))
    assert rows["experts on disk"] == "5 modules, 8.00 GiB"
    assert rows["read ahead into host memory"] == "5.00 GiB, pinned"
    assert "experts in host memory" not in rows


def test_waits_are_shown_for_a_step_and_as_a_share() -> None:
    training = {"steps": 4, "copied_bytes_per_step": 2**30, "waited_seconds": 0.02, "waited_share": 0.005}
    rows = dict(offload_watch.rows(PAGEABLE | {"training": training}))
    assert rows["computing waited for copies"] == "5.0 ms a step, 0.5% of training"
    assert rows["copied"] == "1.00 GiB a step"


def test_pinned_memory_is_refused_only_on_request(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**settings(**SHORT, experts_offload="cpu", experts_pin_memory=True))
    planner_of(config, Target("cuda", (8, 0)))  # (of another machine it can be planned)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="experts_pin_memory: there is no CUDA device"):
        run_module.load(config, None)  # type: ignore[arg-type]

    class Model:
        class hf_quantizer:  # noqa: N801
            offloaded = fourfold.offload(offloading.packed_model("qwen3_moe", layers=2))

    with pytest.raises(ConfigurationError, match=r"experts_pin_memory: .* could not be pinned .*ulimit -l"):
        bring_back(Model, config, None)
    without = config.model_copy(update={"experts_pin_memory": False})
    assert bring_back(Model, without, None) is Model.hf_quantizer.offloaded
    with pytest.raises((ContradictionError, ValueError), match="experts_pin_memory: has no effect"):
        TrainConfig(**settings(**SHORT, experts_pin_memory=True))


def test_a_watch_that_saw_no_step_says_nothing() -> None:
    facts: dict[str, Any] = {}
    report = fourfold.offload(offloading.packed_model("qwen3_moe", layers=2))
    watch = offload_watch.OffloadWatch(report, facts, Curve())
    watch.on_train_end(None, None, None)
    assert facts == {}
