"""The documentation as a site: built without a warning, complete, and read without a network."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold
from fourfold.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """`make docs`, of the tree at ``root``."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "PYTHONPATH": os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, (
        f"{done.stderr}\n(the packages are the extra `docs`: pip install -e '.[dev]')"
    )
    assert "WARNING" not in done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in site.glob("*.html")} == pages | {"404"}
    for page in pages - {"index"}:
        assert f'href="{page}.html"' in (site / "index.html").read_text(), f"{page} is not in the navigation"


def test_nothing_is_fetched_when_a_page_is_read(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe|link|source)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]+\"")
    for path in site.rglob("*.html"):
        assert loads.findall(path.read_text()) == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:@import\s+|url\(\s*)['\"]?(?:https?:)?//", path.read_text()), path.name


def test_every_public_name_is_explained(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in set(fourfold.__all__) - {"__version__", "errors"}:
        where = fourfold._WHERE[name]
        assert f'id="{where}.{name}"' in text, f"{name} is missing from docs/api.md"
    for name, cls in inspect.getmembers(fourfold.errors, inspect.isclass):
        if cls.__module__ == "fourfold.errors":
            assert f'id="fourfold.errors.{name}"' in text


def test_every_command_is_there_with_its_arguments(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "commands.html").read_text())
    assert all(f"fourfold {verb}" in text for verb in COMMANDS)
    assert "--experts-blocksize" in text
    assert "key=value" in text
    assert "<!--" not in text


def test_measurements_and_changes_come_from_where_they_are_kept(site: Path) -> None:
    text = (site / "performance.html").read_text()
    assert "<table>" in text
    assert "benchmarks/results/step.json" in text
    assert "Unreleased" in (site / "changes.html").read_text()


@pytest.mark.parametrize(
    ("page", "addition", "said"),
    [
        ("index.md", "[x](no-such-page.md)", "no-such-page.md"),
        ("index.md", "[x](formats.md#no-such-heading)", "no-such-heading"),
        ("api.md", "\n::: fourfold.no_such_name\n", "no_such_name"),
    ],
    ids=["page", "heading", "name"],
)
def test_what_leads_nowhere_is_a_failure(tmp_path: Path, page: str, addition: str, said: str) -> None:
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "src").symlink_to(ROOT / "src")
    with (tmp_path / "docs" / page).open("a") as file:
        file.write(f"\n{addition}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert said in done.stderr
