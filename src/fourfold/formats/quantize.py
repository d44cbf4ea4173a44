"""Packing matrices into their slots of a stack, with bitsandbytes' quantizers.

bitsandbytes quantizes one tensor at a time and counts its elements in signed 32 bit: a fused stack of experts
can exceed that (DeepSeek-V3: 7.5e9 in one projection), a single expert cannot. It also fixes the statistics
of double quantization over the whole tensor, where per-expert checkpoints have them per matrix. Hence the
bytes here are those that bitsandbytes would make of each matrix (gate and up apart) on the same device.

They are not made one matrix at a time, though: on a GPU the time goes into launching (14 small operations a
matrix, 18,000 matrices in Qwen3-30B-A3B), not into the work. Blocks never straddle rows, so several matrices
one below the other are quantized by one launch into the same bytes. What depends on the matrix as a whole is
kept per matrix: the mean of double quantization, whose last bit depends on the order of summation, and its
groups of 256 where they would straddle matrices.
"""

from __future__ import annotations

import torch

from fourfold.errors import CheckpointError
from fourfold.formats.codebooks import absmax_codes
from fourfold.formats.packed import ABSMAX_GROUP, PackedStack

FP16_MAX = 65504.0
# Matrices that wait to be packed together, in bytes. On CPUs launching costs little, and bitsandbytes'
# quantizer there makes copies of 25 bytes a weight.
BATCH_BYTES = {"cuda": 16 * 2**20}
BATCH_BYTES_ELSEWHERE = 2 * 2**20
_ALIGNED = 16  # fp32 numbers, 64 bytes
# Scales that wait to be quantized together (double quantization), in bytes.
WAITING_ABSMAX_BYTES = 4 * 2**20


def batch_bytes(device: torch.device) -> int:
    """How many bytes of matrices are packed by one launch on ``device`` (always one matrix at the least)."""
    return BATCH_BYTES.get(device.type, BATCH_BYTES_ELSEWHERE)


def _slots(tensor: torch.Tensor, stack: PackedStack, first: int, count: int) -> torch.Tensor:
    """Storage of ``count`` matrices from the ``first`` on, one row each (matrices are numbered expert * P +
    part).
    """
    return tensor.view(stack.shape.experts * stack.shape.parts, -1)[first : first + count]


def _pack_4bit_(stack: PackedStack, first: int, w_MnK: torch.Tensor) -> torch.Tensor:
    """Fills the data; returns the scales, fp32 ``[M, L]``."""
    fmt, shape, M = stack.fmt, stack.shape, len(w_MnK)
    padding = shape.blocks(fmt) * fmt.blocksize - shape.columns
    if padding:
        w_MnK = torch.nn.functional.pad(w_MnK, (0, padding))
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        w_MnK.contiguous(), fmt.blocksize, fmt.quant_type, torch.uint8
    )
    _slots(stack.data, stack, first, M).copy_(packed.view(M, -1))
    return absmax.view(M, -1)


def pack_absmax_(stack: PackedStack, first: int, absmax_ML: torch.Tensor) -> None:
    """Double quantization: absmax less its mean, in 8 bit."""
    assert stack.absmax_scale is not None
    assert stack.absmax_offset is not None
    M, L = absmax_ML.shape
    offset_M1 = _slots(stack.absmax_offset.view(torch.float32), stack, first, M)
    for absmax_L, offset in zip(absmax_ML.unbind(), offset_M1.squeeze(1).unbind(), strict=True):
        # One by one: a mean over rows adds in another order on a GPU, and differs in the last bit. So does
        # one whose memory is not aligned as a tensor of its own is.
        torch.mean(absmax_L.clone() if L % _ALIGNED else absmax_L, dim=0, out=offset)
    centred_ML = absmax_ML - offset_M1
    # A group of 256 must not straddle matrices.
    chunks = (centred_ML,) if L % ABSMAX_GROUP == 0 else centred_ML.unbind()
    table = absmax_codes(absmax_ML.device)
    done = 0
    for chunk in chunks:
        codes, group_max = torch.ops.bitsandbytes.quantize_blockwise.default(chunk, table, ABSMAX_GROUP)
        count = chunk.numel() // L
        _slots(stack.absmax, stack, first + done, count).copy_(codes.view(count, L))
        scales = _slots(stack.absmax_scale.view(torch.float32), stack, first + done, count)
        scales.copy_(group_max.view(count, -1))
        done += count


def _pack_int8_(stack: PackedStack, first: int, w_MnK: torch.Tensor) -> None:
    # bitsandbytes' 8-bit path goes through fp16 on every device; the range was checked by the caller.
    M = len(w_MnK)
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(
        w_MnK.to(torch.float16).reshape(-1, w_MnK.shape[-1]).contiguous()
    )
    _slots(stack.data, stack, first, M).copy_(codes.view(M, -1))
    _slots(stack.absmax.view(torch.float32), stack, first, M).copy_(absmax.view(M, -1))


class Packer:
    """Fills a `PackedStack` and checks, once at the end, that every weight was finite.

    Matrices that follow each other wait until there are enough for one launch (`batch_bytes`). The check is
    collected on the device and read once by `finish`: reading it per expert would synchronise with the GPU
    128 times a projection.

    Args:
        stack: storage to fill, contiguous.
        name: of the parameter, for messages.
    """

    def __init__(self, stack: PackedStack, name: str) -> None:
        import bitsandbytes  # noqa: F401  (registers the operators)

        self.stack = stack
        self.name = name
        self._limit = FP16_MAX if stack.fmt.quant_type == "int8" else torch.finfo(torch.float32).max
        self._batch_bytes = batch_bytes(stack.data.device)
        self._waiting: list[torch.Tensor] = []
        self._first = 0  # number of the first matrix that waits
        self._next = 0  # the number after the last one that was packed
        self._ranges: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._absmax: list[torch.Tensor] = []  # fp32 [M, L] each, one after the other
        self._absmax_first = 0

    def _check_shape(self, expert: int, found: torch.Size) -> None:
        shape = self.stack.shape
        n_rows = shape.rows // shape.parts
        if tuple(found) != (n_rows, shape.columns):
            raise CheckpointError(
                f"{self.name}: expert {expert} has shape {tuple(found)} in the checkpoint, "
                f"but the model's configuration asks for {(n_rows, shape.columns)}"
            )

    def pack_(self, expert: int, part: int, w_NK: torch.Tensor) -> None:
        """Pack matrix ``w_NK`` ``[N/P, K]`` (fp32, bf16 or fp16) as part ``part`` of expert ``expert``.

        The matrix is kept until its batch is full, or until `finish`: do not write to it.

        Raises:
            CheckpointError: the matrix has another shape than its slot.
        """
        self._check_shape(expert, w_NK.shape)
        number = expert * self.stack.shape.parts + part
        waiting = self._waiting
        if waiting and (
            number != self._first + len(waiting)
            or w_NK.dtype != waiting[0].dtype
            or (len(waiting) + 1) * w_NK.nbytes > self._batch_bytes
        ):
            self._flush()
        if not self._waiting:
            self._first = number
        self._waiting.append(w_NK.to(self.stack.data.device))
        if w_NK.nbytes >= self._batch_bytes:
            self._flush()

    def pack_batch_(self, w_MnK: torch.Tensor) -> None:
        """Pack the next M matrices ``[M, N/P, K]``, on the stack's device; raises as `pack_`."""
        self._flush()
        self._check_shape(self._next // self.stack.shape.parts, w_MnK.shape[1:])
        self.pack_matrices_(self._next, w_MnK)

    @torch.no_grad()
    def pack_matrices_(self, first: int, w_MnK: torch.Tensor) -> None:
        """Pack M matrices ``[M, N/P, K]`` by one launch, as the slots from ``first`` (= expert * P + part)
        on.
        """
        low_M, high_M = torch.aminmax(w_MnK.reshape(len(w_MnK), -1), dim=1)  # NaN where a weight is
        self._ranges.append((first, low_M, high_M))
        self._next = first + len(w_MnK)
        if not self.stack.fmt.is_4bit:
            _pack_int8_(self.stack, first, w_MnK)
            return
        absmax_ML = _pack_4bit_(self.stack, first, w_MnK)
        if not self.stack.fmt.double_quant:
            scales = self.stack.absmax.view(torch.float32)
            _slots(scales, self.stack, first, len(absmax_ML)).copy_(absmax_ML)
            return
        waiting = self._absmax
        if waiting and first != self._absmax_first + sum(map(len, waiting)):
            self._flush_absmax()
        if not self._absmax:
            self._absmax_first = first
        self._absmax.append(absmax_ML)
        if sum(a.nbytes for a in self._absmax) >= WAITING_ABSMAX_BYTES:
            self._flush_absmax()

    def _flush_absmax(self) -> None:
        if self._absmax:
            waiting, self._absmax = self._absmax, []
            pack_absmax_(self.stack, self._absmax_first, torch.cat(waiting) if waiting[1:] else waiting[0])

    @torch.no_grad()
    def _flush(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1:
            w_MnK = waiting[0].unsqueeze(0)
        else:  # in the dtype that is quantized, so that there is one copy and not two
            dtype = waiting[0].dtype if self.stack.fmt.is_4bit else torch.float16
            w_MnK = waiting[0].new_empty(len(waiting), *waiting[0].shape, dtype=dtype)
            torch.cat(waiting, out=w_MnK.view(-1, w_MnK.shape[-1]))
        del waiting
        self.pack_matrices_(self._first, w_MnK)

    @torch.no_grad()
    def finish(self) -> PackedStack:
        """The filled stack.

        Raises:
            CheckpointError: a weight was NaN, infinite, or (INT8) beyond the range of fp16.
        """
        self._flush()
        self._flush_absmax()
        bad = self._bad_experts()
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

    def _bad_experts(self) -> list[int]:
        if not self._ranges:
            return []
        # As what is quantized: a batch was converted before it was looked at, a single matrix was not.
        dtype = torch.float32 if self.stack.fmt.is_4bit else torch.float16
        low = torch.cat([low_M.to(dtype).float() for _, low_M, _ in self._ranges])
        high = torch.cat([high_M.to(dtype).float() for _, _, high_M in self._ranges])
        bad = (~((low >= -self._limit) & (high <= self._limit))).tolist()
        numbers = [first + i for first, low_M, _ in self._ranges for i in range(len(low_M))]
        return sorted({n // self.stack.shape.parts for n, is_bad in zip(numbers, bad, strict=True) if is_bad})


def pack_stack(stack: PackedStack, w_ENK: torch.Tensor, name: str) -> PackedStack:
    """Pack a whole stack ``[E, N, K]``, a few experts at a time; raises as `Packer` does."""
    shape = stack.shape
    if tuple(w_ENK.shape) != (shape.experts, shape.rows, shape.columns):
        raise CheckpointError(
            f"{name}: the checkpoint holds {len(w_ENK)} experts of shape {tuple(w_ENK.shape[1:])}, but the "
            f"model's configuration asks for {shape.experts} of {(shape.rows, shape.columns)}"
        )
    packer = Packer(stack, name)
    n_rows = shape.rows // shape.parts
    step = max(1, batch_bytes(stack.data.device) // w_ENK[0].nbytes)
    for start in range(0, shape.experts, step):
        w_MnK = w_ENK[start : start + step].to(stack.data.device).reshape(-1, n_rows, shape.columns)
        packer.pack_matrices_(start * shape.parts, w_MnK)
    return packer.finish()
