"""Formats of published checkpoints that are read, never written: MXFP4 (gpt-oss) and block-FP8 (DeepSeek-V3).

MXFP4 (OCP Microscaling Formats 1.0, 2023): blocks of 32 values along a row, each value 4 bits (E2M1: sign,
two bits of exponent, one of mantissa), each block one 8-bit power of two (E8M0, bias 127). Two values a byte,
the low half-byte first. A matrix ``[N, K]`` is stored as ``blocks`` uint8 ``[N, K/32, 16]`` and ``scales``
uint8 ``[N, K/32]``.

Block-FP8: values in E4M3, one fp32 scale for each tile of (mostly) 128 x 128; tiles at the edges may be cut.

Both are decoded as fp32 value times fp32 scale, rounded once: the numbers of transformers, bit by bit.

Shape suffixes: N rows, K columns, G blocks of a row, R and C rows and columns of tiles.
"""

from __future__ import annotations

import functools

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_BLOCK = 32
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_TEMPORARY = (
    2**19
)  # weights that are fp32 at a time: 2 MiB a thread, where DeepSeek-V3's expert would be 56 MiB


@functools.cache
def _e2m1_pairs(device: torch.device) -> torch.Tensor:
    """Both values of each byte, low half-byte first, as one float64 whose 8 bytes are two fp32, ``[256]``."""
    codes = torch.tensor(E2M1, dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([codes[byte & 15], codes[byte >> 4]], dim=-1).view(torch.float64).view(256)


def e8m0(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two, uint8 -> fp32: ``2 ** (byte - 127)``; byte 255, which means NaN, becomes infinity.

    Built from bits: exponential functions of GPUs are not exact to the last one.
    """
    exponents = scales.to(torch.int32)
    return torch.where(exponents == 0, 1 << 22, exponents << 23).view(torch.float32)  # 2**-127 is subnormal


def decode_mxfp4(blocks_NGb: torch.Tensor, scales_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode MXFP4.

    Args:
        blocks_NGb: uint8 ``[..., N, G, 16]``.
        scales_NG: uint8 ``[..., N, G]``.
        dtype: of the result.

    Returns:
        ``[..., N, 32 * G]``.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if blocks_NGb.shape != (*scales_NG.shape, MX_BLOCK // 2):
        raise ValueError(f"MXFP4 blocks {tuple(blocks_NGb.shape)} and scales {tuple(scales_NG.shape)}")
    *leading, G, _ = blocks_NGb.shape
    blocks, scales = blocks_NGb.reshape(-1, MX_BLOCK // 2), scales_NG.reshape(-1)
    out = torch.empty(len(blocks), MX_BLOCK, dtype=dtype, device=blocks.device)
    pairs, step = _e2m1_pairs(blocks.device), _TEMPORARY // MX_BLOCK
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        values = torch.index_select(pairs, 0, blocks[part].reshape(-1).int()).view(torch.float32)
        out[part] = values.view(-1, MX_BLOCK).mul_(e8m0(scales[part]).unsqueeze(1))
    return out.view(*leading, G * MX_BLOCK)


def decode_fp8(
    codes_NK: torch.Tensor, scales_RC: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Decode FP8 with one scale per tile.

    Args:
        codes_NK: float8 ``[N, K]``.
        scales_RC: fp32 ``[ceil(N / block[0]), ceil(K / block[1])]``.
        block: rows and columns of a tile.
        dtype: of the result.

    Returns:
        ``[N, K]``.

    Raises:
        ValueError: the shapes do not belong together.
    """
    (N, K), (rows, columns) = codes_NK.shape, block
    if scales_RC.shape != (-(-N // rows), -(-K // columns)):
        raise ValueError(f"FP8 weight {(N, K)} and scales {tuple(scales_RC.shape)} in tiles of {block}")
    out = torch.empty(N, K, dtype=dtype, device=codes_NK.device)
    scales_RK = scales_RC.float().repeat_interleave(columns, dim=1)[:, :K]
    step = max(1, _TEMPORARY // (rows * K))  # rows of tiles at a time
    for first in range(0, len(scales_RC), step):
        last = min(first + step, len(scales_RC))
        if last * rows > N and last - first > 1:
            last -= 1  # the cut row of tiles comes alone
        for begin, end in ((first, last), (last, min(first + step, len(scales_RC)))):
            if begin < end:
                part = slice(begin * rows, min(end * rows, N))
                values = codes_NK[part].float().view(end - begin, -1, K)
                out[part] = values.mul_(scales_RK[begin:end].unsqueeze(1)).view(-1, K)
    return out
