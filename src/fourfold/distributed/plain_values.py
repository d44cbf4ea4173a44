"""Numbers, texts and what is put together of them as JSON and back: no type is lost, nothing is executed.

What a checkpoint holds beside tensors (settings of an optimizer, a scheduler's state, a step) is written so,
and not pickled: opening a pickle runs what is in it.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from fourfold.errors import CheckpointError

_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_MAPPING_TYPES: dict[str, Any] = {name: kind for kind, name in _MAPPINGS.items()}


class Whole:
    """A value without tensors, which is stored as one, and comes back whatever stands in its place."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def wholes(value: Any) -> Any:
    """The same with everything that holds no tensors as `Whole`; around tensors dicts and lists remain."""
    if not _holds_tensors(value):
        return Whole(value)
    if isinstance(value, Mapping):
        return {key: wholes(item) for key, item in value.items()}
    return value if isinstance(value, torch.Tensor) else [wholes(item) for item in value]


def encoded(value: Any, where: str) -> Any:
    """A value in JSON's own types; what JSON has not is an object of one key that names its kind.

    Args:
        value: None, a bool, number, text, bytes, dtype or device of torch; lists, tuples, sets and mappings
            of such.
        where: its name in the checkpoint.

    Raises:
        CheckpointError: it is, or holds, anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float, str)) and not isinstance(value, Enum):
        return next(kind(value) for kind in (int, float, str) if isinstance(value, kind))
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) is list:
        return [encoded(item, where) for item in value]
    if type(value) in (tuple, set, frozenset):
        return {type(value).__name__: [encoded(item, where) for item in value]}
    if type(value) in _MAPPINGS:
        items = [[encoded(key, where), encoded(item, where)] for key, item in value.items()]
        return {_MAPPINGS[type(value)]: items}
    raise CheckpointError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot "
        "hold: it keeps tensors, numbers, texts, and lists, tuples, sets and dicts of them. Save it as such, "
        "or in a file of your own"
    )


def decoded(value: Any) -> Any:
    """What `encoded` was given.

    Raises:
        ValueError: no such value.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{value!r:.80} is no stored value")
    ((kind, content),) = value.items()
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "dtype" and isinstance(getattr(torch, str(content), None), torch.dtype):
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decoded(item) for item in content)
    if kind in _MAPPING_TYPES:
        return _MAPPING_TYPES[kind]({decoded(key): decoded(item) for key, item in content})
    raise ValueError(f"{kind!r:.80} is no kind of stored value")
