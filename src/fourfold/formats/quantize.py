"""Packing one matrix into its slot of a stack, with bitsandbytes' quantizers.

bitsandbytes quantizes one tensor at a time and counts its elements in signed 32 bit: a fused stack of experts
can exceed that (DeepSeek-V3: 7.5e9 in one projection), a single expert cannot. It also fixes the statistics
of double quantization over the whole tensor, where per-expert checkpoints have them per matrix. So experts
are packed one by one, gate and up apart, and the bytes are those bitsandbytes would make of each matrix on
the same device.
"""

from __future__ import annotations

import torch

from fourfold.errors import CheckpointError
from fourfold.formats.codebooks import absmax_codes
from fourfold.formats.packed import ABSMAX_GROUP, PackedStack

FP16_MAX = 65504.0


def _as_bits(value: torch.Tensor) -> torch.Tensor:
    return value.float().contiguous().view(torch.int32)


def _pack_4bit_(stack: PackedStack, expert: int, part: int, rows: slice, w_NK: torch.Tensor) -> None:
    fmt, shape = stack.fmt, stack.shape
    B = shape.blocks(fmt)
    padding = B * fmt.blocksize - shape.columns
    if padding:
        w_NK = torch.nn.functional.pad(w_NK, (0, padding))
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        w_NK.contiguous(), fmt.blocksize, fmt.quant_type, torch.uint8
    )
    n_rows = rows.stop - rows.start
    stack.data[expert, rows].copy_(packed.view(n_rows, -1))
    if not fmt.double_quant:
        stack.absmax[expert, rows].copy_(_as_bits(absmax).view(n_rows, B))
        return
    assert stack.absmax_scale is not None
    assert stack.absmax_offset is not None
    offset = absmax.mean()
    codes, group_max = torch.ops.bitsandbytes.quantize_blockwise.default(
        absmax - offset, absmax_codes(absmax.device), ABSMAX_GROUP
    )
    stack.absmax[expert, rows].copy_(codes.view(n_rows, B))
    stack.absmax_scale[expert, part].copy_(_as_bits(group_max))
    stack.absmax_offset[expert, part].copy_(_as_bits(offset))


def _pack_int8_(stack: PackedStack, expert: int, rows: slice, w_NK: torch.Tensor) -> None:
    # bitsandbytes' 8-bit path goes through fp16 on every device; the range was checked by the caller.
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(
        w_NK.to(torch.float16).contiguous()
    )
    stack.data[expert, rows].copy_(codes.unsqueeze(-1))
    stack.absmax[expert, rows].copy_(_as_bits(absmax).unsqueeze(-1))


class Packer:
    """Fills a `PackedStack` matrix by matrix and checks, once at the end, that every weight was finite.

    The check is collected on the device and read once by `finish`: reading it per expert would synchronise
    with the GPU 128 times a projection.

    Args:
        stack: storage to fill.
        name: of the parameter, for messages.
    """

    def __init__(self, stack: PackedStack, name: str) -> None:
        import bitsandbytes  # noqa: F401  (registers the operators)

        self.stack = stack
        self.name = name
        limit = FP16_MAX if stack.fmt.quant_type == "int8" else torch.finfo(torch.float32).max
        self._limit = limit
        self._bad_E = torch.zeros(stack.shape.experts, dtype=torch.bool, device=stack.data.device)

    def pack_(self, expert: int, part: int, w_NK: torch.Tensor) -> None:
        """Pack matrix ``w_NK`` ``[N/P, K]`` (fp32, bf16 or fp16) as part ``part`` of expert ``expert``.

        Raises:
            CheckpointError: the matrix has another shape than its slot.
        """
        shape = self.stack.shape
        n_rows = shape.rows // shape.parts
        if tuple(w_NK.shape) != (n_rows, shape.columns):
            raise CheckpointError(
                f"{self.name}: expert {expert} has shape {tuple(w_NK.shape)} in the checkpoint, "
                f"but the model's configuration asks for {(n_rows, shape.columns)}"
            )
        rows = slice(part * n_rows, (part + 1) * n_rows)
        w_NK = w_NK.to(self.stack.data.device)
        low, high = torch.aminmax(w_NK)  # both are NaN where a weight is
        self._bad_E[expert] |= ~((low.float() >= -self._limit) & (high.float() <= self._limit))
        if self.stack.fmt.is_4bit:
            _pack_4bit_(self.stack, expert, part, rows, w_NK)
        else:
            _pack_int8_(self.stack, expert, rows, w_NK)

    def finish(self) -> PackedStack:
        """The filled stack.

        Raises:
            CheckpointError: a weight was NaN, infinite, or (INT8) beyond the range of fp16.
        """
        bad = self._bad_E.nonzero().flatten().tolist()
        if bad:
            beyond = (
                " or beyond the range of fp16 that INT8 quantization goes through"
                if self._limit == FP16_MAX
                else ""
            )
            shown = ", ".join(map(str, bad[:8])) + ("..." if len(bad) > 8 else "")
            remedy = "use experts_quant_type='nf4'" if beyond else "get another copy of the files"
            raise CheckpointError(
                f"{self.name}: weights of expert(s) {shown} are NaN or infinite{beyond}; "
                f"the checkpoint is damaged, or {remedy}"
            )
        return self.stack


def pack_stack(stack: PackedStack, w_ENK: torch.Tensor, name: str) -> PackedStack:
    """Pack a whole stack ``[E, N, K]``, one matrix at a time; raises as `Packer` does."""
    packer = Packer(stack, name)
    parts = stack.shape.parts
    for expert in range(stack.shape.experts):
        for part, w_NK in enumerate(w_ENK[expert].chunk(parts, dim=0)):
            packer.pack_(expert, part, w_NK)
    return packer.finish()
