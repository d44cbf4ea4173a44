"""Sizes as people write them. Imports nothing heavy: a mistake is answered at once."""

from __future__ import annotations

from fourfold.errors import ConfigurationError
from fourfold.sizes import bytes_of

SMALLEST = 2**20


def parse_size(text: str) -> int:
    """``24GiB``, ``80 GB``, ``24G`` (binary), ``25769803776``: bytes.

    Raises:
        ConfigurationError: it is no size.
    """
    size = bytes_of(text)
    if not size or size < SMALLEST:  # (a plain number is bytes: nobody means 24 of them)
        raise ConfigurationError(f"--gpu: {text!r} is no size of a card's memory. Write 24GiB, say.")
    return size
