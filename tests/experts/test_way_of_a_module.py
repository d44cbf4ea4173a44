"""``module.way``: how the products of one experts module are computed."""

from __future__ import annotations

import pytest
import torch

import needs
import tiny
from fourfold.errors import ConfigurationError
from fourfold.experts.layout import find_experts
from fourfold.experts.packed import pack_module_, unpack_module_
from fourfold.experts.plain import take_low_rank_
from fourfold.formats import PackFormat
from fourfold.kernels import LowRank, ways

needs.triton()
NF4 = PackFormat("nf4")


def low_rank(module: torch.nn.Module) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(1)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    return {
        p.name: LowRank(factor(p.shape.experts, 4, p.shape.columns), factor(p.shape.experts, p.shape.rows, 4))
        for p in module.fourfold_layout.projections
    }


def made(kind: str, packed: bool) -> torch.nn.Module:
    model = tiny.build(getattr(tiny, kind)())
    model.requires_grad_(False)
    if not packed:
        take_low_rank_(model)
    module = tiny.experts_of(model)
    return pack_module_(module, NF4, "model.layers.0.mlp.experts") if packed else module


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_same_numbers_by_each_way(kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(kind, packed)
    assert module.way is None
    T, E = 9, module.fourfold_layout.num_experts
    x = torch.randn(T, module.fourfold_layout.up.shape.columns)
    index = torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    weights, factors = torch.rand(T, 2), low_rank(module)
    asked: list[str | None] = []
    choose = ways.choose
    monkeypatch.setattr(ways, "choose", lambda p, a=None, where="": asked.append(a) or choose(p, a, where))
    found = {}
    for way in (None, *ways.possible(ways.problem(x, module.stack(module.fourfold_layout.up)))):
        module.way = way
        asked.clear()
        found[way] = module(x, index, weights, low_rank=factors)
        assert set(asked) == {way}
        torch.testing.assert_close(found[way], found[None], rtol=1e-4, atol=1e-5)


def test_an_impossible_way_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_interpreting", lambda: False)
    module = made("mixtral", packed=True)
    index, weights = torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2)
    x = torch.randn(3, module.fourfold_layout.up.shape.columns)
    for way, why in (("in_product", "it runs on CUDA"), ("fast", "there is no such way")):
        module.way = way
        with pytest.raises(ConfigurationError, match=rf"model\.layers\.0\.mlp\.experts: way='{way}': {why}"):
            module(x, index, weights)


def test_experts_with_a_forward_of_their_own_have_no_way() -> None:
    """The attribute would be ignored there, so it is refused."""
    model = tiny.build(tiny.llama4())
    for found in list(find_experts(model)):
        pack_module_(found.module, NF4, found.name, found.layout).way = "workspace"
    with pytest.raises(ConfigurationError, match=r"experts: way='workspace'.*their own forward"):
        model(tiny.IDS)


def test_unpacking_takes_the_attribute_along() -> None:
    module = unpack_module_(made("mixtral", packed=True), torch.float32)
    assert not hasattr(module, "way")


def test_a_way_that_the_second_product_alone_cannot_go_is_an_error_before_the_first(monkeypatch) -> None:
    module = made("mixtral", packed=True)
    layout, gone = module.fourfold_layout, []

    def cannot(problem: ways.Problem) -> str | None:
        return "it is for other sizes" if problem.out == layout.down.shape.rows else None

    product = ways.WAYS["reference"].product
    new = ways.Way("a new one", cannot, lambda *a, **k: gone.append(a) or product(*a, **k))
    monkeypatch.setitem(ways.WAYS, "new", new)
    module.way = "new"
    x, index = torch.randn(2, layout.up.shape.columns), torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ConfigurationError, match=r"mlp\.experts: way='new': it is for other sizes"):
        module(x, index, torch.rand(2, 2), low_rank={})
    assert not gone
