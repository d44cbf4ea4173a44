"""Models named by an id on the hub (here: its cache, offline), and large ones of which only the configuration
is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourfold.cli import main

HUB_ID = "someone/tiny-moe"


@pytest.fixture(scope="module")
def hub(moe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub that holds one model, files and all, as links to blobs."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(f for f in moe_folder.iterdir() if f.is_file())):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return cache


def run_offline(hub: Path, *arguments: str) -> dict:
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    code = "import sys; from fourfold.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_on_the_hub(hub: Path, moe_folder: Path, tmp_path: Path) -> None:
    found = run_offline(hub, "inspect", HUB_ID)
    assert found["targets"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    written = run_offline(hub, "quantize", HUB_ID, str(tmp_path / "from-hub"))
    assert written["packed_experts"] == 2
    assert "tokenizer.json" in written["copied"]
    assert main(["quantize", str(moe_folder), str(tmp_path / "from-folder")]) == 0
    names = sorted(p.name for p in (tmp_path / "from-hub").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "from-folder").iterdir())
    for name in names:
        ours, theirs = ((tmp_path / f / name).read_bytes() for f in ("from-hub", "from-folder"))
        if name == "config.json":  # each names the base that it was made of
            ours, theirs = json.loads(ours), json.loads(theirs)
            bases = [config["quantization_config"].pop("base") for config in (ours, theirs)]
            assert [base["name"] for base in bases] == [HUB_ID, str(moe_folder)]
            assert [base["revision"] is None for base in bases] == [False, True]
            assert bases[0]["fingerprint"] == bases[1]["fingerprint"]
        assert ours == theirs, name


def test_inspect_a_model_of_671_billion_parameters(tmp_path: Path) -> None:
    from fourfold.planning.inspect import inspect_model

    architecture = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    started = time.perf_counter()
    found = inspect_model(tmp_path / "config.json")
    assert time.perf_counter() - started < 5  # a quarter of a second where nothing else runs
    assert round(found.total_params / 1e9) == 671
    [group] = found.groups
    assert (group.count, group.num_experts) == (58, 256)
    assert group.bytes["bf16"] == 58 * 256 * 3 * 2048 * 7168 * 2


def test_inspect_imports_neither_peft_nor_bitsandbytes(moe_folder: Path) -> None:
    code = (
        "import sys; from fourfold.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 'peft' in sys.modules or 'bitsandbytes' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "inspect", str(moe_folder)], check=True, capture_output=True)
