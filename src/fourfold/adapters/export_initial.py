"""What an adapter began with, taken off again.

An adapter that `loftq_init` began makes up for what packing lost, ``dq(W) + B0 A0``, and is then trained to
``dq(W) + BA``. On the original weights only ``BA - B0 A0`` is right, which is ``[B, -B0] [A; A0]``: an
ordinary adapter of twice the rank. Factors of Linears begin with B of zero and stay as they are.

E experts, R rank, K in, N out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fourfold.adapters import provenance
from fourfold.adapters.export_factors import Factors
from fourfold.adapters.export_read import Adapter, read_adapter
from fourfold.adapters.export_source import Source
from fourfold.errors import AdapterError

ON_ORIGINAL = (
    "serve what `fourfold merge --base-weights dequantized` makes of it; or pass --initial (initial=) with "
    "the same adapter as loftq_init left it; or, where the server holds dequantized weights, --base-weights "
    "dequantized (base_weights='dequantized')"
)


def read_initial(adapter: Path, initial: str | Path, base_weights: str) -> Adapter:
    """The adapter as it began.

    Raises:
        AdapterError: one of the two did not begin with `loftq_init`, or both are not of the same base.
    """
    if base_weights != "original":
        raise AdapterError(
            "--initial takes off what dequantized weights need; pass one of --initial and --base-weights "
            "dequantized"
        )
    for folder in (adapter, Path(initial).expanduser()):
        if provenance.stored_init(folder) != provenance.LOFTQ:
            raise AdapterError(
                f"{folder} did not begin with loftq_init (as its {provenance.FILE} would say), so there is "
                "nothing to take off; leave --initial out"
            )
    ours, theirs = provenance.read(adapter), provenance.read(Path(initial).expanduser())
    assert ours is not None
    assert theirs is not None
    differs = provenance.difference(theirs, ours)
    if differs:
        raise AdapterError(f"{initial} was made on {differs} ({adapter}); name the same adapter's beginning")
    return read_adapter(initial)


def subtract_(trained: Source, initial: Source) -> None:
    """Give the experts of ``trained`` the factors of ``BA - B0 A0``, in place.

    Raises:
        AdapterError: they are not of the same parameters and shapes; the initial one was trained on Linears.
    """
    where = initial.adapter.folder
    if trained.experts.keys() != initial.experts.keys() or trained.plain.keys() != initial.plain.keys():
        raise AdapterError(f"{where} has LoRA on other modules than {trained.adapter.folder}")
    for name, module in initial.plain.items():
        begins_at_zero = module.a if module.embedding else module.b
        if bool(begins_at_zero.read().any()):
            raise AdapterError(f"{where}: {name} was trained already; name the adapter as loftq_init left it")
    for name, experts in trained.experts.items():
        began = initial.experts[name]
        if experts.fused.keys() != began.fused.keys():
            raise AdapterError(f"{where} has LoRA on other parameters of {name}")
        for parameter, factors in list(experts.fused.items()):
            first = began.fused[parameter]
            if _sizes(first) != _sizes(factors):
                raise AdapterError(f"{where}: factors of {name}.{parameter} have other shapes")
            if began.scaling[parameter] != experts.scaling[parameter]:
                raise AdapterError(f"{where}: {name}.{parameter} has another scaling (alpha, rank)")
            experts.fused[parameter] = _difference(factors, first)


def _sizes(factors: Factors) -> tuple[int, int, int, int]:
    return factors.experts, factors.rank, factors.columns, factors.rows


def _difference(trained: Factors, initial: Factors) -> Factors:
    """``[B, -B0] [A; A0]``, an expert at a time, in the wider of both dtypes."""
    dtype = torch.promote_types(trained.dtype, initial.dtype)

    def a(expert: int) -> torch.Tensor:
        return torch.cat([trained.a(expert).to(dtype), initial.a(expert).to(dtype)])

    def b(expert: int) -> torch.Tensor:
        return torch.cat([trained.b(expert).to(dtype), -initial.b(expert).to(dtype)], dim=1)

    return replace(trained, rank=2 * trained.rank, dtype=dtype, a=a, b=b)


__all__ = ["ON_ORIGINAL", "read_initial", "subtract_"]
