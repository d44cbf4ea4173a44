"""``fourfold merge BASE ADAPTER OUT``: the base with the adapter added to its weights."""

from __future__ import annotations

import argparse

from rich.console import Console

from fourfold.cli.outcome import Outcome
from fourfold.cli.show import progress, say, warn


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("base", help="the checkpoint that the adapter was trained on: a folder, or a hub id")
    parser.add_argument("adapter", help="the adapter's folder")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument(
        "--base-weights",
        choices=("original", "dequantized"),
        default="original",
        help="add to the base as it is (the default), or to what packing left of it, which was trained on",
    )
    parser.add_argument(
        "--any-base", action="store_true", help="merge into BASE whatever the adapter was trained on"
    )
    parser.add_argument(
        "--source-layout",
        choices=("peft", "peft-0.18", "unsloth"),
        help="how the adapter packs experts, where its marks do not say: peft-0.18 of 0.17 to 0.19.0, "
        "unsloth of before September 2026",
    )
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that lies at OUT")


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Plan, stream, say what lies there and what to look at."""
    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.adapters.merge import merge

    with progress(console, "planning") as show:
        merged = merge(
            args.base,
            args.adapter,
            args.out,
            args.base_weights,
            any_base=args.any_base,
            source_layout=args.source_layout,
            force=args.force,
            progress=show,
        )
    say(
        console,
        f"{merged.folder}: {merged.adapter_tensors} tensors of the adapter merged into {merged.planned} "
        f"parameters ({merged.keys} tensors in {len(merged.files)} file(s)), {merged.base_weights} base "
        f"weights; {len(merged.copied)} other files copied; {merged.seconds:.1f} s",
    )
    if merged.resumed:
        say(console, f"kept of a run that was killed: {len(merged.resumed)} file(s)")
    if merged.left_out:
        say(console, f"left out, for they hold weights without the adapter: {', '.join(merged.left_out)}")
    warn(merged.warnings)
    return Outcome(data=merged.to_dict())
