"""Undecorated experts: observed, packed, and run by their own forward over decoded weights."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from fourfold.experts import (
    PackedExperts,
    find_experts,
    own_forward,
    pack_module_,
    prepare_reader_,
    unpack_module_,
)
from fourfold.experts.own_forward import ReadsPackedExperts, _Scope, release_readers_
from fourfold.formats import PackFormat
from fourfold.kernels.decode import decode
from fourfold.planning.conformance import tiny_models

# Model type -> the kind that must be observed. (Names are in tests only: the code knows none.)
OBSERVED = {
    "llama4_text": "own forward, transposed",
    "jetmoe": "own forward",
    "dbrx": "own forward, flattened, w2 transposed",
    "longcat_flash": "own forward",
    "step3p5": "own forward",
    "inkling_text": "own forward",
}
IDS = torch.arange(1, 19).view(2, 9)
NF4 = PackFormat("nf4", 64, True)


def build(model_type: str) -> nn.Module:
    if model_type not in tiny_models.known_types():
        pytest.skip(f"this transformers has no {model_type}")
    config = tiny_models.tiny_config(model_type)
    model = tiny_models.build(config, tiny_models.model_classes(type(config))[0])
    tiny_models.randomise_experts_(model)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model.requires_grad_(False)


def pack(model: nn.Module, fmt: PackFormat = NF4) -> nn.Module:
    for found in list(find_experts(model)):
        pack_module_(found.module, fmt, found.name, found.layout)
        if found.reader != found.name:
            prepare_reader_(model.get_submodule(found.reader))
    return model


def results(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the embedded input."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    y = next(iter(model(inputs_embeds=x, use_cache=False).values()))
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return y.detach(), *torch.autograd.grad((y * weights).sum(), x)


@pytest.mark.parametrize(("model_type", "kind"), OBSERVED.items())
def test_layout_is_observed_where_the_meta_device_is_the_default(model_type: str, kind: str) -> None:
    """As within `from_pretrained`."""
    model = build(model_type)
    with torch.device("meta"):
        kinds = {f.layout.kind for f in find_experts(model) if f.layout and not f.layout.routed}
    assert kinds == {kind}


@pytest.mark.parametrize(("model_type", "kind"), OBSERVED.items())
def test_layout_is_observed_with_and_without_storage(model_type: str, kind: str) -> None:
    model = build(model_type)
    own = [f for f in find_experts(model) if not f.layout.routed]
    assert own
    assert {f.layout.kind for f in own} == {kind}
    assert {f.layout.is_transposed for f in own} == {"transposed" in kind}
    skeleton = tiny_models.build(model.config, type(model), "meta")
    assert [f.layout for f in find_experts(skeleton) if not f.layout.routed] == [f.layout for f in own]
    for found in own:
        for projection in found.layout.projections:
            weight = getattr(found.module, projection.name)
            shape = projection.shape
            assert found.layout.model_shape(projection) == tuple(weight.shape)
            w_ENK = found.layout.to_stack(weight, projection)
            assert tuple(w_ENK.shape) == (shape.experts, shape.rows, shape.columns)
            assert torch.equal(found.layout.from_stack(w_ENK, projection), weight)


def test_a_square_matrix_is_told_by_its_use() -> None:
    """Shapes say nothing here; transposed or not is a matter of which product is taken."""

    class SquareExperts(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.num_experts, self.transposed = 3, transposed
            self.w = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            w = self.w if self.transposed else self.w.transpose(1, 2)
            return torch.bmm(hidden_states.expand(3, -1, -1), w).sum(0, keepdim=True)

    class Block(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.experts = SquareExperts(transposed)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.experts(hidden_states.flatten(0, 1)[None])

    for transposed in (True, False):
        SquareExperts = type("SquareExperts", (SquareExperts,), {})  # what is known of a class is kept
        (found,) = find_experts(nn.ModuleDict({"mlp": Block(transposed)}))
        assert found.layout.transposed == ({"w"} if transposed else frozenset())


@pytest.mark.parametrize("fmt", [NF4, PackFormat("int8")], ids=str)
@pytest.mark.parametrize("model_type", OBSERVED)
def test_output_and_gradients_equal_bitsandbytes_round_trip(model_type: str, fmt: PackFormat) -> None:
    model = build(model_type)
    packed = pack(copy.deepcopy(model), fmt)
    original = results(model)
    for ours, theirs, first in zip(
        results(packed), results(tiny.round_trip_(model, fmt)), original, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        assert (ours - first).norm() > 1e-4 * first.norm()


@pytest.mark.parametrize("model_type", OBSERVED)
def test_autograd_keeps_no_decoded_weight_and_hooks_around_are_honoured(model_type: str, monkeypatch) -> None:
    packed = pack(build(model_type))
    scopes: list[_Scope] = []
    decode_ = _Scope._decode

    def record(self, *args):
        scopes.append(self)
        return decode_(self, *args)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        identity = tensor.untyped_storage()._cdata
        assert not any(identity in scope.origin for scope in scopes)  # of those that are open
        kept.append(tensor)
        return tensor

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results(packed)

    kept: list[torch.Tensor] = []
    monkeypatch.setattr(_Scope, "_decode", record)
    run()
    assert scopes
    assert kept
    assert not any(scope.decoded or scope.origin for scope in scopes)
    monkeypatch.setattr(_Scope, "view", lambda self, tensor: None)  # the control: without views they are kept
    with pytest.raises(AssertionError):
        run()


@pytest.mark.parametrize("model_type", OBSERVED)
def test_experts_taken_by_index_are_decoded_one_at_a_time(model_type: str, monkeypatch) -> None:
    packed = pack(build(model_type))
    counts: set[int] = set()

    def counting(stack, dtype):
        counts.add(stack.shape.experts)
        return decode(stack, dtype)

    monkeypatch.setattr(own_forward, "decode", counting)
    results(packed)
    products_of_stacks = model_type in ("llama4_text", "inkling_text")
    assert (counts == {1}) != products_of_stacks


VIEWS = {
    "one expert": lambda w: w[2],
    "some experts, transposed": lambda w: w[1:3].transpose(1, 2),
    "rows of one expert": lambda w: w[3, 5:11],
    "columns of all": lambda w: w[..., 7:40:3],
    "one row": lambda w: w[1, 4],
    "all": lambda w: w,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("model_type", ["llama4_text", "dbrx", "step3p5"])
def test_a_view_is_decoded_again_from_its_experts_alone(model_type: str, view, monkeypatch) -> None:
    packed = pack(build(model_type))
    module = next(m for m in packed.modules() if isinstance(m, PackedExperts))
    counts: list[int] = []

    def counting(stack, dtype):
        counts.append(stack.shape.experts)
        return decode(stack, dtype)

    monkeypatch.setattr(own_forward, "decode", counting)
    for projection in module.fourfold_layout.projections:
        scope = _Scope(torch.float32)
        weight = scope.weight(module, projection)
        expected = view(weight.view(projection.shape.experts, -1, weight.shape[-1]))
        saved = scope.view(expected)
        counts.clear()
        assert torch.equal(saved.decode(), expected)
        touched = expected.shape[0] if expected.ndim == 3 else 1
        assert counts == [touched]
        scope.close()
        assert scope.view(expected) is None
        assert torch.equal(saved.decode(), expected)


@pytest.mark.parametrize("model_type", ["llama4_text", "dbrx"])
def test_checkpointing_gives_the_same_gradients(model_type: str) -> None:
    packed = pack(build(model_type))
    expected = results(packed)
    packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed.train()
    for ours, theirs in zip(results(packed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama4_text", "dbrx"])
def test_autocast_and_compute_dtype_decide_the_products(model_type: str) -> None:
    packed = pack(build(model_type))
    experts = [m for m in packed.modules() if isinstance(m, PackedExperts)]
    full, _ = results(packed)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = results(packed)
    for module in experts:
        module.compute_dtype = torch.bfloat16
    explicit, gradient = results(packed)
    assert full.dtype == explicit.dtype == gradient.dtype == torch.float32
    for other in (cast.float(), explicit):
        assert 1e-6 < (other - full).norm() / full.norm() < 0.03


def test_packed_parameters_are_seen_outside_a_forward_and_after_one_that_failed() -> None:
    packed = pack(build("llama4_text"))
    module = next(m for m in packed.modules() if isinstance(m, PackedExperts))
    assert module.gate_up_proj.dtype == torch.uint8
    with pytest.raises(RuntimeError):
        module(torch.randn(7, 13))
    assert module.gate_up_proj.dtype == torch.uint8
    clone = copy.deepcopy(packed)
    assert torch.equal(results(clone)[0], results(packed)[0])


@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe"])
def test_unpacking_gives_classes_names_and_numbers_back(model_type: str) -> None:
    model = build(model_type)
    packed = pack(copy.deepcopy(model))
    assert any(isinstance(m, ReadsPackedExperts) for m in packed.modules()) == (model_type == "dbrx")
    for module in list(packed.modules()):
        if isinstance(module, PackedExperts):
            unpack_module_(module, torch.float32)
    release_readers_(packed)
    tiny.round_trip_(model, NF4)
    assert [type(m) for m in packed.modules()] == [type(m) for m in model.modules()]
    for (name, ours), (same, theirs) in zip(packed.named_parameters(), model.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(ours, theirs), name


def test_lora_on_attention_alone_works() -> None:
    packed = pack(build("llama4_text"))
    model = get_peft_model(packed, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model(IDS).logits.square().mean().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


class _OwnExperts(nn.Module):
    """Undecorated experts whose forward runs whatever a test gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.body = 3, None
        self.w1 = nn.Parameter(torch.randn(3, 8, 8))
        self.w2 = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, hidden_states: torch.Tensor, *others) -> torch.Tensor:
        if self.body is not None:
            return self.body(hidden_states, *others)
        return torch.bmm(torch.bmm(hidden_states.expand(3, -1, -1), self.w1), self.w2).sum(0, keepdim=True)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = _OwnExperts()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden_states.flatten(0, 1)[None])


def own_experts() -> nn.Module:
    return pack(nn.ModuleDict({"mlp": _Block()}).requires_grad_(False))["mlp"].experts


def test_threads_may_run_the_same_module() -> None:
    module = own_experts()
    x = torch.randn(1, 5, 8)
    expected = module(x)
    inside, left = threading.Barrier(2, timeout=20), threading.Event()

    def slow(hidden_states: torch.Tensor, first: bool) -> torch.Tensor:
        inside.wait()
        if not first:
            assert left.wait(20)  # until the other one has left its forward
        return torch.bmm(torch.bmm(hidden_states.expand(3, -1, -1), module.w1), module.w2).sum(
            0, keepdim=True
        )

    def run(first: bool) -> torch.Tensor:
        try:
            return module(x, first)
        finally:
            left.set()

    module.body = slow
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, (True, False)):
            assert torch.equal(result, expected)
    assert module.w1.dtype == torch.uint8


def test_a_call_within_a_call_leaves_the_outer_one_its_weights_and_errors_come_through() -> None:
    module = own_experts()
    x = torch.randn(1, 5, 8)
    expected = module(x)

    def nested(hidden_states: torch.Tensor) -> torch.Tensor:
        module.body = None
        inner = module(hidden_states)
        return inner + module.w1[0].sum() * 0

    module.body = nested
    assert torch.equal(module(x), expected)

    def failing(hidden_states: torch.Tensor) -> torch.Tensor:
        module.body = nested
        module(hidden_states)
        raise LookupError("out of paper")

    module.body = failing
    with pytest.raises(LookupError, match="out of paper"):
        module(x)


def test_gradients_after_an_operation_in_place_on_a_decoded_matrix() -> None:
    module = own_experts()
    x = torch.randn(5, 8, requires_grad=True)
    w = decode(module.stack(module.own_layout.projection("w1")).experts(0, 1), torch.float32)
    right = module.own_layout.from_stack(w, module.own_layout.projection("w1"))[0]

    def in_place(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ module.w1[0].mul_(3)

    module.body = in_place
    y = module(x)
    torch.testing.assert_close(y, x @ (3 * right))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (3 * right).sum(1).expand(5, -1))


def test_a_call_without_floating_arguments_is_the_modules_own() -> None:
    module = own_experts()
    module.body = lambda index: module.w1[index[0]]
    assert module(torch.tensor([1])).shape == (8, 8)
    assert module(torch.tensor([1])).dtype == torch.float32
