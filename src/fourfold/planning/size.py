"""Sizes as people write them. Imports nothing heavy: a mistake is answered at once."""

from __future__ import annotations

from fourfold.errors import ConfigurationError
from fourfold.sizes import bytes_of


def parse_size(text: str) -> int:
    """``24GiB``, ``80 GB``, ``24G`` (binary), ``25769803776``: bytes.

    Raises:
        ConfigurationError: it is no size.
    """
    size = bytes_of(text)
    if not size:
        raise ConfigurationError(f"--gpu: {text!r} is no size of memory. Write 24GiB, say.")
    return size
