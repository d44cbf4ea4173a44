"""Products over packed experts for Hopper: CUDA C++, compiled at first use."""

from fourfold.kernels.hopper.products import hopper_product, refusal

__all__ = ["hopper_product", "refusal"]
