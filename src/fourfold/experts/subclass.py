"""Dynamic subclasses: a module keeps its own class and gets behaviour put in front of it.

Such a class has no name in any module that pickle could look up, so an instance is pickled (and copied) as
what its class was made of.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Dynamic(nn.Module):
    """Base of the mixins."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How `copy.deepcopy`, `pickle` and `torch.save` of a whole module take it apart."""
        made = super().__reduce_ex__(max(2, int(protocol)))
        recipe = type(self).__dict__.get("fourfold_made_of")
        if recipe is None or not isinstance(made, tuple):  # (another library's subclass of this one)
            return made
        return (_unpickled, recipe, *made[2:])


_MADE: dict[tuple[type[nn.Module], type[Dynamic], str], type[nn.Module]] = {}


def subclass(cls: type[nn.Module], mixin: type[Dynamic], prefix: str) -> type[nn.Module]:
    """``mixin`` in front of ``cls``, called as that with a prefix; one class for each three."""
    recipe = (cls, mixin, prefix)
    if recipe not in _MADE:
        members = {"__module__": cls.__module__, "__doc__": cls.__doc__, "fourfold_made_of": recipe}
        _MADE[recipe] = type(f"{prefix}{cls.__name__}", (mixin, cls), members)
    return _MADE[recipe]


def _unpickled(cls: type[nn.Module], mixin: type[Dynamic], prefix: str) -> nn.Module:
    made: Any = subclass(cls, mixin, prefix)
    module: nn.Module = made.__new__(made)  # (its state follows)
    return module
