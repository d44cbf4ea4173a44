"""`fourfold.loftq_init`: factors that begin with what packing lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

import fourfold
import needs
import tiny
from fourfold.adapters import loftq
from fourfold.adapters.low_rank_fit import EXACT, fit, fit_stacked
from fourfold.errors import AdapterError, CheckpointError
from fourfold.experts import find_experts
from fourfold.kernels.decode import decode
from fourfold.loading import matrices
from fourfold.loading.raw import read_numbers
from parity import lora
from tiny import logits

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"experts_quant_type": "nf4"},
    "nf4-double": {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"experts_quant_type": "fp4"},
    "int8": {"experts_quant_type": "int8"},
}
KINDS: dict[str, Callable[..., PretrainedConfig]] = tiny.KINDS | {
    "llama4": tiny.llama4,
    "jetmoe": tiny.jetmoe,
    "dbrx": tiny.dbrx,
}


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every fused parameter as the model stores it, decoded if it is packed."""
    plain = model if getattr(model, "hf_quantizer", None) is None else fourfold.dequantize(model)
    return {
        f"{found.name}.{p.name}": getattr(found.module, p.name).detach()
        for found in find_experts(plain)
        for p in found.layout.projections
    }


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself reckons the adapter to add to every fused parameter."""
    return {
        f"{m.get_base_layer().fourfold_name}.{m.parameter_name}": m.get_delta_weight("default").detach()
        for m in model.modules()
        if type(m).__name__ == "ParamWrapper"
    }


def as_matrices(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save(tiny.qwen3_moe(), path)
    return path


def begun(folder: Path, settings: dict[str, Any] | None = None, **changes: Any) -> PeftModel:
    model = tiny.load(folder, **(settings or FORMATS["nf4"]))
    return get_peft_model(
        model, lora(model, **({"init_lora_weights": True, "target_modules": None} | changes))
    )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_takes_from_the_error_what_a_truncated_svd_takes(kind: str, fmt: str, tmp_path: Path) -> None:
    """Each matrix, of every layout of files and of factors."""
    original = weights(tiny.save(KINDS[kind](), tmp_path))
    decoded = weights(tiny.load(tmp_path, **FORMATS[fmt]))
    model = begun(tmp_path, FORMATS[fmt], r=3, lora_alpha=7)
    report = fourfold.loftq_init(model)
    found = deltas(model)
    assert found.keys() == original.keys()
    for name, delta in found.items():
        lost, rest = original[name] - decoded[name], original[name] - decoded[name] - delta
        expected = torch.linalg.svdvals(as_matrices(lost).double())[:, 3:].square().sum(-1).sqrt()
        norms = as_matrices(rest).double().flatten(1).norm(dim=1)
        assert torch.allclose(norms, expected, rtol=1e-4), name
        assert (norms < as_matrices(lost).flatten(1).norm(dim=1)).all()
    for role in report.roles.values():
        assert 0 < role.after < role.before < 0.5
    assert sum(role.parameters for role in report.roles.values()) == len(found)


@pytest.mark.parametrize("layout", ["model", "original", "sharded"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_reads_every_layout_of_files(kind: str, layout: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"save_original_format": layout == "original"}
    if layout == "sharded":
        arguments["max_shard_size"] = "60KB"
    config = tiny.KINDS[kind]()
    tiny.save(config, tmp_path / "one", **arguments)
    tiny.save(config, tmp_path / "other", save_original_format=False)
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        model = begun(folder)
        fourfold.loftq_init(model)
        found.append(deltas(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("original", [True, False])
def test_one_matrix_is_read_at_a_time(
    kind: str, original: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(KINDS[kind](), tmp_path, save_original_format=original)
    model, read, decoded = begun(tmp_path), [], []
    layout = find_layout(model)
    monkeypatch.setattr(matrices, "read_numbers", lambda *args: read.append(args[1]) or read_numbers(*args))
    monkeypatch.setattr(
        loftq, "decode", lambda stack, dtype: decoded.append(stack.shape.experts) or decode(stack, dtype)
    )
    fourfold.loftq_init(model)
    assert max(read) <= max(p.shape.rows * p.shape.columns for p in layout.projections)
    assert set(decoded) == {1}


def find_layout(model: PeftModel) -> Any:
    return next(find_experts(model)).layout


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_logits_come_closer_to_those_of_the_original(kind: str, tmp_path: Path) -> None:
    """The more so, the higher the rank; of full rank they are those of the original."""
    original = logits(tiny.save(tiny.KINDS[kind](), tmp_path))
    errors = []
    for rank in (0, 8, 24, 64):
        model = begun(tmp_path, r=max(rank, 1), lora_alpha=16)
        if rank:
            fourfold.loftq_init(model)
        errors.append(relative(logits(model), original))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision(folder: Path, dtype: torch.dtype) -> None:
    models = [begun(folder), begun(folder)]
    for name, parameter in models[1].named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    reports = [fourfold.loftq_init(model) for model in models]
    assert {p.dtype for n, p in models[1].named_parameters() if "lora_" in n} == {dtype}
    for exact, rounded in zip(deltas(models[0]).values(), deltas(models[1]).values(), strict=True):
        assert relative(rounded, exact) < 4 * torch.finfo(dtype).eps
    for role, figures in reports[0].roles.items():
        assert reports[1].roles[role].after == pytest.approx(figures.after, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"r": 2, "rank_pattern": {r".*\.experts.*": 5}, "alpha_pattern": {r".*\.experts.*": 3}},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_scaling_patterns_and_single_projections(folder: Path, changes: dict[str, Any]) -> None:
    """The sum is the same whatever the scaling is."""
    plain, other = begun(folder, r=5, lora_alpha=5), begun(folder, **({"r": 5} | changes))
    for model in (plain, other):
        fourfold.loftq_init(model)
    expected, found = deltas(plain), deltas(other)
    assert found
    for name, delta in found.items():
        assert relative(delta, expected[name]) < 1e-5


def test_ranks_beyond_the_errors_own_keep_what_they_began_with(tmp_path: Path) -> None:
    """With zeros in both factors, no gradient would ever reach them."""
    config = tiny.qwen3_moe(moe_intermediate_size=8)
    tiny.save(config, tmp_path)
    model = begun(tmp_path, r=12)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    fourfold.loftq_init(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts")  # down: 64 x 8
    a_ERK = layer.lora_A["default"].weight.detach().view(6, 12, -1)
    kept = before["base_model.model.model.layers.0.mlp.experts.lora_A.default.weight"].view(6, 12, -1)
    assert torch.equal(a_ERK[:, 8:], kept[:, 8:])
    assert not torch.equal(a_ERK[:, :8], kept[:, :8])
    model.train()
    model(tiny.IDS, labels=tiny.IDS).loss.backward()
    b_NRE = layer.lora_B["default"].weight.grad.view(-1, 12, 6)
    assert all(b_NRE[:, rank].any() for rank in range(12))


def test_experts_that_lost_nothing_train_from_zero(folder: Path, tmp_path: Path) -> None:
    """Weights that the format holds exactly."""
    shutil.copytree(folder, tmp_path / "exact")
    file = tmp_path / "exact" / "model.safetensors"
    tensors = load_file(file)
    ones = {key: torch.ones_like(t) for key, t in tensors.items() if "experts" in key}
    save_file(tensors | ones, file, metadata={"format": "pt"})
    model = begun(tmp_path / "exact")
    report = fourfold.loftq_init(model)
    assert all(role.before == role.after == 0 for role in report.roles.values())
    for name, parameter in model.named_parameters():
        assert "lora_" not in name or bool(parameter.any()) == ("lora_A" in name)


def test_is_the_same_each_time_and_leaves_random_numbers_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fourfold.adapters.low_rank_fit.EXACT", 8
    )  # (so that these sizes are fitted at random)
    found, drawn = [], []
    for seed in (1, 2):
        model = begun(folder)
        torch.manual_seed(seed)
        fourfold.loftq_init(model)
        drawn.append(float(torch.rand(())))
        torch.manual_seed(seed)
        assert drawn[-1] == float(torch.rand(()))
        found.append(deltas(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_large_matrices_are_fitted_nearly_as_well() -> None:
    """Noise, the hardest case: of what the exact decomposition takes, 95 % and more."""
    e_PQ = torch.randn(EXACT + 88, 700)
    left, right = fit(e_PQ, 16)
    best = torch.linalg.svdvals(e_PQ)[:16].square().sum()
    taken = e_PQ.square().sum() - (e_PQ - left @ right).square().sum()
    assert 0.95 < float(taken / best) <= 1.0001
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-3)


def test_stacked_matrices_are_one_matrix() -> None:
    e_MPQ = torch.randn(3, 20, 16)

    def matrices() -> Iterator[torch.Tensor]:
        return iter(e_MPQ)

    lefts, right = fit_stacked(matrices, 4)
    whole, expected = torch.cat(list(lefts)) @ right, fit(e_MPQ.flatten(0, 1), 4)
    assert relative(whole, expected[0] @ expected[1]) < 1e-5


def test_zeros_have_rank_zero() -> None:
    left, right = fit(torch.zeros(6, 5), 3)
    assert (left.shape, right.shape) == ((6, 0), (0, 5))


def test_other_adapters_and_linears_are_left_alone(folder: Path) -> None:
    model = begun(folder, target_modules=["q_proj"])
    model.add_adapter("other", lora(model, init_lora_weights=False, target_modules=["q_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    fourfold.loftq_init(model, adapter_name="default")
    for name, parameter in model.named_parameters():
        if name in before:
            changed = ".default." in name and "experts" in name
            assert torch.equal(parameter, before[name]) != changed, name


def test_a_packed_copy_finds_its_original(folder: Path, tmp_path: Path) -> None:
    packed = tiny.packed_folder(folder, tmp_path / "packed")
    model = begun(packed, settings={"experts_quant_type": "nf4"})
    report = fourfold.loftq_init(model)
    assert report.base["name"] == str(folder)
    ours, other = deltas(model), begun(folder)
    fourfold.loftq_init(other, base=folder)
    assert all(torch.equal(delta, ours[name]) for name, delta in deltas(other).items())


def test_progress_and_report(folder: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = fourfold.loftq_init(begun(folder), progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == [0, 1, 2, 3, 4]
    assert {step[1] for step in seen} == {4}
    assert seen[-1][2] == ""
    assert report.to_dict()["roles"]["mlp.experts.down_proj"]["parameters"] == 2


def test_adapters_of_transformers_own_mixin(folder: Path) -> None:
    needs.transformers_mixin()
    model = tiny.load(folder, **FORMATS["nf4"])
    targets = fourfold.expert_targets(model)
    model.add_adapter(LoraConfig(r=3, target_parameters=targets), adapter_name="mine")
    before = logits(model)
    fourfold.loftq_init(model, adapter_name="mine")
    assert not torch.equal(logits(model), before)


# What cannot be right


def refused(model: Any, error: type[Exception], match: str, **arguments: Any) -> None:
    """Raises, and leaves every B as it was."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    with pytest.raises(error, match=match):
        fourfold.loftq_init(model, **arguments)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_adapters_that_cannot_begin_are_refused(folder: Path) -> None:
    refused(tiny.load(folder, **FORMATS["nf4"]), AdapterError, "has no adapter 'default'; it has none")
    refused(begun(folder), AdapterError, "has no adapter 'other'; it has default", adapter_name="other")
    linears = tiny.load(folder, **FORMATS["nf4"])
    linears = get_peft_model(linears, LoraConfig(r=2, target_modules=["q_proj"]))
    refused(linears, AdapterError, "no factors on packed experts")
    plain = tiny.load(folder)
    refused(get_peft_model(plain, lora(plain)), AdapterError, "no factors on packed experts")
    refused(begun(folder, init_lora_weights=False), AdapterError, "lora_B of .* is not zero")
    refused(begun(folder, lora_alpha=0), AdapterError, "scaling of 0")
    again = begun(folder)
    fourfold.loftq_init(again)
    refused(again, AdapterError, "is not zero")


def test_weights_that_are_not_here_are_refused(folder: Path) -> None:
    model = begun(folder)
    experts = tiny.experts_of(model)
    experts._parameters["down_proj"] = torch.nn.Parameter(
        experts._parameters["down_proj"].to("meta"), requires_grad=False
    )
    refused(model, AdapterError, "offloaded or sharded")


def test_other_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tensors = load_file(other / "model.safetensors")
    key = next(key for key in tensors if "experts" in key)
    tensors[key] = torch.randn_like(tensors[key])  # one expert, the rest is the same
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused(begun(folder), CheckpointError, "holds other weights", base=other)
    refused(
        begun(folder),
        CheckpointError,
        "expert 0 of the base is not what was packed",
        base=other,
        any_base=True,
    )
    packed = tiny.packed_folder(folder, tmp_path / "packed")
    refused(begun(folder), CheckpointError, "packed or quantized itself.*made of", base=packed)
    refused(begun(folder), CheckpointError, "no model folder", base=tmp_path / "nowhere")
    tiny.save(tiny.qwen3_moe(num_experts=4), tmp_path / "small")
    refused(begun(folder), CheckpointError, "4 of 6|does not fit", base=tmp_path / "small", any_base=True)


def test_a_damaged_base_leaves_the_adapter_at_zero(folder: Path, tmp_path: Path) -> None:
    """Also where a part was fitted before the damage was met."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    tensors = load_file(damaged / "model.safetensors")
    key = [key for key in tensors if "experts" in key][-1]
    tensors[key].fill_(float("nan"))
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    refused(begun(folder), CheckpointError, "is not what was packed", base=damaged, any_base=True)


def test_a_model_without_origin_asks_for_its_base(folder: Path) -> None:
    model = begun(folder)
    model.get_base_model().hf_quantizer.quantization_config.base = None
    refused(model, AdapterError, "pass base=")
    fourfold.loftq_init(model, base=folder)
