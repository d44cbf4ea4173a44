"""The configuration file as JSON Schema, for editors: descriptions, defaults, choices, no unknown keys.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Any

from fourfold.training.fsdp_keys import FSDP, OFF
from fourfold.training.key_types import EXPONENT
from fourfold.training.other_keys import DATASET_NOT_YET, DIFFERENT, NOT_YET, NotYet
from fourfold.training.schema import TrainConfig
from fourfold.training.zero import DEEPSPEED

# An unquoted `no` is false to YAML 1.1, and false turns these off.
FALSE_TOO = ("eval_strategy", "save_strategy", "wandb_watch", "wandb_log_model")
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema; whatever has a default may be null as well, as in the file."""
    result = TrainConfig.model_json_schema()
    definitions = result["$defs"]
    for part in (result, *definitions.values()):
        required = part.get("required", ())
        for name, entry in part["properties"].items():
            if name not in required:
                part["properties"][name] = _or_null(entry)
    for name, what in DIFFERENT.items():
        result["properties"][name] = {"description": f"Given differently: {what}."}
    for name, entry in NOT_YET.items():
        result["properties"][name] = _not_yet(entry)
    for name, entry in DATASET_NOT_YET.items():
        definitions["DatasetConfig"]["properties"][name] = _not_yet(entry)
    _lists_of_one(result, definitions)
    _numbers_as_text(result)
    for name in FALSE_TOO:
        result["properties"][name]["anyOf"].append({"const": False})
    for name in (*FSDP, DEEPSPEED):
        result["properties"][name]["anyOf"].append({"enum": list(OFF)})
    return {"$schema": DIALECT, **result, "title": "Configuration of fourfold train"}


def _numbers_as_text(part: Any) -> None:
    """A number written as 1e-3 is text to YAML 1.1, and read as the number that it is."""
    if isinstance(part, dict):
        for key, entry in part.items():
            if isinstance(entry, dict) and entry.get("type") == "number":
                part[key] = {"anyOf": [entry, {"type": "string", "pattern": EXPONENT}]}
            else:
                _numbers_as_text(entry)
    elif isinstance(part, list):
        if any(isinstance(entry, dict) and entry.get("type") == "number" for entry in part):
            part.append({"type": "string", "pattern": EXPONENT})
        for entry in part:
            _numbers_as_text(entry)


def _or_null(entry: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: entry[key] for key in ("description", "default", "title") if key in entry}
    kind = {key: value for key, value in entry.items() if key not in about}
    choices = kind.get("anyOf", [kind])
    if {"type": "null"} not in choices:
        choices = [*choices, {"type": "null"}]
    return {**about, "anyOf": choices}


def _not_yet(entry: NotYet) -> dict[str, Any]:
    """Only values that ask for nothing: an editor marks any other."""
    of_each_kind: tuple[Any, ...] = ("", [], {})
    nothing = [value for value in of_each_kind if value not in entry.off]
    return {
        "description": f"Not yet: {entry.what}. {entry.remedy}",
        "enum": [None, *entry.off, *nothing],
    }


def _lists_of_one(schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    """One name stands for a list of it."""
    entries = [schema["properties"]["lora_target_parameters"]]
    entries.append(definitions["DatasetConfig"]["properties"]["data_files"])
    for entry in entries:
        entry["anyOf"].append({"type": "string", "minLength": 1})
    for kind in definitions["DatasetConfig"]["properties"]["roles"]["anyOf"]:
        if "additionalProperties" in kind:
            words = kind["additionalProperties"]
            kind["additionalProperties"] = {"anyOf": [words, {"type": "string", "minLength": 1}]}
