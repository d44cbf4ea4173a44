"""Planned memory against what an H100 measured, and the runs that `benchmarks/plan.py` makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import fourfold

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plan as benchmark
from checkpoint import qwen3_30b_config

BENCHMARKS = Path(benchmark.__file__).parent
STEP = json.loads((BENCHMARKS / "results" / "step.json").read_text())
MEASURED = {result["variant"]: result for result in STEP["results"]}


@pytest.mark.parametrize("variant", ["fourfold", "fourfold-nf4", "fourfold-attention"])
def test_whole_steps_on_an_h100_took_what_is_planned(variant: str) -> None:
    """Loss on the last 256 positions, fp32 AdamW and 8-bit AdamW: see `benchmarks/step.py`."""
    config = fourfold.MoeBitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=variant != "fourfold-nf4"
    )
    for optimizer, measured in (
        ("adamw_torch", MEASURED[variant]["peak_training_bytes"]),
        ("adamw_8bit", MEASURED[variant]["adam_8bit"]["peak_training_bytes"]),
    ):
        plan = fourfold.plan(
            qwen3_30b_config(STEP["layers"]),
            quantization_config=config,
            capability=(9, 0),
            r=16,
            batch=STEP["batch"],
            length=STEP["length"],
            optimizer=optimizer,
            loss_positions=256,
            **({"target_parameters": ()} if variant == "fourfold-attention" else {}),
        )
        # (the allocator rounds sizes up)
        assert plan.weights.bytes == pytest.approx(MEASURED[variant]["resident_bytes"], rel=1e-3)
        assert plan.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(
    not (BENCHMARKS / "results" / "plan.json").is_file(), reason="no record of benchmarks/plan.py yet"
)
def test_runs_on_an_h100_took_what_was_planned() -> None:
    record: dict[str, Any] = json.loads((BENCHMARKS / "results" / "plan.json").read_text())
    for name, case in record["cases"].items():
        off = case["planned"]["peak_bytes"] / case["measured"]["peak_bytes"] - 1
        assert abs(off) <= 0.1, name


def test_examples_of_the_benchmark_are_as_long_as_they_say(tmp_path: Path) -> None:
    from fourfold.training.data import load_records, tokenize

    qwen3_30b_config(1).save_pretrained(tmp_path)
    benchmark.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name in benchmark.CASES:
        config = benchmark.configuration(name, str(tmp_path), tmp_path)
        rows = tokenize(
            load_records(config).train,
            tokenizer,
            config.sequence_len,
            "datasets",
            config.excess_length_strategy,
        )
        assert {len(ids) for ids in rows.dataset["input_ids"]} == {config.sequence_len}
