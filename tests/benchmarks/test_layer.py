"""The layer benchmark: what it calls right is right, what is wrong is not timed, and its report adds up."""

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import layer
import layer_case
import layer_report
import layer_variants
from layer_case import SHAPES, SMOKE_SHAPES, Layer

from fourfold.kernels import ways

FOURFOLD = {"bf16-fourfold"} | {f"fourfold-{fmt}:default" for fmt in layer_variants.FORMATS}
OTHERS = {"bf16", "bf16-no-lora", "bf16-paramwrapper", "parametrization"}
PEERS = {"grouped-nf4-gemm", "grouped-nf4-gemm-fused", "scattermoe", "scattermoe-nf4"}


@pytest.fixture(autouse=True)
def _no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nf4_qlora", "axolotl", "scattermoe_lora", "scattermoe_lora.experts"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError


@pytest.fixture(params=SMOKE_SHAPES)
def smoke(request: pytest.FixtureRequest) -> Layer:
    return layer_case.build_layer(request.param, SMOKE_SHAPES[request.param], 16, torch.device("cpu"))


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = layer.main(["--smoke", "--budget", "0.001", "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_smoke_run_is_complete_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "layer.json"
    status, content = run(out, "--tokens", "1", "33")
    assert status == 0
    statuses = {(r["shape"], r["tokens"], r["variant"]): r["status"] for r in content["records"]}
    for shape in SMOKE_SHAPES:
        for tokens in (1, 33):
            for name in FOURFOLD | OTHERS:
                assert statuses.pop((shape, tokens, name)) == "ok", name
            for name in PEERS:
                assert statuses.pop((shape, tokens, name)) == "not installed"
    assert not statuses
    for record in content["records"]:
        if record["status"] == "ok":
            assert record["forward_ms"] > 0
            assert record["step_ms"] > 0
            assert record["step_repeats"] >= 5
    (invocation,) = content["invocations"].values()
    assert invocation["versions"]["torch"] == torch.__version__
    assert "| smoke-gpt-oss | 33 | fwd against bf16 (decode) | 0.60 x |" in capsys.readouterr().out
    assert (tmp_path / "layer.png").stat().st_size > 10_000

    _, again = run(out, "--tokens", "1", "33")
    assert again["records"] == content["records"]
    _, more = run(out, "--tokens", "1", "5", "--variants", "fourfold-nf4:default")
    new = more["records"][len(content["records"]) :]
    assert {(r["tokens"], r["variant"]) for r in new} == {(5, "bf16"), (5, "fourfold-nf4:default")}


def test_time_limit_stops_between_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "layer.json"
    arguments = ("--variants", "bf16-no-lora", "--shapes", "smoke-qwen3", "--seconds", "0.001")
    status, content = run(out, *arguments)
    # The first pair begins before the limit; the second would pass it.
    assert status == 0
    assert {r["tokens"] for r in content["records"]} == {1}
    assert "time limit: stopped before smoke-qwen3, 5 tokens" in capsys.readouterr().out


def test_ways_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asked-for way is a row of its own, and what its row computes goes that way."""
    asked: dict[str, set[str | None]] = {}
    choose, measure_one = ways.choose, layer.Session.measure_one
    row = ""

    def noted(problem: ways.Problem, way: str | None = None, where: str = "") -> str:
        asked.setdefault(row, set()).add(way)
        return choose(problem, way, where)

    def measured(session: Any, made: Layer, inputs: Any, variant: Any, *rest: Any) -> Any:
        nonlocal row
        row = next(name for name, other in made_of.items() if other is variant)
        return measure_one(session, made, inputs, variant, *rest)

    made_of: dict[str, Any] = {}
    make_variants = layer.Session.make_variants
    monkeypatch.setattr(
        layer.Session, "make_variants", lambda s, made: made_of.update(make_variants(s, made)) or made_of
    )
    monkeypatch.setattr(layer.Session, "measure_one", measured)
    monkeypatch.setattr(ways, "choose", noted)
    names = {f"fourfold-nf4:{way}": way for way in ("reference", "workspace", "workspace-64")}
    names["bf16-fourfold:workspace"] = "workspace"
    arguments = ("--shapes", "smoke-qwen3", "--tokens", "5", "--variants", *names)
    status, content = run(
        tmp_path / "layer.json", *arguments, "--ways", "reference", "workspace", "workspace-64"
    )
    assert status == 0
    assert {r["variant"] for r in content["records"]} == {"bf16", *names}
    for name, way in names.items():
        assert asked[name] == {way.removesuffix("-64")}


@pytest.mark.parametrize(
    "arguments",
    [("--shapes", "qwen4"), ("--variants", "bf17"), ("--skip", "bf16"), ("--report",), ("--ways", "fast")],
    ids=" ".join,
)
def test_wrong_arguments(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        layer.main(["--smoke", "--out", str(tmp_path / "none.json"), *arguments])
    assert stopped.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert layer.main(["--out", str(tmp_path / "layer.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def damaged(
    change: Callable[[layer_variants.Variant, Layer], None], name: str = "fourfold-nf4:default"
) -> Callable[..., Any]:
    """`builders` with one variant changed after it is made."""
    stock = layer_variants.builders

    def builders(ways: Any, formats: Any) -> Any:
        found = stock(ways, formats)
        build = found[name]

        def make(made: Layer) -> layer_variants.Variant:
            variant = build(made)
            change(variant, made)
            return variant

        return found | {name: make}

    return builders


def wrong_scales(variant: layer_variants.Variant, made: Layer) -> None:
    other = copy.deepcopy(layer_variants.packed(made, "nf4"))
    scales: Any = other._parameters["down_proj_absmax"]
    scales.data = scales.data.roll(1, 0)
    low_rank = layer_variants.low_rank(made)
    variant.forward = lambda i, x: other(x, i.index_Tk, i.weights_Tk, low_rank=low_rank)


def no_lora(variant: layer_variants.Variant, made: Layer) -> None:
    stock = variant.forward
    bare = layer_variants.packed(made, "nf4")
    variant.forward = lambda i, x: (
        bare(x, i.index_Tk, i.weights_Tk) + sum(leaf.sum() * 0 for leaf in made.leaves)
    )
    assert stock is not variant.forward


def swapped_gradients(variant: layer_variants.Variant, made: Layer) -> None:
    variant.canonical = lambda gradients: [gradients[0], gradients[1].roll(1, 0), *gradients[2:]]


def half_the_input_gradient(variant: layer_variants.Variant, made: Layer) -> None:
    stock = variant.forward
    variant.forward = lambda i, x: stock(i, (x + x.detach()) / 2)


def wrong_without_gradients(variant: layer_variants.Variant, made: Layer) -> None:
    stock = variant.forward
    variant.forward = lambda i, x: stock(i, x) * (1 if torch.is_grad_enabled() else 1.1)


def not_a_number(variant: layer_variants.Variant, made: Layer) -> None:
    stock = variant.forward
    variant.forward = lambda i, x: stock(i, x) * float("nan")


@pytest.mark.parametrize(
    "change",
    [
        wrong_without_gradients,
        not_a_number,
        wrong_scales,
        no_lora,
        swapped_gradients,
        half_the_input_gradient,
    ],
)
def test_wrong_variants_are_not_timed(
    change: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "builders", damaged(change))
    out = tmp_path / "layer.json"
    status, content = run(
        out, "--shapes", "smoke-qwen3", "--tokens", "33", "--variants", "fourfold-nf4:default"
    )
    assert status == 1
    by_name = {r["variant"]: r for r in content["records"]}
    assert by_name["bf16"]["status"] == "ok"
    assert by_name["fourfold-nf4:default"]["status"] == "wrong"
    assert "step_ms" not in by_name["fourfold-nf4:default"]
    missed = [t for t in layer_report.targets(content["records"]) if t.variant == "fourfold-nf4:default"]
    assert [(t.what, t.met) for t in missed] == [("computes", False)]


def wrong_on_one_input(variant: layer_variants.Variant, made: Layer) -> None:
    stock, other = variant.forward, layer_case.make_inputs(made, 1, seed=5)
    variant.forward = lambda i, x: stock(i, x) * (1.1 if torch.equal(i.x_TH, other.x_TH) else 1)


def test_of_few_tokens_several_inputs_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "builders", damaged(wrong_on_one_input))
    arguments = ("--shapes", "smoke-qwen3", "--tokens", "1", "--variants", "fourfold-nf4:default")
    status, content = run(tmp_path / "layer.json", *arguments)
    assert status == 1
    assert {r["variant"]: r["status"] for r in content["records"]}["fourfold-nf4:default"] == "wrong"
    assert [layer.number_of_draws(tokens) for tokens in (1, 5, 16, 33, 64, 8192)] == [8, 8, 4, 2, 1, 1]


def test_errors_of_several_inputs_are_added_in_quadrature() -> None:
    errors = layer_case.in_quadrature([{"x": 0.3, "y": 0.0}, {"x": 0.4, "y": layer_case.HOPELESS}])
    assert errors["x"] == pytest.approx((0.125) ** 0.5)
    assert errors["y"] > 1e8


def test_a_wrong_baseline_excuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = layer_variants.grouped_bf16
    monkeypatch.setattr(layer, "grouped_bf16", lambda *a, **k: stock(*a, **k) * 1.1)
    status, content = run(
        tmp_path / "l.json", "--shapes", "smoke-qwen3", "--tokens", "33", "--variants", "fourfold-nf4:default"
    )
    assert status == 1
    assert {r["status"] for r in content["records"]} == {"wrong"}


def test_a_broken_variant_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(variant: layer_variants.Variant, made: Layer) -> None:
        def forward(inputs: Any, x: Any) -> Any:
            raise RuntimeError("no kernel image")

        variant.forward = forward

    monkeypatch.setattr(layer, "builders", damaged(broken))
    status, content = run(
        tmp_path / "l.json", "--shapes", "smoke-qwen3", "--tokens", "5", "--variants", "fourfold-nf4:default"
    )
    assert status == 3
    assert content["records"][-1]["reason"] == "RuntimeError: no kernel image"


def test_exact_is_the_module_in_fp32(smoke: Layer) -> None:
    """Against transformers' own loop over experts in fp32, and against merged factors with it."""
    inputs = layer_case.make_inputs(smoke, 33)
    x_TH = inputs.x_TH.float().requires_grad_()
    module = copy.deepcopy(smoke.module).float()
    module.config._experts_implementation = "eager"
    plain = {p.name: getattr(module, p.name).detach() for p in smoke.layout.projections}
    for with_lora in (False, True):
        leaves = [leaf.detach().float().requires_grad_() for leaf in smoke.leaves] if with_lora else []
        for number, projection in enumerate(smoke.layout.projections):
            w_ENK = smoke.layout.to_stack(plain[projection.name], projection)
            if with_lora:
                a_ERK, b_ENR = leaves[2 * number : 2 * number + 2]
                w_ENK = w_ENK + b_ENR @ a_ERK
            # (its own inverse: a transposition or nothing)
            module._parameters[projection.name] = smoke.layout.to_stack(w_ENK, projection)
        output = module(x_TH, inputs.index_Tk, inputs.weights_Tk.float())
        gradients = torch.autograd.grad(output, [x_TH, *leaves], inputs.grad_TH.float())
        weights = layer_variants.weight_set(smoke, "bf16")
        truth = layer_case.exact(smoke, inputs, weights.exact, with_lora)
        torch.testing.assert_close(truth.output, output.detach(), rtol=1e-4, atol=1e-5)
        assert len(truth.gradients) == len(gradients)
        for ours, theirs in zip(truth.gradients.values(), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_routing_is_skewed_and_repeatable() -> None:
    shape = layer_case.Shape("Qwen3MoeConfig", layer_case.qwen3(64, 64, 64, 8), (512,))
    made = layer_case.build_layer("wide", shape, 16, torch.device("cpu"))
    one, other = layer_case.make_inputs(made, 512), layer_case.make_inputs(made, 512)
    assert torch.equal(one.index_Tk, other.index_Tk)
    share_E = torch.bincount(one.index_Tk.flatten(), minlength=64) / (512 * 8 / 64)
    assert share_E.max() > 2.5
    assert share_E.min() < 0.4


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_ones(name: str) -> None:
    """Experts, hidden and intermediate size, experts a token: as the models' config.json has them."""
    published = {
        "qwen3-30b-a3b": (128, 2048, 768, 8),
        "glm-4.5-air": (128, 4096, 1408, 8),
        "qwen3-next-80b-a3b": (512, 2048, 512, 10),
        "gpt-oss-20b": (32, 2880, 2880, 4),
        "mixtral-8x7b": (8, 4096, 14336, 2),
        "olmoe-1b-7b": (64, 2048, 1024, 8),
    }
    made = layer_case.build_layer(name, SHAPES[name], 1, torch.device("meta"))
    up, down = made.layout.projections
    assert (up.shape.experts, up.shape.columns, down.shape.columns, made.top_k) == published[name]
    assert up.shape.rows == 2 * down.shape.columns


@pytest.fixture
def documented_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two packages document about their arguments, in plain torch."""

    def fused_grouped_lora(
        rows: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        sizes: list[int],
        expert_ids: list[int],
        lora_A: torch.Tensor,  # [E, r, K]
        lora_B: torch.Tensor,  # [E, N, r]
    ) -> torch.Tensor:
        from fourfold.formats.codebooks import four_bit_codes

        codes = four_bit_codes("nf4", torch.device("cpu"))
        pieces = []
        for x, expert in zip(rows.split(sizes), expert_ids, strict=True):
            assert len(x)
            high_low = torch.stack([packed[expert] >> 4, packed[expert] & 15], -1).flatten(1)
            w_NK = codes[high_low.long()] * absmax[expert].repeat_interleave(64, 1)
            pieces.append(x @ w_NK.to(x.dtype).T + x @ lora_A[expert].T @ lora_B[expert].T)
        return torch.cat(pieces)

    def scattermoe_experts_forward(
        self: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        rows = hidden.repeat_interleave(top_k_index.shape[1], 0)
        for name in ("gate_up_proj", "down_proj"):
            a, b, scaling = self._scattermoe_lora[name]  # [E*r, K] and [N, E*r], expert slowest
            w, r = getattr(self, name), a.shape[0] // self.num_experts
            w = w if self.is_transposed else w.transpose(1, 2)
            pieces = []
            for x, expert in zip(rows, top_k_index.flatten().tolist(), strict=True):
                mine = slice(expert * r, (expert + 1) * r)
                y = x @ w[expert] + scaling * (x @ a[mine].T @ b[:, mine].T)
                bias = getattr(self, f"{name}_bias", None)
                pieces.append(y if bias is None else y + bias[expert])
            rows = torch.stack(pieces)
            rows = self._apply_gate(rows) if name == "gate_up_proj" else rows
        return (rows.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)).sum(1)

    nf4, package, experts = (types.ModuleType(n) for n in ("nf4_qlora", "scattermoe_lora", "experts"))
    nf4.fused_grouped_lora = fused_grouped_lora
    experts.scattermoe_experts_forward = scattermoe_experts_forward
    monkeypatch.setitem(sys.modules, "nf4_qlora", nf4)
    monkeypatch.setitem(sys.modules, "scattermoe_lora", package)
    monkeypatch.setitem(sys.modules, "scattermoe_lora.experts", experts)
    monkeypatch.setenv("GNF4_TRAIN_GEMM", "auto")  # put back after the test


@pytest.mark.usefixtures("documented_peers")
def test_peers_are_called_as_they_document_it(tmp_path: Path) -> None:
    """Arguments, order and layout of factors; not their kernels, which want a GPU."""
    status, content = run(tmp_path / "l.json", "--tokens", "5", "--variants", *sorted(PEERS))
    assert status == 0
    assert {r["status"] for r in content["records"]} == {"ok"}
    assert {r["variant"] for r in content["records"]} == {"bf16", *PEERS}
