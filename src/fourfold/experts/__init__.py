"""What an experts module is, how it is held packed, and its one routed forward.

- `layout`, `shapes`: read off the module's own attributes and shapes; there is no table of model names.
- `packed`: the dynamic subclass that holds packed parameters.
- `forward`: rows to experts, products, gate, and back.
- `undecorated`, `observe`, `own_forward`: modules that do not say what they are, watched, and run by their
  own code over decoded weights.
"""

from fourfold.experts.layout import FoundExperts, expert_targets, find_experts
from fourfold.experts.own_forward import prepare_reader_, release_readers_
from fourfold.experts.packed import PackedExperts, pack_module_, prepare_module_, unpack_module_
from fourfold.experts.shapes import ExpertsLayout, OwnForwardLayout, Projection

__all__ = [
    "ExpertsLayout",
    "FoundExperts",
    "OwnForwardLayout",
    "PackedExperts",
    "Projection",
    "expert_targets",
    "find_experts",
    "pack_module_",
    "prepare_module_",
    "prepare_reader_",
    "release_readers_",
    "unpack_module_",
]
