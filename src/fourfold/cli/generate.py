"""``fourfold generate MODEL [--adapter DIR] --prompt TEXT``."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Console

from fourfold.cli.outcome import Outcome


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", help="a folder, or a model's id on the hub")
    parser.add_argument("--adapter", help="the folder of a LoRA adapter")
    parser.add_argument(
        "--prompt", required=True, help="what to answer; goes through the chat template if there is one"
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="at most so many (128)"
    )
    parser.add_argument(
        "--sample", action="store_true", help="sample, rather than take the likeliest token each time"
    )
    held = parser.add_mutually_exclusive_group()
    held.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="NF4, double-quantized (the default, unless the adapter was trained on another format)",
    )
    held.add_argument("--load-in-8bit", action="store_true", help="INT8")
    held.add_argument("--no-quantization", action="store_true", help="as stored")
    parser.add_argument(
        "--skip-modules",
        nargs="+",
        metavar="NAME",
        help="modules to leave in high precision, beside the head (llm_int8_skip_modules)",
    )


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Load (packed), attach the adapter, stream the answer."""
    from fourfold.cli.libraries import quiet

    quiet(args.debug)

    from fourfold.training.generation import load_for_generation, stream

    bits = 8 if args.load_in_8bit else 4 if args.load_in_4bit else 0 if args.no_quantization else None
    model, tokenizer = load_for_generation(args.model, bits, args.adapter, args.skip_modules)
    started = time.perf_counter()
    text, tokens = stream(model, tokenizer, args.prompt, args.max_new_tokens, args.sample)
    seconds = time.perf_counter() - started
    data: dict[str, Any] = {"text": text, "new_tokens": tokens, "seconds": seconds}
    return Outcome(data=data)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)
