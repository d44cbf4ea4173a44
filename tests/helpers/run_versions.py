"""The tests of loading and adapters against each supported transformers: ``make test-versions``.

    python tests/helpers/run_versions.py [VERSION ...] [--write docs/versions.md]

Each version, with what it needs of other libraries, is installed into a folder of its own under
``.venv-versions/``, which goes before the site-packages of the running Python on the import path: torch,
bitsandbytes, PEFT and the rest are the same for all. Prints a matrix; exit status 1 where a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-versions"
NEWEST = "newest"
VERSIONS = ("5.17.0", "5.20.0", "5.21.0", NEWEST)
TESTS = (
    "tests/loading",
    "tests/adapters",
    "tests/experts/test_own_forward.py",
    "tests/planning/test_conformance.py::test_row_passes",
)
SHOWN = ("transformers", "huggingface_hub", "peft", "bitsandbytes", "torch")


@dataclass
class Row:
    """How the tests went under one version."""

    versions: dict[str, str]
    passed: int
    skipped: int
    failed: list[str]
    seconds: float

    @property
    def fine(self) -> bool:
        return not self.failed and self.passed > 0


def install(version: str) -> Path:
    """Install a version into its folder, unless it is there; the newest is looked for each time."""
    folder = FOLDER / version
    done = folder / ".installed"
    if done.is_file() and version != NEWEST:
        return folder
    pins = [
        p for p in (ROOT / "constraints.txt").read_text().splitlines() if not p.startswith("transformers")
    ]
    FOLDER.mkdir(exist_ok=True)
    constraints = FOLDER / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    wanted = "transformers" if version == NEWEST else f"transformers=={version}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--upgrade"]
    command += ["-c", str(constraints), "--target", str(folder), wanted]
    subprocess.run(command, check=True)
    done.touch()
    return folder


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, (folder, ROOT / "src", ROOT / "tests" / "helpers")))
    return os.environ | {"PYTHONPATH": path}


def versions_of(folder: Path) -> dict[str, str]:
    """Versions as Python finds them on that path; the folder's transformers must be the one."""
    code = (
        "import importlib.metadata as m, json, transformers;"
        f"print(json.dumps([transformers.__file__, {{n: m.version(n) for n in {SHOWN!r}}}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True, check=True
    )
    where, versions = json.loads(done.stdout.splitlines()[-1])
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"transformers comes from {where}, not from {folder}")
    return versions


def run(version: str, tests: tuple[str, ...]) -> Row:
    """Run the tests under one version."""
    folder = install(version)
    versions = versions_of(folder)
    print(f"\ntransformers {versions['transformers']}", flush=True)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *tests]
    subprocess.run(command, cwd=ROOT, env=environment(folder), check=False)
    seconds = time.perf_counter() - start
    if not report.is_file():
        return Row(versions, 0, 0, ["pytest did not finish"], seconds)
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Row(versions, passed, skipped, failed, seconds)


def matrix(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| transformers | huggingface_hub | PEFT | passed | skipped | failed | seconds | |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---|"]
    for row in rows:
        v = row.versions
        lines.append(
            f"| {v['transformers']} | {v['huggingface_hub']} | {v['peft']} | {row.passed} | {row.skipped} | "
            f"{len(row.failed)} | {row.seconds:.0f} | {'ok' if row.fine else 'FAILS'} |"
        )
    return "\n".join(lines)


def document(rows: list[Row]) -> str:
    """The page that `--write` makes."""
    v = rows[-1].versions
    python = sys.version.split()[0]
    failed = [f"- {row.versions['transformers']}: `{name}`" for row in rows for name in row.failed]
    page = [
        "# Supported versions of transformers",
        "",
        f"Tests of loading, adapters, own forwards and conformance "
        f"({', '.join(f'`{test}`' for test in TESTS)}) under each version, "
        f"made by `make test-versions` on {time.strftime('%Y-%m-%d')}; Python {python}, torch {v['torch']}, "
        f"bitsandbytes {v['bitsandbytes']}.",
        "",
        matrix(rows),
    ]
    return "\n".join(page + (["", *failed] if failed else [])) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS))
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--write", type=Path, help="write the matrix into this file")
    arguments = parser.parse_args()
    rows = [run(version, tuple(arguments.tests)) for version in arguments.versions]
    print(f"\n{matrix(rows)}")
    for row in rows:
        for name in row.failed:
            print(f"{row.versions['transformers']}: {name}")
    if arguments.write:
        arguments.write.write_text(document(rows), encoding="utf-8")
    return 0 if all(row.fine for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
