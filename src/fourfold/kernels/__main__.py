"""``python -m fourfold.kernels``: the ways to multiply with packed experts, and the rule that chooses."""

from fourfold.kernels.ways import describe

print(describe())
