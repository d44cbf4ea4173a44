"""What a run leaves to look at: figures along the run, the page, and the reports of runs that break."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import fourfold
import tiny
from fourfold.adapters.peft_lora import add_lora
from fourfold.errors import ConfigurationError, TrainingError
from fourfold.experts import find_experts
from fourfold.training import run as run_module
from fourfold.training.journal import ExpertLoad, projection_kinds
from fourfold.training.report_charts import LEVELS, Line, cells, heat, line_chart
from fourfold.training.report_page import page
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult
from fourfold.training.trainer import MoeTrainer
from tiny_chat import Settings, quiet

NASTY = "<script>alert('x')</script>&\"<img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(HTMLParser):
    """Tags of a page, each closed by its own; attributes; text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _report(result: RunResult) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(result.adapter) / "report.json").read_text())
    return loaded


def test_figures_along_the_run(trained: tuple[RunResult, str]) -> None:
    report = _report(trained[0])
    rows = report["series"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [[row["step"], row["loss"]] for row in rows] == report["loss_curve"]["train"]
    assert max(row["learning_rate"] for row in rows) == pytest.approx(0.02, rel=0.1)
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert 0 < row["memory_bytes"] <= row["peak_memory_bytes"]
    assert report["status"] == "done"
    assert {"fourfold", "torch", "transformers", "peft", "trl", "python"} <= report["versions"].keys()


def test_gradient_norms_of_each_projection_make_up_the_whole(trained: tuple[RunResult, str]) -> None:
    report = _report(trained[0])
    norms = report["gradient_norms"]
    assert norms.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    for index, row in enumerate(report["series"]):
        whole = sum(points[index][1] ** 2 for points in norms.values()) ** 0.5
        assert whole == pytest.approx(row["grad_norm"], rel=1e-3)


def test_every_routed_row_of_training_is_counted(trained: tuple[RunResult, str]) -> None:
    report = _report(trained[0])
    assert [layer["name"] for layer in report["expert_load"]] == [
        f"model.layers.{i}.mlp.experts" for i in range(2)
    ]
    totals = {sum(layer["tokens"]) for layer in report["expert_load"]}
    (total,) = totals
    # two experts a token; padding counts, evaluations and samples do not
    tokens = trained[0].curve.tokens
    assert 2 * tokens <= total <= 2 * 1.3 * tokens


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_recomputed_forward_counts_once(tmp_path: Path, checkpointing: bool) -> None:
    tiny.save(tiny.mixtral(), tmp_path)
    model = fourfold.prepare(
        tiny.load(tmp_path, experts_quant_type="nf4"), gradient_checkpointing=checkpointing
    )
    model = add_lora(
        model,
        r=2,
        alpha=2,
        target_modules=["q_proj"],
        target_parameters=fourfold.expert_targets(model),
    ).train()
    load = ExpertLoad(model)
    chosen: list[torch.Tensor] = []
    first = next(iter(find_experts(model))).module
    first.register_forward_pre_hook(lambda _, args, kwargs: chosen.append(args[1]), with_kwargs=True)
    model(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
    model.eval()
    with torch.no_grad():
        model(input_ids=tiny.IDS)
    assert load.to_dict()[0]["tokens"] == torch.bincount(chosen[0].reshape(-1), minlength=4).tolist()
    load.close()
    model.train()
    model(input_ids=tiny.IDS)
    assert sum(load.to_dict()[0]["tokens"]) == tiny.IDS.numel() * 2


def test_kinds_hold_every_trained_parameter_once(tmp_path: Path) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path)
    model = fourfold.prepare(tiny.load(tmp_path, experts_quant_type="nf4"))
    model = add_lora(
        model,
        r=2,
        alpha=2,
        target_modules=["q_proj"],
        target_parameters=fourfold.expert_targets(model),
    )
    kinds = projection_kinds(model)
    assert kinds.keys() == {"q_proj", "gate_up_proj", "down_proj"}
    held = [id(p) for parameters in kinds.values() for p in parameters]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_page_is_whole_and_asks_for_nothing(trained: tuple[RunResult, str]) -> None:
    text = (Path(trained[0].adapter) / "report.html").read_text()
    found = _Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?://|url\(|@import|src=", text)
    assert "prefers-color-scheme:dark" in text
    for word in ("Loss, nats a token", "Learning rate", "Tokens a second", "Memory", "Expert load"):
        assert word in found.text
    for word in ("gate_up_proj", "before training", "NF4", "lora_alpha", "transformers"):
        assert word in found.text
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 7
    for chart in charts:
        ElementTree.fromstring(chart)


def test_everything_on_the_page_is_text() -> None:
    def everywhere(value: Any) -> Any:
        if isinstance(value, dict):
            return {NASTY if key == "nasty" else key: everywhere(item) for key, item in value.items()}
        if isinstance(value, list):
            return [everywhere(item) for item in value]
        return NASTY if value == "nasty" else value

    report = everywhere(
        {
            "status": "nasty",
            "started": "nasty",
            "adapter": "nasty",
            "device": "nasty",
            "config": {"base_model": "nasty", "nasty": "nasty", "datasets": ["nasty"]},
            "failure": {"type": "nasty", "message": "nasty", "doing": "nasty", "step": 1, "max_steps": 2},
            "model": {
                "rows": [
                    {"role": "nasty", "dtype": "nasty", "logical_params": 1, "bytes": 1, "bytes_before": 1}
                ],
                "experts": [{"kind": "nasty", "format": "nasty"}],
                "logical_params": 1,
                "bytes": 1,
                "bytes_before": 1,
            },
            "lora": {"target_modules": ["nasty"], "target_parameters": ["nasty"], "dtypes": ["nasty"]},
            "data": {"nasty": {"nasty": 3}},
            "sample": {"prompt": "nasty", "before": "nasty", "after": "nasty", "reference": "nasty"},
            "series": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}],
            "gradient_norms": {"nasty": [[1, 1.0], [2, 1.5]]},
            "loss_curve": {"train": [[1, 2.0]], "held_out": [[1, 2.0]]},
            "expert_load": [{"name": "nasty", "tokens": [1, 2]}],
            "seconds": {"nasty": 1.0},
            "versions": {"nasty": "nasty"},
        }
    )
    text = page(report)
    found = _Page(text)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.text.count("<script>") >= 20


def test_an_empty_report_is_a_page_too() -> None:
    _Page(page({}))


def test_charts_leave_out_what_is_no_number() -> None:
    assert line_chart("t", [Line("", [])]) == ""
    assert line_chart("t", [Line("", [(1, None), (2, float("nan")), (3, float("inf"))])]) == ""
    one = line_chart("t", [Line("", [(1, 2.0), (2, None)])])
    assert "circle" in one
    many = line_chart("t", [Line("", [(i, float(i % 7)) for i in range(10_000)])])
    assert len(many) < 20_000
    short = line_chart("t", [Line("", [(1, 0.5), (2, 0.7)])])
    assert re.findall(r'text-anchor="middle">([^<]*)<', short) == ["1", "2"]  # steps are whole
    flat = line_chart("t", [Line("a", [(1, 0.0), (2, 0.0)])])
    assert "polyline" in flat


def test_heat_is_by_share() -> None:
    assert heat(0, 5) == 0
    levels = [heat(count, 16) for count in (1, 2, 4, 8, 16, 32, 64, 640)]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (1, LEVELS - 1)
    assert cells([]) == ""
    ElementTree.fromstring(cells([("layer 0", [0, 3, 9]), ("layer 1", [0, 0, 0])]))


def test_a_run_that_breaks_leaves_a_report(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    step = MoeTrainer.training_step

    def breaking(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == 3:
            raise TrainingError(f"The loss is {NASTY}.")
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(MoeTrainer, "training_step", breaking)
    config = TrainConfig(**settings())
    with pytest.raises(TrainingError, match="The loss is"):
        run_module.run(config, quiet())
    out = Path(config.output_dir)
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "failed"
    assert report["failure"]["doing"] == "training"
    assert (report["failure"]["step"], report["failure"]["max_steps"]) == (3, 12)
    assert NASTY in report["failure"]["message"]
    assert [row["step"] for row in report["series"]] == [1, 2, 3]
    assert sum(report["expert_load"][0]["tokens"]) > 0
    assert report["model"]["rows"]
    found = _Page((out / "report.html").read_text())
    assert "While training, after step 3 of 12" in found.text
    assert "script" not in found.tags


def test_a_run_that_breaks_while_loading_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "load", broken)
    config = TrainConfig(**settings())
    with pytest.raises(KeyboardInterrupt):
        run_module.run(config, quiet())
    report = json.loads((Path(config.output_dir) / "report.json").read_text())
    assert report["status"] == "interrupted"
    assert report["failure"]["doing"] == "loading and packing the model"


def test_a_configuration_that_is_refused_leaves_an_old_report_alone(settings: Settings) -> None:
    config = TrainConfig(**settings(lora_target_modules=["nothing"]))
    out = Path(config.output_dir)
    out.mkdir()
    (out / "report.json").write_text("of before")
    with pytest.raises((ConfigurationError, fourfold.errors.AdapterError)):
        run_module.run(config, quiet())
    assert (out / "report.json").read_text() == "of before"
    assert not (out / "report.html").exists()
