"""``fourfold quantize MODEL OUT``: write a packed checkpoint without ever holding the model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fourfold.cli.outcome import Outcome
from fourfold.cli.show import few, progress, say
from fourfold.errors import ConfigurationError, StoredFormatError


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", help="a folder, or a model's id on the hub")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="4 (the default) or 8 (INT8)")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), help="of 4 bit (nf4)")
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="quantize the scales as well (with 4 bit, unless --no-double-quant)",
    )
    parser.add_argument(
        "--experts-quant-type",
        choices=("nf4", "fp4", "int8", "none"),
        help="another format for experts than for Linears; none leaves them in high precision",
    )
    parser.add_argument(
        "--experts-blocksize", type=int, default=64, metavar="N", help="of 4-bit experts (64)"
    )
    parser.add_argument(
        "--skip-modules",
        nargs="+",
        metavar="NAME",
        help="modules to leave in high precision, beside the head",
    )
    parser.add_argument("--device", help="where to quantize: cpu, cuda, ... (the GPU if there is one)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file, and of what is in memory (5GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that lies at OUT")


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Check the settings, stream the weights, say what lies there."""
    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.loading.config import MoeBitsAndBytesConfig
    from fourfold.loading.quantize import quantize_checkpoint
    from fourfold.planning.units import format_bytes

    config = MoeBitsAndBytesConfig(**settings(args))
    with progress(console, "reading") as show:
        try:
            written = quantize_checkpoint(
                args.model,
                args.out,
                config,
                device=args.device,
                max_shard_size=args.max_shard_size,
                force=args.force,
                progress=show,
            )
        except StoredFormatError as error:
            raise ConfigurationError(error.advising(flags(error.settings))) from error
    experts = f"{written.packed_experts} experts modules packed" if written.packed_experts else "no experts"
    if written.left_on_request:
        experts += f", {len(written.left_on_request)} left in high precision on request"
    say(
        console,
        f"{written.folder}: {written.tensors} tensors, {format_bytes(written.bytes)} in "
        f"{len(written.files)} file(s), {experts}; quant_method {written.quant_method}; "
        f"{written.seconds:.1f} s",
    )
    if written.ignored_keys:
        say(
            console,
            f"{len(written.ignored_keys)} tensors of the source belong to nothing in the model and were left "
            f"out: {few(written.ignored_keys, 3)}",
        )
    return Outcome(data=written.to_dict())


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `MoeBitsAndBytesConfig`; 4 bit is NF4, double-quantized, unless said otherwise."""
    four = args.bits == 4
    result: dict[str, Any] = {
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_use_double_quant": four if args.double_quant is None else args.double_quant,
        "experts_quant_type": args.experts_quant_type,
        "experts_blocksize": args.experts_blocksize,
        "llm_int8_skip_modules": args.skip_modules,
    }
    if four or args.quant_type:
        result["bnb_4bit_quant_type"] = args.quant_type or "nf4"
    return result


def flags(settings: Mapping[str, Any]) -> str:
    """Arguments of `MoeBitsAndBytesConfig` as they are written on this verb's command line."""
    said = {
        "load_in_4bit": "--bits 4",
        "bnb_4bit_quant_type": "--quant-type {}",
        "bnb_4bit_use_double_quant": "--double-quant",
        "experts_quant_type": "--experts-quant-type {}",
        "experts_blocksize": "--experts-blocksize {}",
    }
    return " ".join(
        said[name].format(value) if value is not False else said[name].replace("--", "--no-", 1)
        for name, value in settings.items()
    )
