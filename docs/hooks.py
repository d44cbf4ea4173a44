"""What the site takes from elsewhere when it is built, so that nothing is written down twice: the commands'
own help, the README's measurements, the changelog.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README_PART = ("<!-- performance: begin -->", "<!-- performance: end -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page; puts what belongs there in place of the marks."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    if "<!-- readme: performance -->" in markdown:
        markdown = markdown.replace("<!-- readme: performance -->", performance())
    if "<!-- changelog -->" in markdown:
        markdown = markdown.replace("<!-- changelog -->", for_the_site((ROOT / "CHANGELOG.md").read_text()))
    return markdown


def performance() -> str:
    """The tables of the README."""
    begin, end = README_PART
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(begin)
    part, found, _ = rest.partition(end)
    if not found:
        raise ValueError(f"README.md lacks {begin} or {end}")
    return for_the_site(part.strip())


def for_the_site(text: str) -> str:
    """Links into docs/ lead to pages of the site; files that are none become names."""
    text = re.sub(r"\]\(docs/([\w-]+\.md(?:#[\w-]+)?)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((benchmarks/[^)]+|[\w./-]+\.(?:py|yaml|json))\)", r"\1 (`\2`)", text)


def commands() -> str:
    """A section for each verb, from its own parser."""
    from fourfold.cli.main import COMMANDS, build_parser

    sections = []
    for verb, purpose in COMMANDS.items():
        parser = _parser_of(build_parser([verb]), verb)
        sections += [f"## `fourfold {verb}`", f"{purpose[0].upper()}{purpose[1:]}.", _usage(parser)]
        sections.append(_arguments(parser))
    return "\n\n".join(section for section in sections if section)


def _parser_of(parser: argparse.ArgumentParser, verb: str) -> argparse.ArgumentParser:
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = verbs.choices[verb]
    return found


def _usage(parser: argparse.ArgumentParser) -> str:
    text = " ".join(parser.format_usage().removeprefix("usage: ").split())
    text = text.replace("[-h] [--json] [--debug] ", "").replace("[-h] [--json] [--debug]", "")
    return f"```\n{text.strip()}\n```"


def _arguments(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.dest in ("help", "json", "debug"):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        what = (action.help or "") % {"default": action.default, "prog": parser.prog}
        rows.append(f"| `{name}` | {what.replace('|', chr(92) + '|')} |")
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""
