"""``fourfold export ADAPTER OUT``: an adapter on fused experts as servers take it, or back."""

from __future__ import annotations

import argparse

from rich.console import Console

from fourfold.cli.outcome import Outcome
from fourfold.cli.show import few, say


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("adapter", help="a folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument(
        "--layout",
        choices=("per-expert", "fused"),
        default="per-expert",
        help="per-expert (the default): vLLM, SGLang; fused: PEFT, and servers of models with fused experts",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the base's folder, config.json or id (what the adapter names)"
    )
    parser.add_argument(
        "--source-layout",
        choices=("peft", "peft-0.18", "unsloth"),
        help="how the adapter packs experts, where its marks do not say: peft-0.18 of 0.17 to 0.19.0, "
        "unsloth of before September 2026",
    )
    parser.add_argument(
        "--gate-up",
        choices=("concatenated", "interleaved"),
        help="how the base joins gate and up, where its configuration is not within reach",
    )
    parser.add_argument(
        "--double-rank", action="store_true", help="to fused: gate and up of different A, at twice the rank"
    )
    parser.add_argument(
        "--base-weights",
        choices=("original", "dequantized"),
        default="original",
        help="what the server holds; adapters that began with loftq_init are right on dequantized ones only",
    )
    parser.add_argument(
        "--initial",
        metavar="ADAPTER",
        help="the same adapter as loftq_init left it: what it adds is taken off, at twice the rank, and the "
        "result belongs on original weights",
    )
    parser.add_argument("--force", action="store_true", help="replace the adapter that lies at OUT")


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Convert, and say what a server has to be told."""
    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.adapters.export import export

    written = export(
        args.adapter,
        args.out,
        args.layout,
        base=args.base,
        source_layout=args.source_layout,
        gate_up=args.gate_up,
        double_rank=args.double_rank,
        base_weights=args.base_weights,
        initial=args.initial,
        force=args.force,
    )
    lines = [
        f"{written.folder}: {written.layout}, {written.experts_modules} experts modules, {written.tensors} "
        f"tensors, rank {written.rank}"
    ]
    if written.flags:
        lines.append(f"The rank is beyond vLLM's default of 16: serve with {' '.join(written.flags)}")
    if written.names == "adapter":
        lines.append(
            "The base's configuration is not within reach, so modules are named as transformers names "
            "them; where the base's checkpoint has other names, servers refuse the adapter: pass --base"
        )
    if written.zero_filled:
        lines.append(f"Not trained, written as zeros: {few(written.zero_filled, 2)}")
    if not written.exact:
        lines.append("Modules differ in alpha / r: what differs went into lora_B, rounded once to its dtype")
    say(console, *lines)
    return Outcome(data=written.to_dict())
