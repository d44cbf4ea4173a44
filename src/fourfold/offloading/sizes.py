"""Numbers of bytes as people write them. Imports no torch: configurations are read without it."""

from __future__ import annotations

import re
from typing import Any

from fourfold.errors import ConfigurationError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: Any) -> int:
    """A number of bytes: ``8 * 2**30``, ``"8GiB"``, ``"8 GB"``.

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _WRITTEN.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[2].lower() not in _UNITS:
        raise ConfigurationError(
            f"budget={value!r} is no number of bytes; write one such as 8589934592, '8GiB' or '8 GB', "
            "'auto', or None"
        )
    return int(float(found[1]) * _UNITS[found[2].lower()])
