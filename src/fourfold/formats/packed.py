"""A stack of packed matrices, and how to read one.

Shape suffixes: E experts (matrices of the stack), N rows (out), K columns (in), Kp columns rounded up to
whole blocks, B blocks in a row, P parts of a matrix that are quantized separately, G groups of 256 absmax
values in a part.

Storage, per stack of E matrices ``[N, K]``:

===========  ============================  ==========================================================
format       data                          absmax and companions
===========  ============================  ==========================================================
4 bit        uint8 ``[E, N, Kp/2]``        ``absmax`` int32 ``[E, N, B]``: the bits of fp32
4 bit, DQ    uint8 ``[E, N, Kp/2]``        ``absmax`` uint8 ``[E, N, B]``; ``absmax_scale`` int32
                                           ``[E, P, G]``; ``absmax_offset`` int32 ``[E, P]``
INT8         int8 ``[E, N, K, 1]``         ``absmax`` int32 ``[E, N, 1]``: the bits of fp32
===========  ============================  ==========================================================

Blocks run along K and never straddle rows: a row whose length is no multiple of the block size is padded with
zeros to one. Hence a slice of experts is a slice of every tensor, and the bytes of expert e are those that
bitsandbytes makes of its (padded) matrix alone.

Scales are fp32 numbers held as int32: a cast of the module to bf16, FSDP2's mixed precision or a stray
``requires_grad_()`` would otherwise round or train them. The trailing axis of INT8 makes loaders that do not
know the format fail on the shape instead of reading the integers as weights.

A decoded weight is ``fp32 code * fp32 absmax``, rounded once to the asked-for dtype, on every backend.
Double-quantized absmax is ``code map[absmax] * absmax_scale + absmax_offset``, each operation rounded to fp32
(no fused multiply-add). INT8 is ``(q * absmax) * (1/127)``, bitsandbytes' order of operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fourfold.errors import ConfigurationError
from fourfold.formats.codebooks import absmax_codes, byte_pairs

QUANT_TYPES = ("nf4", "fp4", "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPANION_SUFFIXES = ("_absmax", "_absmax_scale", "_absmax_offset")
ABSMAX_GROUP = 256
INT8_STEP = 7.874015718698502e-3  # 1/127 as bitsandbytes writes it


@dataclass(frozen=True)
class PackFormat:
    """How the matrices of a stack are packed.

    Args:
        quant_type: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        blocksize: values that share one absmax (4 bit only; INT8 has one per row).
        double_quant: absmax itself in 8 bit, in groups of 256 (4 bit only).

    Raises:
        ConfigurationError: an unknown type or block size.
    """

    quant_type: str
    blocksize: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ConfigurationError(
                f"unknown quantization type {self.quant_type!r} for experts; valid are "
                f"{', '.join(QUANT_TYPES)}"
            )
        if not isinstance(self.blocksize, int) or self.blocksize not in BLOCKSIZES:
            raise ConfigurationError(
                f"experts_blocksize={self.blocksize!r} is not one of bitsandbytes' block sizes: "
                f"{', '.join(map(str, BLOCKSIZES))}"
            )
        if self.double_quant and self.quant_type == "int8":
            raise ConfigurationError(
                "double quantization belongs to 4-bit formats; INT8 has one absmax per row"
            )

    @property
    def is_4bit(self) -> bool:
        return self.quant_type != "int8"

    def __str__(self) -> str:
        if not self.is_4bit:
            return "INT8"
        return f"{self.quant_type.upper()} /{self.blocksize}" + (
            " double-quantized" if self.double_quant else ""
        )

    def to_dict(self) -> dict[str, Any]:
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.double_quant}


@dataclass(frozen=True)
class StackShape:
    """Logical shape of a stack: E matrices of N rows (out) and K columns (in), each of P parts along its
    rows.
    """

    experts: int
    rows: int
    columns: int
    parts: int = 1

    def blocks(self, fmt: PackFormat) -> int:
        """Absmax values in a row."""
        return -(-self.columns // fmt.blocksize) if fmt.is_4bit else 1

    def tensors(self, fmt: PackFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix (``""`` for the data) -> shape and dtype of every stored tensor."""
        E, N, K, P = self.experts, self.rows, self.columns, self.parts
        B = self.blocks(fmt)
        if not fmt.is_4bit:
            return {"": ((E, N, K, 1), torch.int8), "_absmax": ((E, N, 1), torch.int32)}
        data = ((E, N, B * fmt.blocksize // 2), torch.uint8)
        if not fmt.double_quant:
            return {"": data, "_absmax": ((E, N, B), torch.int32)}
        G = -(-(N // P) * B // ABSMAX_GROUP)
        return {
            "": data,
            "_absmax": ((E, N, B), torch.uint8),
            "_absmax_scale": ((E, P, G), torch.int32),
            "_absmax_offset": ((E, P), torch.int32),
        }

    def nbytes(self, fmt: PackFormat) -> int:
        """Bytes of all stored tensors."""
        return sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors(fmt).values()
        )  # fmt: skip


@dataclass(frozen=True)
class PackedStack:
    """E packed matrices ``[N, K]``; the tensors of the table above, and what is needed to read them."""

    fmt: PackFormat
    shape: StackShape
    data: torch.Tensor
    absmax: torch.Tensor
    absmax_scale: torch.Tensor | None = None
    absmax_offset: torch.Tensor | None = None

    @classmethod
    def empty(cls, fmt: PackFormat, shape: StackShape, device: torch.device | str) -> PackedStack:
        """Uninitialised storage on ``device`` (``"meta"`` for shapes only)."""
        made = {s: torch.empty(size, dtype=dt, device=device) for s, (size, dt) in shape.tensors(fmt).items()}
        return cls.from_tensors(fmt, shape, made)

    @classmethod
    def from_tensors(
        cls, fmt: PackFormat, shape: StackShape, by_suffix: Mapping[str, torch.Tensor]
    ) -> PackedStack:
        return cls(
            fmt,
            shape,
            by_suffix[""],
            by_suffix["_absmax"],
            by_suffix.get("_absmax_scale"),
            by_suffix.get("_absmax_offset"),
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Suffix and tensor of everything stored, the data first."""
        yield "", self.data
        for suffix in COMPANION_SUFFIXES:
            tensor = getattr(self, suffix.removeprefix("_"))
            if tensor is not None:
                yield suffix, tensor

    def to(self, device: torch.device) -> PackedStack:
        """The stack on ``device``; its own tensors where they lie there."""
        moved = {suffix: tensor.to(device) for suffix, tensor in self.tensors()}
        return PackedStack.from_tensors(self.fmt, self.shape, moved)

    def experts(self, start: int, stop: int) -> PackedStack:
        """Matrices ``start`` to ``stop`` as a view."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return PackedStack(
            self.fmt,
            replace(self.shape, experts=stop - start),
            self.data[start:stop],
            self.absmax[start:stop],
            cut(self.absmax_scale),
            cut(self.absmax_offset),
        )


def decode_absmax(stack: PackedStack) -> torch.Tensor:
    """The scale of every block, fp32 ``[E, N, B]`` (a view where it is stored as such)."""
    if not stack.fmt.double_quant:
        return stack.absmax.view(torch.float32)
    assert stack.absmax_scale is not None
    assert stack.absmax_offset is not None
    E, N, B = stack.absmax.shape
    scale_EPG = stack.absmax_scale.view(torch.float32)
    offset_EP = stack.absmax_offset.view(torch.float32)
    P, G = scale_EPG.shape[1:]
    n = N // P * B
    codes_EPn = absmax_codes(stack.absmax.device)[stack.absmax.reshape(E, P, n).int()]
    if n == G * ABSMAX_GROUP:
        codes_EPn.view(E, P, G, ABSMAX_GROUP).mul_(scale_EPG.unsqueeze(-1))
    else:
        codes_EPn.mul_(scale_EPG.repeat_interleave(ABSMAX_GROUP, dim=-1)[..., :n])
    return codes_EPn.add_(offset_EP.unsqueeze(-1)).view(E, N, B)


def decode_stack(stack: PackedStack, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """Decode in plain torch: the reference of every kernel, and the way on CPUs.

    Args:
        stack: E packed matrices.
        dtype: of the result.
        out: optional destination ``[E, N, K]``.

    Returns:
        ``[E, N, K]`` in ``dtype``; where rows are padded, a view that leaves the padding out.
    """
    E, N, K = stack.shape.experts, stack.shape.rows, stack.shape.columns
    absmax_ENB = decode_absmax(stack)
    if stack.fmt.is_4bit:
        B = absmax_ENB.shape[-1]
        pairs = byte_pairs(stack.fmt.quant_type, stack.data.device)
        values = torch.index_select(pairs, 0, stack.data.reshape(-1).int()).view(torch.float32)
        values_ENBb = values.view(E, N, B, stack.fmt.blocksize).mul_(absmax_ENB.unsqueeze(-1))
        w_ENK = values_ENBb.view(E, N, -1)[..., :K]
    else:
        w_ENK = (stack.data.view(E, N, K) * absmax_ENB).mul_(INT8_STEP)
    if out is not None:
        return out.copy_(w_ENK)
    return w_ENK.to(dtype)
