"""The experts of one rank: which of all they are, a module that holds those alone, and who has such modules.

Parts are those of `torch.chunk` along the first axis, as FSDP2 and expert parallelism cut: with 6 experts on
4 ranks 2, 2, 2 and none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fourfold.errors import ConfigurationError
from fourfold.experts.shapes import ExpertsLayout, Layout, OwnForwardLayout, Projection

# Attribute of a Linear whose weight is a LoRA factor of this rank's experts alone (`adapters.spread`).
FACTOR_OF = "fourfold_part"


@dataclass(frozen=True)
class Part:
    """The share of one rank.

    Attributes:
        rank: 0 to ``count - 1``.
        count: of the ranks that share a tensor.
    """

    rank: int
    count: int

    def of(self, length: int) -> tuple[int, int]:
        """Where this rank's part of an axis begins and ends."""
        size = -(-length // self.count)
        return min(self.rank * size, length), min((self.rank + 1) * size, length)


def cut_projection(projection: Projection, part: Part) -> Projection:
    """The same projection with this rank's experts only."""
    start, stop = part.of(projection.shape.experts)
    return replace(projection, shape=replace(projection.shape, experts=stop - start))


def cut_layout(layout: Layout, part: Part) -> Layout:
    """The same module with this rank's experts only."""
    if isinstance(layout, ExpertsLayout):
        up, down = cut_projection(layout.up, part), cut_projection(layout.down, part)
        return replace(layout, num_experts=up.shape.experts, up=up, down=down)
    projections = tuple(cut_projection(projection, part) for projection in layout.projections)
    experts = max(projection.shape.experts for projection in projections)
    return OwnForwardLayout(experts, projections, layout.transposed, layout.flattened, layout.reader)


def alike_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a spread model and lies whole on every rank, by name."""
    own = {id(p) for p in spread_parameters(model).values()}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}


def spread_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Factors of this rank's experts, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module, FACTOR_OF)
    }


def refuse_spread(model: nn.Module, what: str, remedy: str) -> None:
    """For what takes all experts of a module to be here.

    Raises:
        ConfigurationError: they are not.
    """
    for module in model.modules():
        if getattr(module, "fourfold_spread", None) is not None:
            raise ConfigurationError(
                f"{module.fourfold_name}: its experts are spread over processes (expert "
                f"parallelism), and {what}. {remedy}"
            )
