"""The values behind the codes.

NF4: the 16 quantiles of a standard normal distribution, normalised to [-1, 1] (Dettmers et al., "QLoRA",
2023, appendix E). FP4: sign, two exponent bits, one mantissa bit, in bitsandbytes' order of codes. The 8-bit
map encodes the absmax of double-quantized blocks: dynamic tree quantization (Dettmers, "8-Bit Approximations
for Parallelism in Deep Learning", 2016). All three equal bitsandbytes' tables bit by bit (a test says so): a
checkpoint must mean the same number wherever it is read.
"""

from __future__ import annotations

import functools

import torch

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)
# Magnitudes of codes 0-7; code 8 + c is the negative of code c.
FP4_MAGNITUDES = (0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5,
                  0.16666666666666666, 0.25)
# fmt: on


@functools.cache
def four_bit_codes(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit format, fp32 ``[16]``.

    Args:
        quant_type: ``"nf4"`` or ``"fp4"``.
        device: where the table lives; it is made once per device.
    """
    values = NF4 if quant_type == "nf4" else FP4_MAGNITUDES + tuple(-m for m in FP4_MAGNITUDES)
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def byte_pairs(quant_type: str, device: torch.device) -> torch.Tensor:
    """Both values of each possible byte, as one float64 whose 8 bytes are two fp32 numbers, ``[256]``.

    Looking up bytes instead of half-bytes makes decoding on a CPU five times faster than indexing a ``[256,
    2]`` table (3.7 ms against 18.5 ms for 7 million values): one 8-byte gather a byte, and no unpacking of
    half-bytes. The high half-byte comes first, as bitsandbytes has it.
    """
    codes = four_bit_codes(quant_type, device)
    byte = torch.arange(256, device=device)
    return (
        torch.stack([codes[byte >> 4], codes[byte & 15]], dim=-1).contiguous().view(torch.float64).view(256)
    )


@functools.cache
def absmax_codes(device: torch.device) -> torch.Tensor:
    """The signed dynamic 8-bit map, fp32 ``[256]``, ascending: zero, one, and seven decades of midpoints."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        decade = 10.0 ** (exponent - 6)
        values += (decade * midpoints).tolist()
        values += (-decade * midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
