"""What the pages say to type or to write can be typed and written: commands parse, Python compiles and names
what exists, configurations are valid, files and links exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import fourfold
from fourfold.cli.main import COMMANDS, parse
from fourfold.formats import PackFormat
from fourfold.training.read_config import examine

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "examples" / "README.md"])
MINIMAL = {"base_model": "m", "adapter": "qlora", "load_in_4bit": True, "datasets": [{"path": "d.jsonl"}]}


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks in that language; "" for those in none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(text: str) -> list[list[str]]:
    """Arguments of each `fourfold ...` in a text; comments (# or three spaces) and redirections cut off."""
    found = []
    for line in text.splitlines():
        match = re.match(r"(?:#\s+)?fourfold ([a-z]+ ?.*)", line.strip())
        if match and match[1].split()[0] in COMMANDS:
            command = re.split(r"\s{3,}|\s+>\s|\s+#\s", match[1])[0]
            found.append(shlex.split(command))
    return found


def cases(language: str) -> list[object]:
    return [
        pytest.param(text, id=f"{path.relative_to(ROOT)}-{number}")
        for path in PAGES
        for number, text in enumerate(blocks(path, language))
    ]


def test_there_is_something_to_check() -> None:
    assert len(cases("python")) >= 6
    assert len(cases("yaml")) >= 5
    assert sum(len(commands(text)) for page in PAGES for text in blocks(page, "")) >= 30


@pytest.mark.parametrize("path", [*PAGES, *sorted((ROOT / "examples").rglob("*.yaml"))], ids=lambda p: p.name)
def test_commands_parse(path: Path) -> None:
    texts = [path.read_text(encoding="utf-8")] if path.suffix == ".yaml" else blocks(path, "")
    for text in texts:
        for command in commands(text):
            assert parse(command).command == command[0]  # (a wrong argument raises)


@pytest.mark.parametrize("text", cases("python"))
def test_python_names_what_exists(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "fourfold" or node.attr in (*fourfold.__all__, "adapters"), node.attr


@pytest.mark.parametrize("text", cases("yaml"))
def test_configurations_are_valid(text: str, tmp_path: Path) -> None:
    """Whole ones as they are, parts beside the least that a run needs."""
    values = yaml.safe_load(text)
    path = tmp_path / "config.yaml"
    path.write_text(text if "base_model" in values else yaml.safe_dump(MINIMAL | values))
    examined = examine(str(path), [])
    assert not examined.problems, examined.complaint()
    assert examined.config is not None


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name
)
def test_links_and_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http", "mailto:")):
            assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:examples|benchmarks|tests|docs)/[\w./-]+\.(?:py|md|yaml|json|txt))`", text):
        assert (ROOT / name).exists(), name


def test_bits_a_weight() -> None:
    """The table in docs/formats.md, of a matrix of 2048 x 2048."""
    formats = {
        "NF4, double-quantized": PackFormat("nf4", double_quant=True),
        "NF4": PackFormat("nf4"),
        "FP4": PackFormat("fp4"),
        "INT8": PackFormat("int8"),
    }
    from fourfold.experts.shapes import StackShape

    stack = StackShape(experts=1, rows=2048, columns=2048)
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for name, fmt in formats.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert float(row.split("|")[3]) == round(8 * stack.nbytes(fmt) / 2048**2, 2), name
