"""Numbers of bytes as people write them. Imports no torch: a mistake is answered at once."""

from __future__ import annotations

import re

_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmg])(i?)(b?)|b?)\s*", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3}


def bytes_of(text: str) -> int | None:
    """``8GiB``, ``8 GB`` (decimal), ``8G`` (binary, as of cards), ``8589934592``; None for others."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        return None
    number, letter, binary, b = found.groups()
    base = 1000 if b and not binary else 1024
    return int(float(number) * (base ** _POWERS[letter.lower()] if letter else 1))
