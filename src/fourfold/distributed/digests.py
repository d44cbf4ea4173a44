"""A number for the bytes of a tensor, computed where it lies: the same bytes in another order give another.

Bytes are taken as 64-bit words. Each word is joined with its place and put through a mixing function in which
every bit of the input moves about half of the bits of the output (the finalizer of SplitMix64: Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", 2014), and the results are added up modulo 2^64.
Two tensors that differ by accident agree once in 2^64. (It is no protection against someone who looks for
such tensors; ranks of one job are not each other's enemies.)
"""

from __future__ import annotations

import torch

_PIECE = 2**20  # words at a time: what it takes of memory is five times as many bytes as 8 MiB
_WEYL = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number: no two places share a constant
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """``int64 []`` on the tensor's device, of its bytes, their number, its dtype and shape."""
    data = torch.Tensor(tensor.detach()).contiguous().view(-1).view(torch.uint8)
    total = torch.tensor(_described(tensor), dtype=torch.int64, device=data.device)
    for begin in range(0, data.numel(), 8 * _PIECE):
        piece = data[begin : begin + 8 * _PIECE]
        if piece.numel() % 8 or piece.storage_offset() % 8:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 8))
        words = piece.view(torch.int64)
        places = torch.arange(begin // 8, begin // 8 + len(words), device=data.device)
        total += _mixed(words ^ (places * _WEYL)).sum()
    return total


def _described(tensor: torch.Tensor) -> int:
    text = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return int.from_bytes(text, "little") % (2**61 - 1)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _right(words, 30)) * _FIRST
    words = (words ^ _right(words, 27)) * _SECOND
    return words ^ _right(words, 31)


def _right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted as unsigned numbers are."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
