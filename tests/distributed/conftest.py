"""One job of two ranks runs every check; the tests look at what each found."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks
import sharded_checks


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    ranks.run("sharded_checks", [*sharded_checks.CHECKS, *sharded_checks.CPU_ONLY], folder, 2, 480)
    return folder
