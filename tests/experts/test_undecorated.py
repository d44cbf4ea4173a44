"""What is an experts module where none says so: by its counts, the configuration, and its use."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fourfold.experts import find_experts

H, I, E = 12, 10, 4  # noqa: E741


class Router(nn.Module):
    """A noisy top-k router: two matrices of hidden size times experts."""

    def __init__(self, noise_always: bool, names: tuple[str, ...] = ("num_experts",)) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, E)
        self.num_experts_per_tok = 2
        self.noise_always = noise_always
        self.w_gate = nn.Parameter(torch.randn(H, E))
        self.w_noise = nn.Parameter(torch.randn(H, E))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scores = hidden_states @ self.w_gate
        if self.noise_always or self.training:
            scores = scores + nn.functional.softplus(hidden_states @ self.w_noise)
        return scores.softmax(-1)


class DeepRouter(nn.Module):
    """No edge is the number of experts: only the use tells."""

    def __init__(self, noise_always: bool) -> None:
        super().__init__()
        self.num_experts, self.noise_always = E, noise_always
        self.w_gate = nn.Parameter(torch.randn(H, 2 * H))
        self.w_noise = nn.Parameter(torch.randn(H, 2 * H))

    forward = Router.forward


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(this, hidden_states: torch.Tensor) -> torch.Tensor:  # noqa: N805 (it may have any name)
        return this.inner(hidden_states)


class Stacks(nn.Module):
    """Undecorated stacks, which a class name of its own does not betray."""

    def __init__(self, **attributes: int) -> None:
        super().__init__()
        vars(self).update(attributes)
        self.w1 = nn.Parameter(torch.randn(E, H, I))
        self.w2 = nn.Parameter(torch.randn(E, I, H))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(1, -1, hidden_states.shape[-1]).expand(E, -1, -1)
        return torch.bmm(torch.bmm(x, self.w1).relu(), self.w2).sum(0)


class Flat(nn.Module):
    def __init__(self, **attributes: int) -> None:
        super().__init__()
        vars(self).update(attributes)
        self.w1 = nn.Parameter(torch.randn(E * I, H))
        self.w2 = nn.Parameter(torch.randn(E * I, H))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        w1, w2 = self.w1.view(E, I, H), self.w2.view(E, I, H)
        return sum(((hidden_states @ w1[e].t()).relu() @ w2[e]) for e in range(E))


def found_in(inner: nn.Module, config: object = None, name: str = "block"):
    model = nn.ModuleDict({name: Block(inner)})
    model.config = config
    return list(find_experts(model))


@pytest.mark.parametrize("noise_always", [True, False])
@pytest.mark.parametrize("router", [Router, DeepRouter])
def test_a_noisy_router_is_no_experts_module(router: type[nn.Module], noise_always: bool) -> None:
    assert found_in(router(noise_always)) == []


def test_how_many_experts_a_token_gets_is_no_count() -> None:
    class PerToken(Flat):
        """Twice as many rows as experts of a token."""

    for attribute in ("num_experts_per_tok", "num_experts_per_token", "expert_capacity", "n_expert_group"):
        assert found_in(PerToken(**{attribute: E})) == []
        assert found_in(Stacks(**{attribute: E})) == []


@pytest.mark.parametrize(
    "attribute",
    ["num_experts", "n_experts", "num_moe_experts", "expert_num", "n_local_experts", "experts_total"],
)
@pytest.mark.parametrize("stacks", [Stacks, Flat])
def test_a_count_of_any_name_is_enough(stacks: type[nn.Module], attribute: str) -> None:
    (found,) = found_in(stacks(**{attribute: E}))
    assert found.layout is not None, found.reason
    assert found.layout.num_experts == E


@pytest.mark.parametrize("key", ["n_experts", "num_local_experts", "moe_num_experts"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_count_in_the_configuration_is_enough(key: str, nested: bool) -> None:
    config = SimpleNamespace(**{key: E, "num_attention_heads": 3})
    config = SimpleNamespace(text_config=config) if nested else config
    (found,) = found_in(Stacks(), config)
    assert found.layout is not None
    assert found.layout.num_experts == E
    (found,) = found_in(Flat(), config, name="moe")
    assert found.layout.num_experts == E


def test_stacks_over_heads_are_left_alone() -> None:
    assert found_in(Stacks(), SimpleNamespace(num_experts=E, num_attention_heads=E)) == []
    assert found_in(Stacks(), SimpleNamespace(num_experts=E + 1)) == []
    assert found_in(Stacks(), SimpleNamespace(num_experts_per_tok=E)) == []
    assert found_in(Flat(), SimpleNamespace(num_experts=E)) == []


class GroupedExpertsGemm(nn.Module):
    """One projection; how many experts there are is under a name of its own (Aria's in transformers 5.17)."""

    def __init__(self, columns: int, rows: int, groups: int = E) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(groups, columns, rows))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return sum(hidden_states @ self.weight[e] for e in range(self.groups))


class TwoProjections(nn.Module):
    def __init__(self, projection: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = projection(H, 2 * I), projection(I, H)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc1(hidden_states).chunk(2, -1)
        return self.fc2(gate * up)


def test_a_projection_by_itself_that_is_called_experts_is_counted_by_the_configuration() -> None:
    config = SimpleNamespace(moe_num_experts=E, num_attention_heads=E)
    found = found_in(TwoProjections(GroupedExpertsGemm), config)
    assert [f.name for f in found] == ["block.inner.fc1", "block.inner.fc2"]
    for each, (columns, rows) in zip(found, [(H, 2 * I), (I, H)], strict=True):
        assert each.layout is not None, each.reason
        (projection,) = each.layout.projections
        assert (projection.shape.experts, projection.shape.rows, projection.shape.columns) == (
            E,
            rows,
            columns,
        )
        assert "weight" in each.layout.transposed
    assert found_in(TwoProjections(GroupedExpertsGemm), SimpleNamespace(moe_num_experts=E + 1)) == []
    other_name = type("GroupedGemm", (GroupedExpertsGemm,), {})
    assert found_in(TwoProjections(other_name), config) == []
