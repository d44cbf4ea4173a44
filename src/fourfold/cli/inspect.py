"""``fourfold inspect MODEL``: experts modules, their sizes in bf16, 4 and 8 bit, and their LoRA targets.

``--ways`` adds how products with packed experts are computed on this machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fourfold.cli.outcome import Outcome
from fourfold.cli.show import say
from fourfold.errors import ConfigurationError


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "model", help="a folder, a config.json, or a model's id on the hub; no weight is read"
    )
    parser.add_argument(
        "--ways", action="store_true", help="also how this machine multiplies with packed experts, and when"
    )


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Read the configuration, build the skeleton, list the experts."""
    if Path(args.model).suffix in (".yaml", ".yml"):
        raise ConfigurationError(
            f"{args.model} configures a run, not a model. Inspect the folder or id that its base_model names."
        )

    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.planning.inspect import Inspection, inspect_model
    from fourfold.planning.units import format_bytes

    def table(found: Inspection) -> Table:
        columns = list(dict.fromkeys(name for group in found.groups for name in group.bytes))
        columns.sort(key=lambda name: (name != "bf16", name))
        result = Table(title="experts", title_justify="left")
        result.add_column("modules", justify="right")
        for heading in columns:
            result.add_column(heading.replace("_", " "), justify="right")
        for group in found.groups:
            sizes = [format_bytes(group.bytes[name]) if name in group.bytes else "-" for name in columns]
            result.add_row(str(group.count), *sizes)
        return result

    found = inspect_model(args.model)
    share = found.expert_params / found.total_params
    say(console, f"{found.architecture}: {found.total_params:,} parameters, {share:.0%} of them in experts")
    for group in found.groups:
        shapes = ", ".join(f"{name} {shape}" for name, shape in group.shapes.items())
        kind = group.kind if group.can_be_packed else f"cannot be packed: {group.kind}"
        say(console, f"{group.count} x {group.pattern} ({kind}): {shapes}")
    if found.groups:
        console.print(table(found))
        targets = ", ".join(found.targets) or "none"
        say(console, f"lora_target_parameters: {targets}")
    else:
        console.print("no experts: a dense model")
    data = found.to_dict()
    if args.ways:
        from fourfold.kernels.ways import describe

        data["ways"] = describe()
        say(console, *data["ways"].splitlines())
    return Outcome(data=data)
