"""Grouped products over packed experts. Knows neither transformers nor PEFT; sees tensors only.

- `routing`: rows sorted by expert, gathered, and summed back; deterministic, no host synchronisation.
- `decode`: a packed stack into a workspace (Triton on CUDA, plain torch elsewhere).
- `grouped`: grouped matrix products on decoded weights.
- `ways`: the ways to multiply with packed weights, and the rule that chooses one.
- `workspace`, `product_triton`, `cuda.hopper`: three of them, decoding before the product and inside of it.
- `rows`: passes over routed rows (the gate, its gradient) that do LoRA's small products on their way.
- `cuda`: kernels in CUDA C++, compiled at first use; where they do not fit, Triton and torch do the same.
- `linear`: the product over packed weights with its low-rank addition, forward and backward.
- `layer`: a whole layer of the common kind in one differentiable step, on CUDA.
- `operators`: these steps as operators of torch, for `torch.compile`.
- `reference`: the same in a plain loop over experts, as oracle.
"""

from fourfold.kernels import operators  # noqa: F401  (defined before a compiler asks for them)
from fourfold.kernels.linear import LowRank, packed_linear
from fourfold.kernels.reference import reference_linear
from fourfold.kernels.routing import Routing, combine, dispatch, route

__all__ = ["LowRank", "Routing", "combine", "dispatch", "packed_linear", "reference_linear", "route"]
