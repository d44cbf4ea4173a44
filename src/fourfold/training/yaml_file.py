"""Reading YAML so that every complaint can name its line: values as ``yaml.safe_load`` gives them, plus
positions."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fourfold.errors import ConfigurationError

KeyPath = tuple[Hashable, ...]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: which key, where, what, and how to mend it.

    Attributes:
        key: with dots, as overrides name it.
        what: what is wrong; where ``not_yet``, what is missing.
        remedy: how to mend it.
        where: "line 3" or "command line: key=value".
        not_yet: the key means something, and Fourfold does not have it yet.
        path: the keys that lead to it, where ``key`` alone does not tell (one with a dot in it).
    """

    key: str
    what: str
    remedy: str
    where: str = ""
    not_yet: bool = False
    path: KeyPath = ()

    def __str__(self) -> str:
        place = f"{self.where}, " if self.where else ""
        missing = "not yet: " if self.not_yet else ""
        return f"{place}{short(self.key) or repr('')}: {missing}{self.what}. {self.remedy}"


@dataclass
class YamlFile:
    """A parsed file: its mapping, the line each key stands on, and the problems found while reading it."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def short(text: str) -> str:
    """At most 60 characters of ``text``."""
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy for an unknown ``word``: the nearest of ``known``, or all of them where none is near."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known here: {', '.join(names)}."


def dotted(path: Iterable[Hashable]) -> str:
    """``("datasets", 0, "path")`` as ``datasets.0.path``."""
    return ".".join(str(part) for part in path)


# Mappings whose keys are names of modules, with dots of their own.
OF_NAMES = ("lora_rank_pattern", "lora_alpha_pattern")


def split_key(key: str) -> KeyPath:
    """``datasets.0.path`` as ``("datasets", 0, "path")``; what follows a mapping of names is one key."""
    first, dot, rest = key.partition(".")
    if dot and first in OF_NAMES:
        return first, rest
    return tuple(int(part) if part.isdecimal() and part.isascii() else part for part in key.split("."))


def read_yaml(path: str | Path) -> YamlFile:
    """Read the mapping in ``path``, noting lines and duplicate keys.

    Raises:
        ConfigurationError: there is no such file, it is no YAML, or its top level is no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path}: no such configuration file. Give the path of a YAML file."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read as a UTF-8 text file ({error}).") from error
    result = YamlFile()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _note_lines(node, (), result, set(), set())
            result.values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigurationError(
            f"{path}{line}: not valid YAML: {error.problem}. Mend the syntax there."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}. Mend the syntax there.") from error
    except RecursionError:
        raise ConfigurationError(f"{path}: nested too deeply to be a configuration.") from None
    except ValueError as error:  # a number of thousands of digits, a date that is none
        raise ConfigurationError(f"{path}: a value that cannot be read ({error}). Mend it.") from error
    if not isinstance(result.values, dict):
        raise ConfigurationError(
            f"{path}: the top level is a {type(result.values).__name__}, not a mapping. Write `key: value` "
            "lines."
        )
    return result


def apply_overrides(parsed: YamlFile, overrides: Iterable[str]) -> dict[KeyPath, str]:
    """Set ``key=value`` pairs of a command line (dotted keys reach inside).

    Returns:
        The pair that set each path.

    Raises:
        ConfigurationError: a pair is malformed, or reaches into something that is not there.
    """
    touched: dict[KeyPath, str] = {}
    for override in overrides:
        key, sign, text = override.partition("=")
        key = key.strip()
        if not sign or not key:
            raise ConfigurationError(
                f"command line: `{override}` is no override. Write key=value, e.g. max_steps=20."
            )
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"command line: the value of `{override}` is not valid YAML ({error})."
            ) from None
        path = split_key(key)
        _set(parsed.values, path, value, override)
        touched[path] = short(override)
    return touched


def _set(values: Any, path: KeyPath, value: Any, override: str) -> None:
    """Entries on the way are copied: an anchor's are shared with other places of the file."""
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(values, dict) and isinstance(part, str):
            if last:
                values[part] = value
                return
            inner = values.get(part)
            values[part] = {} if inner is None else copy.copy(inner)
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            if last:
                values[part] = value
                return
            values[part] = copy.copy(values[part])
            values = values[part]
        else:
            raise ConfigurationError(
                f"command line: `{override}` reaches into `{dotted(path[:depth])}`, which has no `{part}`. "
                "Name an existing entry, or give the whole value."
            )


def _note_lines(node: yaml.Node, path: KeyPath, result: YamlFile, seen: set[int], within: set[int]) -> None:
    """Note the line of each key below ``node``, and keys given twice.

    A node that several aliases name is walked once: a few lines of aliases to aliases unfold to billions.

    Args:
        node: where to begin.
        path: the keys that lead to it.
        result: what is filled.
        seen: nodes that were walked.
        within: those that hold this one.

    Raises:
        yaml.MarkedYAMLError: a node holds itself.
    """
    if id(node) in within:
        problem = "an alias to what it stands in"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    result.lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:
        return
    seen.add(id(node))
    within = within | {id(node)}
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            here: KeyPath = (*path, key)
            if key in first:
                what = f"given twice, first on line {first[key]}"
                result.problems.append(Problem(dotted(here), what, "Keep one of the two.", f"line {line}"))
            first.setdefault(key, line)
            result.lines[here] = line
            _note_lines(value_node, here, result, seen, within)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, (*path, index), result, seen, within)
