"""Reading a configuration file: every problem with its line, and what is given differently.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from pydantic import BaseModel, ValidationError

from fourfold.errors import ConfigurationError
from fourfold.training.contradictions import ContradictionError
from fourfold.training.dataset_keys import DatasetConfig, PromptFormat, Turn
from fourfold.training.key_types import NotYetError
from fourfold.training.model_keys import SpecialTokens
from fourfold.training.other_keys import DATASET_NOT_YET, DIFFERENT, ELSEWHERE, NOT_YET, take_others
from fourfold.training.remarks import remarks
from fourfold.training.run_keys import Checkpointing
from fourfold.training.schema import TrainConfig
from fourfold.training.yaml_file import (
    KeyPath,
    Problem,
    YamlFile,
    apply_overrides,
    dotted,
    nearest,
    read_yaml,
    short,
    split_key,
)
from fourfold.training.zero import missing_file


@dataclass
class Examined:
    """What there is to say of a configuration file.

    Attributes:
        path: the file.
        config: what it says; None where ``problems`` has anything but what is not yet.
        problems: what is wrong, and what is not yet, by line.
        instead: keys that are given differently, and how.
        remarks: what its settings lead to that nobody may expect.
        at_start: keys that are accepted, and that a run refuses.
    """

    path: str
    config: TrainConfig | None = None
    problems: list[Problem] = field(default_factory=list)
    instead: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)
    at_start: list[Problem] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether all of it is accepted."""
        return self.config is not None and not self.problems

    def complaint(self) -> str:
        """All problems, a line each."""
        return self._list(self.problems)

    def refusal(self) -> str:
        """What a run refuses, a line each: all problems, and keys that are accepted only."""
        return self._list([*self.problems, *self.at_start])

    def _list(self, problems: list[Problem]) -> str:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return f"{self.path}: {count}\n" + "\n".join(f"  {problem}" for problem in problems)


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read and validate a YAML file; relative paths in it are relative to the current directory.

    Args:
        path: the file.
        overrides: ``key=value`` pairs that replace what the file says; dotted keys reach inside.

    Raises:
        ConfigurationError: lists every problem: line, key, what is wrong, how to mend it.
    """
    examined = examine(path, overrides)
    if examined.config is None or examined.problems or examined.at_start:
        raise ConfigurationError(examined.refusal())
    return examined.config


def examine(path: str | Path, overrides: list[str] | None = None) -> Examined:
    """Read and validate a YAML file; what is wrong in it is returned, not raised.

    Raises:
        ConfigurationError: there is no such file, it is no YAML, or an override reaches nowhere.
    """
    return _examine(read_yaml(path), str(path), overrides)


def examine_values(values: Mapping[str, Any], overrides: list[str] | None = None) -> Examined:
    """The same for values that are in no file.

    Raises:
        ConfigurationError: an override reaches nowhere.
    """
    return _examine(YamlFile(dict(values), {}, []), "settings", overrides)


def _examine(parsed: YamlFile, path: str, overrides: list[str] | None) -> Examined:
    overridden = apply_overrides(parsed, overrides or ())
    values, missing, instead = take_others(parsed.values)
    problems = parsed.problems + [_placed(problem, parsed, overridden) for problem in missing]
    config, errors = _validate(values)
    problems += [_placed(error, parsed, overridden) for _, error in errors]
    if errors:
        # Contradictions are looked for only once each value is sound. Look again without the unsound ones, so
        # that the whole list shows at once; what involves an unsound key is left out, its default proves
        # nothing.
        unsound = {loc[0] for loc, _ in errors if loc}
        sound = {key: value for key, value in values.items() if key not in unsound}
        sound = {"base_model": "-", "adapter": "lora", "datasets": [{"path": "-"}], **sound}
        problems += [
            _placed(problem, parsed, overridden)
            for keys, problem in _contradictions_among(sound)
            if not unsound.intersection(keys) and str(problem) not in {str(error) for _, error in errors}
        ]
    problems.sort(key=lambda problem: (not problem.where, len(problem.where), problem.where))  # by line
    result = Examined(path, config, problems)
    result.at_start = [_placed(problem, parsed, overridden) for problem in missing_file(parsed.values)]
    result.instead = [_placed(Problem(key, what, ""), parsed, overridden) for key, what in instead]
    if config is not None:
        result.remarks = [
            _placed(Problem(key, what, ""), parsed, overridden) for key, what in remarks(config)
        ]
    return result


def _validate(values: Mapping[str, Any]) -> tuple[TrainConfig | None, list[tuple[KeyPath, Problem]]]:
    try:
        return TrainConfig.model_validate(values), []
    except ValidationError as error:
        problems: list[tuple[KeyPath, Problem]] = []
        chosen: dict[KeyPath, Any] = {}
        for item in error.errors():
            original = item.get("ctx", {}).get("error")
            if isinstance(original, ContradictionError):
                problems += [((), problem) for _, problem in original.found]
                continue
            path = _key_path(item["loc"], values)
            # A union reports each of its members: the one of the value's own type says more.
            if path not in chosen or chosen[path]["type"].endswith("_type"):
                chosen[path] = item
        problems += [(path, _explain(path, item)) for path, item in chosen.items()]
        return None, problems


def _contradictions_among(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Problem]]:
    try:
        TrainConfig.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            original = item.get("ctx", {}).get("error")
            if isinstance(original, ContradictionError):
                return original.found
    return []


def _key_path(loc: tuple[int | str, ...], values: Any) -> KeyPath:
    """pydantic's location without the names of union members, which are no keys of the file."""
    path: list[int | str] = []
    for index, part in enumerate(loc):
        in_mapping = isinstance(values, Mapping) and (part in values or index == len(loc) - 1)
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not (in_mapping or in_list):
            continue
        path.append(part)
        values = values.get(part) if isinstance(values, Mapping) else values[part]
    return tuple(path)


def _explain(path: KeyPath, item: Mapping[str, Any]) -> Problem:
    """One pydantic error as a problem."""
    model = _model_at(path)
    name = short(str(path[-1])) if path else "configuration"
    key = dotted(path) or name
    original = item.get("ctx", {}).get("error")
    if isinstance(original, NotYetError):
        return Problem(key, original.what, original.remedy, not_yet=True, path=path)
    if item["type"] == "extra_forbidden":
        return Problem(key, "unknown key", _known_like(name, model), path=path)
    wanted = next(
        (
            model.model_fields[str(part)].description
            for part in reversed(path)
            if str(part) in model.model_fields
        ),
        "a mapping of keys to values",
    )
    if item["type"] == "missing":
        return Problem(key, "missing", f"Give {wanted}.", path=path)
    given = short(brief(item["input"]))  # (brief: a few lines of aliases unfold to billions of entries)
    if item["type"] == "literal_error":
        what = f"{given} is not one of {item['ctx']['expected']}"
        return Problem(key, what, f"Give {wanted}.", path=path)
    reason = str(original or item["msg"].removeprefix("Input "))
    return Problem(key, f"{given} {reason}", f"Give {wanted}.", path=path)


def _model_at(path: KeyPath) -> type[BaseModel]:
    """The mapping that the last part of ``path`` is a key of."""
    parts = [str(part) for part in path[:-1]]
    if parts and parts[0] in ("datasets", "test_datasets"):
        inside: dict[str, type[BaseModel]] = {"message_property_mappings": Turn, "type": PromptFormat}
        return inside.get(parts[-1], DatasetConfig)
    inner: dict[str, type[BaseModel]] = {
        "special_tokens": SpecialTokens,
        "gradient_checkpointing_kwargs": Checkpointing,
    }
    return inner.get(parts[0], TrainConfig) if parts else TrainConfig


def _known_like(name: str, model: type[BaseModel]) -> str:
    """A remedy for an unknown key of ``model``."""
    if model is TrainConfig:
        if name in ELSEWHERE:
            return f"It is `{ELSEWHERE[name]}` here."
        known = [*TrainConfig.model_fields, *DIFFERENT, *NOT_YET]
        remedy = nearest(name, known)
        return remedy if remedy.startswith("Did") else "`fourfold schema` prints all keys."
    return nearest(name, [*model.model_fields, *(DATASET_NOT_YET if model is DatasetConfig else ())])


def _placed(problem: Problem, parsed: YamlFile, overridden: Mapping[KeyPath, str]) -> Problem:
    """The problem with its line, or the nearest enclosing key's; or with "command line"."""
    path = problem.path or split_key(problem.key)
    for override, text in overridden.items():
        if path[: len(override)] == override or override[: len(path)] == path:
            return replace(problem, where=f"command line ({text})")
    while path and path not in parsed.lines:
        path = path[:-1]
    return replace(problem, where=f"line {parsed.lines[path]}" if path else "")
