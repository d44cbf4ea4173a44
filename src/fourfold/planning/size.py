"""Sizes as people write them. Imports nothing heavy: a mistake is answered at once."""

from __future__ import annotations

import re

from fourfold.errors import ConfigurationError

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(text: str) -> int:
    """``24GiB``, ``80 GB``, ``24G`` (binary), ``25769803776``: bytes.

    Raises:
        ConfigurationError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", text.lower())
    unit = "" if match is None else match[2]
    unit += {1: "ib", 2: "b"}[len(unit)] if unit in ("k", "m", "g", "ki", "mi", "gi") else ""
    if match is None or unit not in UNITS or float(match[1]) == 0:
        raise ConfigurationError(f"--gpu: {text!r} is no size of memory. Write 24GiB, say.")
    return int(float(match[1]) * UNITS[unit])
