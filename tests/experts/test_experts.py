"""Experts modules of every decorated kind: packed output against the model's own on the same numbers."""

import copy

import pytest
import torch
from torch import nn

import tiny
from fourfold.errors import NoExpertsError
from fourfold.experts import PackedExperts, expert_targets, find_experts, pack_module_, unpack_module_
from fourfold.formats import PackFormat

FORMATS = [PackFormat("nf4"), PackFormat("nf4", 32, True), PackFormat("fp4"), PackFormat("int8")]


def routing(module: nn.Module, tokens: int = 33, k: int = 2):
    E = next(iter(module.parameters(recurse=False))).shape[0]
    weights, index = torch.softmax(torch.randn(tokens, E), -1).topk(k)
    return index, weights


def call(module: nn.Module, x, index, weights):
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
    return module(x, index, weights)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_packed_output_and_gradients_equal_the_models_own_on_the_same_numbers(
    kind: str, fmt: PackFormat
) -> None:
    model = tiny.build(tiny.KINDS[kind]())
    own = tiny.experts_of(model)
    packed = pack_module_(copy.deepcopy(own), fmt)
    tiny.round_trip_(model, fmt)
    x = torch.randn(33, 64)
    index, weights = routing(own)

    def results(module):
        xs, ws = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = call(module, xs, index, ws)
        return y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), (xs, ws))

    for ours, theirs in zip(results(packed), results(own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def _roll(packed: PackedExperts, suffix: str) -> None:
    for p in packed.fourfold_layout.projections:
        name = p.name + suffix
        packed._parameters[name] = nn.Parameter(packed._parameters[name].roll(1, 0), requires_grad=False)


def _swap_gate_and_up(packed: PackedExperts) -> None:
    up = packed.fourfold_layout.up
    for suffix in ("", "_absmax"):
        tensor = packed._parameters[up.name + suffix]
        packed._parameters[up.name + suffix] = nn.Parameter(
            tensor.roll(tensor.shape[1] // 2, 1), requires_grad=False
        )


@pytest.mark.parametrize(
    "damage",
    [lambda p: _roll(p, ""), lambda p: _roll(p, "_absmax"), _swap_gate_and_up],
    ids=["bytes of the neighbour", "scales of the neighbour", "gate and up swapped"],
)
def test_the_comparison_sees_damage(damage) -> None:
    """Negative controls: what the test above must be able to notice."""
    model = tiny.build(tiny.mixtral())
    packed = pack_module_(copy.deepcopy(tiny.experts_of(model)), PackFormat("nf4"))
    tiny.round_trip_(model, PackFormat("nf4"))
    own, x = tiny.experts_of(model), torch.randn(33, 64)
    index, weights = routing(own)
    right = call(own, x, index, weights)
    assert (call(packed, x, index, weights) - right).norm() < 1e-4 * right.norm()
    damage(packed)
    assert (call(packed, x, index, weights) - right).norm() > 1e-2 * right.norm()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_unpacking_gives_the_class_and_the_numbers_back(kind: str) -> None:
    model = tiny.build(tiny.KINDS[kind]())
    own = tiny.experts_of(model)
    before = type(own)
    names = [n for n, _ in own.named_parameters()]
    packed = pack_module_(copy.deepcopy(own), PackFormat("nf4", 64, True))
    assert isinstance(packed, before)
    plain = unpack_module_(packed, torch.float32)
    tiny.round_trip_(model, PackFormat("nf4", 64, True))
    assert type(plain) is before
    assert [n for n, _ in plain.named_parameters()] == names
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), own.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_casting_and_moving_leave_packed_tensors_alone() -> None:
    packed = pack_module_(tiny.experts_of(tiny.build(tiny.gpt_oss())), PackFormat("nf4", 64, True))
    before = {n: p.clone() for n, p in packed.named_parameters()}
    packed.to(torch.bfloat16).half().float()
    for name, tensor in before.items():
        if not tensor.is_floating_point():
            assert torch.equal(packed._parameters[name], tensor), name
            assert not packed._parameters[name].requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        packed.gate_up_proj_absmax_scale.requires_grad_(True)


def test_autocast_and_compute_dtype_decide_the_products() -> None:
    packed = pack_module_(tiny.experts_of(tiny.build(tiny.mixtral())), PackFormat("nf4"))
    x = torch.randn(9, 64)
    index, weights = routing(packed, 9)
    full = packed(x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):  # (does not reach grouped products there)
        cast = packed(x, index, weights)
    assert torch.equal(cast, full)
    packed.compute_dtype = torch.bfloat16
    explicit = packed(x, index, weights)
    assert full.dtype == cast.dtype == explicit.dtype == torch.float32
    assert not torch.equal(explicit, full)
    assert (explicit - full).norm() < 0.02 * full.norm()


def test_empty_batches_pass() -> None:
    packed = pack_module_(tiny.experts_of(tiny.build(tiny.mixtral())), PackFormat("nf4"))
    y = packed(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert y.shape == (0, 64)


def test_a_deep_copy_computes_the_same() -> None:
    packed = pack_module_(tiny.experts_of(tiny.build(tiny.mixtral())), PackFormat("nf4"))
    x = torch.randn(9, 64)
    index, weights = routing(packed, 9)
    assert torch.equal(copy.deepcopy(packed)(x, index, weights), packed(x, index, weights))


@pytest.mark.parametrize(
    ("kind", "words", "targets"),
    [
        ("mixtral", "gated", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("qwen3_moe", "gated", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        (
            "gpt_oss",
            "gated, transposed, interleaved, bias",
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        ("nemotron_h", "no gate", ["mixer.experts.up_proj", "mixer.experts.down_proj"]),
    ],
)
def test_layout_and_targets(kind: str, words: str, targets: list[str]) -> None:
    model = tiny.build(tiny.KINDS[kind]())
    found = list(find_experts(model))
    assert found
    assert {f.layout.kind for f in found} == {words}
    assert expert_targets(model) == targets
    with torch.device("meta"):
        assert expert_targets(type(model)(model.config)) == targets
    pack_module_(found[0].module, PackFormat("int8"))
    assert expert_targets(model) == targets


def test_targets_of_a_dense_model_are_an_error() -> None:
    with pytest.raises(NoExpertsError, match="no fused experts"):
        expert_targets(tiny.build(tiny.dense()))


class _Stacks(nn.Module):
    """Two stacks of matrices that are no experts (as in block-wise recurrences)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4, 8, 8))
        self.b = nn.Parameter(torch.zeros(4, 8, 8))


class _Flattened(nn.Module):
    """Experts flattened to two dimensions, as dbrx has them."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_num_experts = 4
        self.w1 = nn.Parameter(torch.zeros(4 * 8, 6))
        self.w2 = nn.Parameter(torch.zeros(4 * 8, 6))


def test_stacks_that_are_no_experts_are_left_alone_and_unknown_kinds_are_found() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3), "stacks": _Stacks(), "router": nn.Linear(6, 4)})
    assert list(find_experts(model)) == []
    (found,) = find_experts(nn.ModuleDict({"experts": _Flattened()}))
    assert found.layout is None
    assert "cannot be packed" in found.reason
