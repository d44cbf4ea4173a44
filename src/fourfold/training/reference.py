"""docs/configuration.md, made of the schema and the tables of other keys.

``python -m fourfold.training.reference > docs/configuration.md`` writes it; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fourfold.training.cards import RECOMPUTED, TWICE
from fourfold.training.dataset_keys import DatasetConfig, PromptFormat, Turn
from fourfold.training.model_keys import SpecialTokens
from fourfold.training.other_keys import DATASET_NOT_YET, DIFFERENT, NOT_YET, PLUGINS, NotYet
from fourfold.training.run_keys import Checkpointing
from fourfold.training.schema import TrainConfig

HEAD = """\
# Configuration

The keys of the YAML file that `fourfold train` takes, under the names and with the meaning that axolotl's
users know. Made by `python -m fourfold.training.reference > docs/configuration.md`.

```
fourfold validate config.yaml                   every problem at once, with line and remedy
fourfold validate config.yaml max_steps=20      as train would take it with the same arguments
fourfold schema > fourfold.schema.json          JSON Schema; a file names it to an editor in a first line:
                                                # yaml-language-server: $schema=fourfold.schema.json
```

`validate` reads the file alone, in a fifth of a second; exit status 0 valid, 1 not, 2 no YAML file. A key is
of one of three kinds. *Done*: it means what it says. *Given differently*: what it is for is had otherwise,
or only speed, memory or display hang on it; accepted, and said by `validate` and at the start of `train`.
*Not yet*: it would change what is trained, and Fourfold lacks it; refused by name, unless its value asks for
nothing. Any other key is an error that names the nearest known one. A null is the key's default; a key given
twice is an error; settings that contradict each other are errors.

One key means more than axolotl's where it is absent: `quantize_moe_experts` (experts are packed wherever
Linears are). Experts are trained only where `lora_target_parameters` names them, or is `all`. `validate` says
both each time.

`key=value` on the command line replaces a key of the file: the value is YAML (`lora_r=null`,
`lora_target_modules=[q_proj]`), dots reach inside (`bnb_config_kwargs.bnb_4bit_quant_type=fp4`), numbers
count the entries of a list from 0 (`datasets.0.path=other.jsonl`).
"""


def render() -> str:
    """The page."""
    different = DIFFERENT | {f"fsdp_config.{RECOMPUTED}": TWICE}
    parts = [HEAD, "## Done\n", _fields(TrainConfig)]
    for title, model in (
        ("An entry of `datasets` and `test_datasets`", DatasetConfig),
        ("`message_property_mappings`", Turn),
        ("`type`, where it is a mapping", PromptFormat),
        ("`special_tokens`", SpecialTokens),
        ("`gradient_checkpointing_kwargs`", Checkpointing),
    ):
        parts += [f"### {title}\n", _fields(model)]
    parts += ["## Given differently\n", _table(("key", "what happens instead"), different.items())]
    parts += ["### Plugins\n", _table(("plugin", "what happens instead"), PLUGINS.items())]
    parts += ["## Not yet\n", _not_yet(NOT_YET), "### In an entry of `datasets`\n", _not_yet(DATASET_NOT_YET)]
    return "\n".join(parts)


def _fields(model: type[BaseModel]) -> str:
    rows = []
    for name, field in model.model_fields.items():
        default: Any = field.default
        if field.default_factory is not None:
            default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            default = default.model_dump()
        shown = "required" if default is PydanticUndefined else f"`{_yaml(default)}`"
        rows.append((name, shown, str(field.description)))
    return _table(("key", "default", "meaning"), rows)


def _not_yet(table: dict[str, NotYet]) -> str:
    rows = []
    for name, entry in table.items():
        off = ", ".join(f"`{_yaml(value)}`" for value in (None, *entry.off))
        rows.append((name, entry.what, entry.remedy, off))
    return _table(("key", "what is missing", "meanwhile", "accepted"), rows)


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for name, *cells in rows:
        lines.append(f"| `{name}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
