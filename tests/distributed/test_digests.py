"""Digests by which ranks compare what they loaded."""

from __future__ import annotations

import pytest
import torch

from fourfold.distributed import digests
from fourfold.distributed.digests import digest


def of(tensor: torch.Tensor) -> int:
    return int(digest(tensor))


def bytes_of(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 63, 1000])
def test_equal_bytes_equal_digests_wherever_they_lie(count: int) -> None:
    data = bytes_of(count)
    assert of(data) == of(data.clone())
    shifted = torch.cat([data[:0], torch.zeros(3, dtype=torch.uint8), data])[3:]  # (not aligned)
    assert of(shifted) == of(data)


def test_any_difference_is_seen() -> None:
    data = bytes_of(4096).view(64, 64)
    seen = {of(data)}
    rows = data.clone()
    rows[[3, 9]] = data[[9, 3]]
    bit = data.clone()
    bit[63, 63] ^= 1
    rolled = data.view(-1).roll(8).view(64, 64)
    both = data.clone()
    both[0, 0] += 1
    both[1, 0] -= 1  # (the sum of the bytes stays)
    for other in (rows, bit, rolled, both, data.view(32, 128), data.view(torch.int8), data.view(-1)[:-1]):
        seen.add(of(other.contiguous()))
    assert len(seen) == 8
    zeros = {of(torch.zeros(n)) for n in range(16)}
    assert len(zeros) == 16


def test_in_pieces_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes_of(1003)
    whole = of(data)
    monkeypatch.setattr(digests, "_PIECE", 8)
    assert of(data) == whole


def test_mixing_is_splitmix64() -> None:
    """The first outputs of the published generator from seed 0, whose state goes up by the Weyl constant."""
    states = torch.arange(1, 4) * digests._WEYL
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in digests._mixed(states).tolist()] == published


def test_digests_spread() -> None:
    """Tensors of one bit each: every bit of a digest is one in about half of them."""
    tensors = [torch.zeros(64, dtype=torch.uint8) for _ in range(512)]
    for number, tensor in enumerate(tensors):
        tensor[number // 8] = 1 << number % 8
    values = torch.stack([digest(tensor) for tensor in tensors])
    assert len(set(values.tolist())) == 512
    for bit in range(64):
        ones = (values >> bit & 1).float().mean(0)
        assert 0.38 < ones < 0.62, (bit, ones)
