"""As much of JSON Schema as the schema of the configuration uses."""

from __future__ import annotations

import re
from typing import Any


def is_whole(value: Any, kind: str) -> bool:
    """To JSON Schema 8.0 is an integer."""
    return kind == "integer" and isinstance(value, float) and value.is_integer()


def fits(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    """Enough of JSON Schema for ours: every keyword in it is known here, or this fails."""
    if "$ref" in schema:
        return fits(value, definitions[schema["$ref"].rpartition("/")[2]], definitions)
    kinds = {
        "string": str,
        "integer": int,
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }
    checks = {
        "anyOf": lambda x: any(fits(value, option, definitions) for option in x),
        "oneOf": lambda x: sum(fits(value, option, definitions) for option in x) == 1,
        "type": lambda x: (
            (isinstance(value, (int, float) if x == "number" else kinds[x]) or is_whole(value, x))
            and (x == "boolean" or not isinstance(value, bool))
        ),
        "enum": lambda x: any(type(value) is type(item) and value == item for item in x),
        "const": lambda x: type(value) is type(x) and value == x,
        "minLength": lambda x: len(value) >= x,
        "pattern": lambda x: re.search(x, value) is not None,
        "minimum": lambda x: value >= x,
        "maximum": lambda x: value <= x,
        "exclusiveMinimum": lambda x: value > x,
        "exclusiveMaximum": lambda x: value < x,
        "minItems": lambda x: len(value) >= x,
        "items": lambda x: all(fits(item, x, definitions) for item in value),
        "required": lambda x: set(x) <= set(value),
        "properties": lambda x: all(fits(value[key], x[key], definitions) for key in value if key in x),
        "propertyNames": lambda x: all(fits(key, x, definitions) for key in value),
    }
    about = {"description", "default", "title", "$defs", "$schema", "additionalProperties"}
    assert set(schema) <= {*checks, *about}, set(schema)
    extra = schema.get("additionalProperties", True)
    if extra is False and isinstance(value, dict) and set(value) - set(schema["properties"]):
        return False
    if isinstance(extra, dict) and isinstance(value, dict):
        return all(fits(item, extra, definitions) for item in value.values())
    # `type` first: the others read the value as what it says.
    keywords = sorted(set(schema) & set(checks), key=lambda key: key != "type")
    return all(checks[key](schema[key]) for key in keywords)
