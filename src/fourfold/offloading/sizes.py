"""Numbers of bytes as people write them. Imports no torch: configurations are read without it."""

from __future__ import annotations

from typing import Any

from fourfold.errors import ConfigurationError
from fourfold.sizes import bytes_of


def parse_bytes(value: Any) -> int:
    """A number of bytes: ``8 * 2**30``, ``"8GiB"``, ``"8 GB"``.

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = bytes_of(value) if isinstance(value, str) else None
    if found is None:
        raise ConfigurationError(
            f"budget={value!r} is no number of bytes; write one such as 8589934592, '8GiB' or '8 GB', "
            "'auto', or None"
        )
    return found
