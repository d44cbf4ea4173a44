"""The part of ``fourfold plan`` for several GPUs: ``--gpus N``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fourfold.cli.plan import _size
from fourfold.cli.show import say

if TYPE_CHECKING:
    from fourfold.planning.ranks import RankPlan


def show_ranks(ways: list[RankPlan], card: int | None, console: Console) -> None:
    """What each of the GPUs needs, by the way of training, and which fit the card."""
    from fourfold.planning.fit import room

    console.print(ranks_table(ways))
    say(
        console,
        "Each GPU has micro batches of its own. FSDP2: fourfold.distributed.shard; layers stay with "
        "reshard_after_forward=False; DDP: fourfold.distributed.replicate.",
    )
    if card is None:
        return
    fitting = [way.way for way in ways if way.peak <= room(card)]
    count, of = ways[0].gpus, f"{_size(card)} ({_size(room(card))} of them for tensors)"
    if fitting:
        say(console, f"On {count} GPUs of {of} it fits by: {'; '.join(fitting)}.")
    else:
        say(console, f"On {count} GPUs of {of} it does not fit either way.")


def ranks_table(ways: list[RankPlan]) -> Table:
    """One row for each way."""
    result = Table(title=f"each of {ways[0].gpus} GPUs", title_justify="left")
    result.add_column("way")
    for name in (
        "loading",
        "weights",
        "adapters",
        "optimizer",
        "gathered",
        "resident",
        "peak",
        "sent a step",
    ):
        result.add_column(name, justify="right")
    for way in ways:
        counts = (way.weights, way.adapters, way.optimizer, way.gathered, way.resident, way.peak, way.sent)
        loading = "whole model" if way.loading is None else f"≤ {_size(way.loading)}"
        result.add_row(way.way, loading, *map(_size, counts))
    return result
