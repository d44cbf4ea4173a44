"""The conformance matrix: a handful of kinds by default, the whole as a slow test; and that it can fail."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourfold
import tiny
from fourfold.cli import main
from fourfold.errors import ConfigurationError
from fourfold.experts import OwnForwardLayout
from fourfold.planning.conformance import checks, table, tiny_models
from fourfold.planning.conformance.checks import check_model, check_model_type
from fourfold.planning.conformance.row import CHECKS, Row

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
# One of each kind. (Names are in tests only: the program walks through what transformers has.)
KINDS = [
    "mixtral",
    "deepseek_v4",  # its own gate
    "aria_text",  # transposed (transformers 5.17: one undecorated projection a module)
    "gpt_oss",  # transposed, interleaved, biases
    "openai_privacy_filter",  # transposed, concatenated, biases
    "muse_spark_text",  # a norm after each expert
    "nemotron_h",  # no gate
    "llama4_text",
    "longcat_flash",
    "step3p5",
    "jetmoe",
    "inkling_text",  # shared experts
    "dbrx",  # flattened
    "diffusion_gemma",  # experts tied to others
    "qwen3_vl_moe",  # inside a vision-language model
    "deepseek_v3",  # Linears that are fed four dimensions
    "qwen4_exp_text",  # a Linear with `weight` in its name
    "inkling2_text",  # Linears that are renamed, but not what belongs to them
    "unlimited_ocr",  # Linears that files hold in another cut
    "switch_transformers",  # Linears
    "nllb-moe",  # Linears, and a dropout beside them
    "kimi_linear",  # experts of a token under another name
    "doge",  # refused
]


@pytest.mark.parametrize("model_type", KINDS)
def test_row_passes(model_type: str) -> None:
    if model_type not in tiny_models.known_types():
        pytest.skip(f"this transformers has no {model_type}")
    row = check_model_type(model_type)
    assert row is not None
    assert row.problems == []
    assert "FAILED" not in row.cells.values()


def test_types_without_experts_have_no_row() -> None:
    assert check_model_type("llama") is None


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("mixtral", {"intermediate_size": 47}),
        ("nemotron_h", {"moe_intermediate_size": 41}),
        ("gpt_oss", {"intermediate_size": 33}),
    ],
)
def test_inner_sizes_that_are_no_multiple_of_a_block(
    tmp_path: Path, kind: str, sizes: dict[str, int]
) -> None:
    row = Row(kind, cells={"built": "ok"})
    model = AutoModelForCausalLM.from_config(tiny.KINDS[kind](**sizes), dtype=torch.float32).eval()
    model.config._experts_implementation = "eager"  # stock's grouped product refuses such sizes
    tiny_models.randomise_experts_(model)
    check_model(row, model, tmp_path)
    assert row.problems == []
    assert {row.cells[check] for check in CHECKS} == {"ok"}


def test_experts_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OwnForwardLayout.to_stack
    monkeypatch.setattr(OwnForwardLayout, "to_stack", lambda self, w, p: right(self, w, p).roll(1, 0))
    row = check_model_type("llama4_text")
    assert row is not None
    assert row.cells["noise"] == "FAILED"


def test_another_forward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(model, **kwargs):
        plain = fourfold.dequantize(model, **kwargs)
        plain.model.layers[0].mlp.experts.down_proj.data.mul_(2)
        return plain

    monkeypatch.setattr(checks, "dequantize", doubled)
    row = check_model_type("mixtral")
    assert row is not None
    assert row.cells["dequantize"] == "FAILED"
    assert "layers.0.mlp.experts.down_proj" in row.problems[0]


def test_an_exception_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(checks, "randomise_experts_", broken)
    row = check_model_type("mixtral")
    assert row is not None
    assert row.kind == "not built"
    assert row.problems == ["built: RuntimeError: out of paper"]
    assert table.cells_of(row)["packed"] == "not built"


# --- the file
# -----------------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    passed = Row("a", "A", "gated", {"built": "ok"} | dict.fromkeys(CHECKS, "ok"), {"NF4": 0.1, "INT8": 0.01})
    failed = Row("b", "B", "gated", {"built": "ok", "packed": "FAILED"}, problems=["packed: a | b"])
    return [passed, failed, Row("c", kind="not built", problems=["built: no"])]


def test_what_is_written_is_read_and_not_worse(tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    file.write_text(table.render(rows()))
    before = table.read(file)
    assert {t: table.cells_of(row) for t, row in before.items()} == {
        row.model_type: table.cells_of(row) for row in rows()
    }
    assert [before[row.model_type].problems for row in rows()] == [[], ["packed: a / b"], ["built: no"]]
    assert "1 of 3 model types pass" in file.read_text()
    assert table.worse(before, rows(), ["a", "b", "c"]) == []
    better = rows()
    better[1].cells |= dict.fromkeys(CHECKS, "ok")
    assert table.worse(before, better, []) == []
    (tmp_path / "empty.md").write_text("nothing")
    with pytest.raises(ConfigurationError, match="no conformance table"):
        table.read(tmp_path / "empty.md")


@pytest.mark.parametrize("cell", ["FAILED", "-", "refused", "not run", "as stock", "as stock, not run"])
def test_a_worse_cell_and_a_lost_row_are_named(tmp_path: Path, cell: str) -> None:
    before = {row.model_type: row for row in rows()}
    now = rows()[:2]
    now[0].cells["reload"] = cell
    assert table.worse(before, now, ["a", "b", "c"]) == [f"a: reload was ok, is {cell}", "c: no row any more"]
    assert len(table.worse(before, now, ["a", "b"])) == 1  # this transformers has no c


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    out.write_text(COMMITTED.read_text())
    assert main(["conformance", "--model-type", "mixtral", "--out", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] == 1
    assert data["rows"][0]["cells"]["reload"] == "ok"
    assert data["written"] is None
    out.write_text(out.read_text().replace("`doge`", "`mixtral`").replace("| refused |", "| ok |"))
    assert main(["conformance", "--model-type", "doge", "mixtral", "--out", str(out)]) == 0
    out.write_text(COMMITTED.read_text().replace("`doge`", "`dodge`").replace("`mixtral`", "`doge`"))
    assert main(["conformance", "--model-type", "doge", "--out", str(out)]) == 1
    assert "doge: packed was ok, is refused" in capsys.readouterr().out
    assert main(["conformance", "--model-type", "no_such_type", "--out", str(out)]) == 2


@pytest.mark.slow
def test_no_row_of_the_whole_matrix_is_worse_than_the_committed_one() -> None:
    found = [row for model_type in tiny_models.model_types() if (row := check_model_type(model_type))]
    assert len(found) > 80
    assert table.worse(table.read(COMMITTED), found, tiny_models.known_types()) == []
