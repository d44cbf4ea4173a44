"""What a process has to import, and in what order: it may begin anywhere, or without Fourfold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold
from tiny import packed_folder

Config = fourfold.MoeBitsAndBytesConfig


@pytest.mark.parametrize("settings", [{"experts_quant_type": "nf4"}, {"experts_quant_type": "int8"}])
def test_without_fourfold_a_packed_checkpoint_fails(mixtral: Path, tmp_path: Path, settings) -> None:
    folder = packed_folder(mixtral, tmp_path / "packed", **settings)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search("size mismatch|mismatch|ignore_mismatched_sizes", done.stderr)


@pytest.mark.parametrize(
    "module",
    [
        "fourfold.loading.headers",
        "fourfold.loading.converters",
        "fourfold.loading.enable",
        "fourfold.planning.report",
        "fourfold.adapters.wrapper",
        "fourfold.adapters.patch",
    ],
)
def test_modules_can_be_imported_first(module: str) -> None:
    """Importing transformers calls back into this package, which must not need the module being imported."""
    code = (
        f"import {module}, transformers.modeling_utils; from transformers.quantizers import auto; "
        "auto.AUTO_QUANTIZER_MAPPING['fourfold']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_fourfold_is_light() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import fourfold; t = time.perf_counter() - t;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules and 'peft' not in "
        "sys.modules;"
        "print(t)"
    )
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert min(float(d.stdout) for d in done) < 0.1
