"""Configurations with one or more things wrong in them, made by a seeded generator."""

from __future__ import annotations

import copy
import datetime
import random
from typing import Any

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    8.0,
    0.5,
    -2.5,
    1e308,
    10**30,
    -(10**400),
    "",
    "x",
    "8",
    "true",
    "1e-3",
    "1e999",
    "no",
    "/dev/null",
    "\x00",
    "(",
    "é" * 300,
    [],
    ["a"],
    [1],
    [None],
    [["a"]],
    {},
    {"a": 1},
    {"a": {"b": ["c"]}},
]
# What YAML has and JSON has not.
OF_YAML: list[Any] = [{1: 2}, b"\x00\xff", datetime.date(2020, 1, 2), float("nan"), float("inf"), {"s", "t"}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each entry, deeper ones after those that hold them."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += places(item, (*path, key))
    return found


def put(values: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at a path."""
    values = copy.deepcopy(values)
    holder: Any = values
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = copy.deepcopy(value)
    return values


def mutate(values: dict[str, Any], keys: list[str], chance: random.Random) -> dict[str, Any]:
    """A copy with one to three changes: another value, a key less, a known or unknown key more."""
    values = copy.deepcopy(values)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(places(values))
        kind = chance.randrange(5)
        if kind == 0:
            holder: Any = values
            for key in path[:-1]:
                holder = holder[key]
            del holder[path[-1]]
        elif kind == 1:
            values[chance.choice(keys)] = copy.deepcopy(chance.choice(VALUES + OF_YAML))
        elif kind == 2:
            word = chance.choice(keys)
            at = chance.randrange(len(word))
            values[word[:at] + chance.choice("xé. 1") + word[at + 1 :]] = 1
        else:
            values = put(values, path, chance.choice(VALUES + OF_YAML))
        if not values:
            break
    return values
