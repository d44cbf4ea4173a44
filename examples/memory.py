"""What model, adapters and optimizer of each example take of a card: the line `# memory:` in its head, and
the table in README.md and docs/examples.md.

    python examples/memory.py            prints the table
    python examples/memory.py --write    writes it into both pages, and the lines into the files

Counted on models without weights, made from the published configurations in configs/: the model as
`fourfold verify` counts it after loading; LoRA factors and their gradients in fp32 (8 bytes a parameter), and
the state of 8-bit AdamW (2 bytes). What a step computes with, activations and workspaces, comes on top: it
depends on batch, sequence and attention.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import logging as transformers_logging

import fourfold
from fourfold.adapters.peft_lora import add_lora
from fourfold.loading.skeleton import build_skeleton, read_config
from fourfold.training.read_config import load_config

HERE = Path(__file__).parent
CARDS = (12, 16, 24, 32, 48, 80, 96, 141)  # GiB
# What is left on the card for a step's activations, workspaces and the allocator.
LEFT = 0.15
# Pages with the table, and whether its names of files are links there.
PAGES = {HERE / "README.md": True, HERE.parent / "docs" / "examples.md": False}
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# LoRA factors and gradients in fp32; the two moments of 8-bit AdamW.
BYTES_A_PARAMETER = 4 + 4 + 2
LINE = re.compile(r"^# memory: .*$", re.MULTILINE)


@dataclass
class Memory:
    """What lies on the card all the time.

    Attributes:
        model: bytes of the packed model.
        before: bytes of the model in bf16.
        trainable: parameters of the adapter.
    """

    model: int
    before: int
    trainable: int

    @property
    def training(self) -> int:
        """Bytes of adapters, gradients and optimizer."""
        return self.trainable * BYTES_A_PARAMETER

    @property
    def total(self) -> int:
        return self.model + self.training

    @property
    def card(self) -> int:
        """GiB of the smallest usual card with some room left."""
        return next(size for size in CARDS if self.total <= size * (1 - LEFT) * 2**30)

    def __str__(self) -> str:
        parts = f"model {gib(self.model)} (bf16: {gib(self.before)})"
        return (
            f"{gib(self.total)} GiB = {parts} + adapters, gradients, optimizer {gib(self.training)}; "
            "activations come on top"
        )


def gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def names() -> list[str]:
    """Of the examples for published models."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def count(name: str) -> Memory:
    """Build the model without weights, packed and with adapters as the example says, and count."""
    settings = load_config(HERE / f"{name}.yaml")
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(read_config(HERE / "configs" / name), dtype=torch.bfloat16)
    # (of a model with images maybe the text alone, which names its class)
    plain.config.architectures = [type(plain).__name__]
    arguments: Any = settings.quantization_kwargs()
    model = build_skeleton(plain.config, fourfold.MoeBitsAndBytesConfig(**arguments))
    report = fourfold.verify(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.device("meta"):
        adapted = add_lora(
            model,
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            target_modules=settings.target_modules,
            target_parameters=settings.lora_target_parameters,
            rank_pattern=settings.lora_rank_pattern or {},
        )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Memory(report.bytes, report.bytes_before, trainable)


def table(found: dict[str, Memory], links: bool = True) -> str:
    """Rows of README.md and, without links, of docs/examples.md."""
    lines = [
        "| file | model | packed GiB | bf16 GiB | LoRA, millions | training GiB | together | card |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, memory in sorted(found.items(), key=lambda item: item[1].total):
        hub = load_config(HERE / f"{name}.yaml").base_model
        file = f"[{name}.yaml]({name}.yaml)" if links else f"`{name}.yaml`"
        cells = [file, f"`{hub}`", gib(memory.model), gib(memory.before)]
        cells += [f"{memory.trainable / 1e6:,.0f}", gib(memory.training), f"**{gib(memory.total)}**"]
        lines.append(f"| {' | '.join([*cells, f'{memory.card} GB'])} |")
    return "\n".join(lines)


def with_line(text: str, memory: Memory) -> str:
    """An example's text with the line for this memory."""
    return LINE.sub(f"# memory: {memory}", text, count=1)


def with_table(text: str, found: dict[str, Memory], links: bool = True) -> str:
    """A page's text with the table for these."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(found, links)}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Print or write."""
    parser = argparse.ArgumentParser(description="What the examples take of a card's memory.")
    parser.add_argument("--write", action="store_true", help="into the pages and the files")
    args = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    found = {name: count(name) for name in names()}
    print(table(found))
    if args.write:
        for name, memory in found.items():
            path = HERE / f"{name}.yaml"
            path.write_text(with_line(path.read_text(encoding="utf-8"), memory), encoding="utf-8")
        for page, links in PAGES.items():
            page.write_text(with_table(page.read_text(encoding="utf-8"), found, links), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
