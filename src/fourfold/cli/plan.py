"""``fourfold plan MODEL_OR_YAML [--gpu 24GiB] [key=value ...]``: the memory of a run, before it is begun."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourfold.cli import plan_offload
from fourfold.cli.outcome import DONE, SAYS_NO, Outcome
from fourfold.cli.show import say
from fourfold.errors import ConfigurationError

if TYPE_CHECKING:
    from fourfold.planning.fit import Suggestion
    from fourfold.planning.plan import Plan
    from fourfold.training.schema import TrainConfig

# What a run of a bare model is taken to be, where `key=value` says nothing else.
OF_A_MODEL: dict[str, Any] = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "sequence_len": 2048,
    "gradient_checkpointing": True,
    "lora_target_parameters": ["all"],
    "optimizer": "adamw_torch_fused",
    "datasets": [{"path": "-"}],
}
COLOURS = {
    "experts": "blue",
    "linears": "cyan",
    "other weights": "bright_black",
    "adapters": "green",
    "optimizer": "yellow",
    "gradients": "magenta",
    "activations kept": "red",
    "working memory": "bright_red",
    "libraries": "white",
}
WIDTH = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", help="a YAML file of a run, or a model: a folder, a config.json, or an id")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="replace a key, e.g. lora_r=16"
    )
    parser.add_argument("--gpu", metavar="SIZE", help="memory of the card, e.g. 24GiB; absent: the one here")
    parser.add_argument(
        "--capability", metavar="X.Y", help="of the card, e.g. 9.0 (H100); absent: the one here, or 8.0"
    )
    parser.add_argument("--gpus", metavar="N", type=int, help="also plan for several such cards, 2 or more")
    parser.add_argument("--cpu", action="store_true", help="plan a run without a GPU")
    plan_offload.configure(parser)


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Exit status 1 where it does not fit the card, nor several where they were asked for."""
    from fourfold.planning.size import parse_size

    card = None if args.gpu is None else parse_size(args.gpu)
    if args.cpu and (args.gpu or args.capability):
        raise ConfigurationError("--cpu: contradicts --gpu and --capability. Keep one of them.")
    is_run = Path(args.model).suffix in (".yaml", ".yml")
    named = plan_offload.check(args)
    config = _config(args, is_run)
    plan_offload.check_effect(named, config)
    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    import torch

    from fourfold.planning.fit import room, suggest
    from fourfold.planning.pace import pace_of
    from fourfold.planning.ranks import plan_ranks
    from fourfold.planning.standins import Target
    from fourfold.training.planned import planner_of

    if args.cpu:
        target = Target("cpu", None)
    else:
        capability = _capability(args.capability)
        if torch.cuda.is_available():
            capability = capability or torch.cuda.get_device_capability()
            card = card or torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        target = Target("cuda", capability or (8, 0))
    try:
        planner, settings = planner_of(config, target, card)
    except ConfigurationError as error:
        # (a bare model's experts are trained where it has any that can be; nobody has asked for them)
        asked = is_run or any(text.startswith("lora_target_parameters") for text in args.overrides)
        if asked or not str(error).startswith("lora_target_parameters"):
            raise
        planner, settings = planner_of(config.model_copy(update={"lora_target_parameters": []}), target, card)
    plan = planner.plan(settings, both=True)
    fits = None if card is None else plan.peak <= room(card)
    ways = plan_ranks(planner, settings, plan, args.gpus) if args.gpus is not None else []
    suggestions = suggest(planner, settings, room(card)) if card is not None and not fits else []
    found = pace_of(plan, **named)
    show(plan, card, suggestions, console)
    plan_offload.show(plan, found, console)
    if ways:
        from fourfold.cli.plan_ranks import show_ranks

        show_ranks(ways, card, console)
        fits = None if card is None else any(way.peak <= room(card) for way in ways)
    data = plan.to_dict() | {
        "offload": plan_offload.to_dict(plan, found),
        "card": card,
        "room": None if card is None else room(card),
        "fits": fits,
        "suggestions": [{"keys": s.keys, "peak": s.plan.peak} for s in suggestions],
        "gpus": [way.to_dict() for way in ways],
    }
    return Outcome(SAYS_NO if fits is False else DONE, data)


def _config(args: argparse.Namespace, is_run: bool) -> TrainConfig:
    """The run: of the file, or of a model with the settings of `OF_A_MODEL`."""
    from fourfold.training.read_config import examine, examine_values

    overrides = [*plan_offload.overrides(args), *args.overrides]
    if is_run:
        examined = examine(args.model, overrides)
    else:
        examined = examine_values({"base_model": args.model, **OF_A_MODEL}, overrides)
    if examined.config is None or examined.problems:
        raise ConfigurationError(examined.complaint())
    return examined.config


def _capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if match is None:
        raise ConfigurationError(f"--capability: {text!r} is none. Write 8.9, say.")
    return int(match[1]), int(match[2])


def show(plan: Plan, card: int | None, suggestions: list[Suggestion], console: Console) -> None:
    """The plan as a table and a bar, and whether it fits."""
    from fourfold.planning.fit import room

    settings = plan.settings
    where = "CPU"
    if plan.target.capability is not None:
        where = "GPU of capability {}.{}".format(*plan.target.capability)
    say(
        console,
        f"{plan.model}: rank {settings['r']} on {_targets(settings)}; {settings['batch']} x "
        f"{settings['length']:,} tokens, {settings['optimizer']}, on a {where}",
    )
    console.print(table(plan))
    console.print(bar(plan, card), soft_wrap=True)
    console.print(legend(plan))
    if plan.unknown:
        say(
            console,
            f"Activations of this model are not known before it runs ({plan.unknown}); all of the above is "
            "without them.",
        )
    if plan.optimizer_paged:
        say(console, f"Of the optimizer {_size(plan.optimizer_paged)} more lie in memory that is paged.")
    if card is None:
        return
    if plan.peak <= room(card):
        say(console, f"It fits {_size(card)} ({_size(room(card))} of them for tensors).")
        return
    say(console, f"It does not fit {_size(card)} ({_size(room(card))} of them for tensors).")
    if suggestions:
        say(console, "It does with:" if len(suggestions) == 1 else "It does with any of:")
        for suggestion in suggestions:
            say(console, f"  {suggestion}    peak {_size(suggestion.plan.peak)}")
    else:
        say(
            console,
            "No change of batch, sequence, rank, targets, optimizer or place of experts makes it fit.",
        )


def table(plan: Plan) -> Table:
    """What takes how much."""
    result = Table(title="planned memory", title_justify="left", show_footer=True)
    result.add_column("what", footer="peak")
    result.add_column("as", footer="" if plan.activations is not None else "at least")
    result.add_column("parameters", justify="right")
    result.add_column("bytes", justify="right", footer=_size(plan.peak))
    for row in plan.weights.rows:
        result.add_row(row.role, row.dtype, f"{row.logical_params:,}", _size(row.bytes))
    result.add_section()
    result.add_row("adapters", "float32", f"{plan.trained:,}", _size(plan.adapters))
    result.add_row("gradients", "float32", "", _size(plan.gradients))
    result.add_row("optimizer", plan.settings["optimizer"], "", _size(plan.optimizer))
    if plan.optimizer_step:
        result.add_row("optimizer's step", "temporary", "", _size(plan.optimizer_step))
    if plan.libraries:
        result.add_row("libraries", "cuBLAS", "", _size(plan.libraries))
    if plan.activations is None:
        return result
    result.add_section()
    this = plan.settings["checkpointing"]
    how = {True: "checkpointing", False: "no checkpointing"}
    result.add_row("activations", f"{how[this]}, kept", "", _size(plan.activations.kept))
    working = max(0, plan.activations.backward - plan.activations.kept)
    result.add_row("", "a layer in backward", "", _size(working))
    result.add_row("", "loss, in tiles", "", _size(plan.activations.loss))
    if plan.otherwise is not None and plan.peak_otherwise is not None:
        result.add_section()
        result.add_row("otherwise", f"{how[not this]}, kept", "", _size(plan.otherwise.kept), style="dim")
        result.add_row("", "peak", "", _size(plan.peak_otherwise), style="dim")
    return result


def bar(plan: Plan, card: int | None) -> Text:
    """The peak by its parts, as long as the card where there is one."""
    parts = plan.parts()
    whole = max(card or 0, plan.peak)
    text, used, drawn = Text(), 0, 0
    for name, count in parts.items():
        used += count
        cells = round(used / whole * WIDTH) - drawn
        drawn += cells
        text.append("█" * cells, style=COLOURS[name])
    text.append("░" * (WIDTH - drawn), style="dim")
    text.append(f"  {_size(plan.peak)}")
    if card is not None:
        text.append(f" of {_size(card)}")
    return text


def legend(plan: Plan) -> Columns:
    """The colours of the bar."""
    parts = plan.parts().items()
    return Columns(
        [Text.assemble(("■ ", COLOURS[name]), f"{name} {_size(count)}") for name, count in parts],
        padding=(0, 2),
    )


def _targets(settings: dict[str, Any]) -> str:
    names: list[str] = []
    for key in ("target_modules", "target_parameters"):
        value = settings[key] or ()
        names += [value] if isinstance(value, str) else [name.rpartition(".")[2] for name in value]
    names = list(dict.fromkeys(names))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _size(count: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.2f} {unit}"
    return f"{count} B"
