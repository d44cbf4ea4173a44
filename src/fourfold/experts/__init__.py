"""What an experts module is, how it is held packed, and its one routed forward.

- `layout`: read off the module's own attributes and shapes; there is no table of model names.
- `packed`: the dynamic subclass that holds packed parameters.
- `forward`: rows to experts, products, gate, and back.
"""

from fourfold.experts.layout import ExpertsLayout, FoundExperts, Projection, expert_targets, find_experts
from fourfold.experts.packed import PackedExperts, pack_module_, prepare_module_, unpack_module_

__all__ = [
    "ExpertsLayout",
    "FoundExperts",
    "PackedExperts",
    "Projection",
    "expert_targets",
    "find_experts",
    "pack_module_",
    "prepare_module_",
    "unpack_module_",
]
