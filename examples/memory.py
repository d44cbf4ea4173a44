"""What each example takes of a card, as `fourfold plan` plans it: the line `# memory:` in its head, and the
table in README.md and docs/examples.md.

    python examples/memory.py            prints the table; a few minutes
    python examples/memory.py --write    writes it into both pages, and the lines into the files

Planned from the published configurations in configs/, without weights, for a card that is no Hopper
(capability 8.0, where decoded weights need a workspace). The last columns of the table: factors of LoRA and
the optimizer's state; what a step takes beside them, gradients included; the peak.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import logging as transformers_logging

from fourfold.planning.fit import room
from fourfold.planning.plan import Plan, Planner
from fourfold.planning.standins import Target
from fourfold.training.planned import planner_of
from fourfold.training.read_config import examine, load_config

if TYPE_CHECKING:
    from fourfold.planning.plan import Settings

HERE = Path(__file__).parent
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)  # GiB
# Pages with the table, and whether its names of files are links there.
PAGES = {HERE / "README.md": True, HERE.parent / "docs" / "examples.md": False}
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
LINE = re.compile(r"^# memory: .*$", re.MULTILINE)


@dataclass
class Memory:
    """Bytes of a planned run.

    Attributes:
        model: of the packed model.
        before: of the model in bf16.
        trained: parameters of the adapter.
        resident: what lies on the card between two steps.
        peak: the most at a time.
    """

    model: int
    before: int
    trained: int
    resident: int
    peak: int

    @classmethod
    def of(cls, plan: Plan) -> Memory:
        """What a plan says of it.

        Raises:
            ValueError: what a step needs could not be planned.
        """
        if plan.activations is None:
            raise ValueError(f"{plan.model}: {plan.unknown}")
        return cls(plan.weights.bytes, plan.weights.bytes_before, plan.trained, plan.resident, plan.peak)

    @property
    def card(self) -> int:
        """GiB of the smallest usual card that it fits."""
        return next(size for size in CARDS if self.peak <= room(size * 2**30))

    def __str__(self) -> str:
        parts = f"model {gib(self.model)} (bf16: {gib(self.before)})"
        return (
            f"{gib(self.peak)} GiB planned = {parts} + LoRA and optimizer "
            f"{gib(self.resident - self.model)} + a step {gib(self.peak - self.resident)}"
        )


def gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def names() -> list[str]:
    """Of the examples for published models."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def planner(name: str) -> tuple[Planner, Settings]:
    """Of an example, with the configuration in configs/ in place of the hub's."""
    overrides = [f"base_model={HERE / 'configs' / name}"]
    config: Any = examine(HERE / f"{name}.yaml", overrides).config
    return planner_of(config, Target("cuda", (8, 0)))


def plan(name: str) -> Memory:
    """The planned memory of an example."""
    found, settings = planner(name)
    return Memory.of(found.plan(settings))


def table(found: dict[str, Memory], links: bool = True) -> str:
    """Rows of README.md and, without links, of docs/examples.md."""
    lines = [
        "| file | model | bf16 GiB | packed GiB | LoRA, millions | LoRA, optimizer | a step | peak | card |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, memory in sorted(found.items(), key=lambda item: item[1].peak):
        hub = load_config(HERE / f"{name}.yaml").base_model
        file = f"[{name}.yaml]({name}.yaml)" if links else f"`{name}.yaml`"
        cells = [file, f"`{hub}`", gib(memory.before), gib(memory.model), f"{memory.trained / 1e6:,.0f}"]
        cells += [gib(memory.resident - memory.model), gib(memory.peak - memory.resident)]
        lines.append(f"| {' | '.join([*cells, f'**{gib(memory.peak)}**', f'{memory.card} GB'])} |")
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
    found = {name: plan(name) for name in names()}
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
