"""The quickstart: make a real Mixture-of-Experts model, train it in 4 bit, reload it, check what it learned.

    python examples/quickstart/run.py                 # under 5 minutes on 2 cores
    python examples/quickstart/run.py max_steps=20    # key=value goes on to `fourfold train`

1. ``make_model.py`` and ``make_data.py``, where their output is not there yet.
2. ``fourfold train examples/quickstart/config.yaml``, as anyone would call it.
3. Base model and adapter are loaded afresh. The loss on some held-out answers must be what the training run
   found, with the adapter and without it; the sample answer must be the trained model's and not the base's.
4. The held-out loss must have fallen by 0.2 nats a token and by three standard errors.

Exit status: 0 done, 1 a check says no, else that of the step that failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = HERE / "config.yaml"
MIN_FALL = 0.2  # nats a token
MIN_SIGMAS = 3
HELD_OUT = 64  # answers: a standard error of a tenth of a nat, and evaluated twice in under a minute
COMPARED = 8  # held-out answers evaluated again after reloading
TOLERANCE = 1e-4  # nats a token on a single answer


def main(overrides: list[str]) -> int:
    """Run the quickstart; returns the exit status."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def step(name: str, action: Callable[[], Any]) -> Any:
        print(f"\n== {name}", flush=True)
        begun = time.perf_counter()
        result = action()
        seconds[name] = time.perf_counter() - begun
        return result

    try:
        step("model", lambda: command([sys.executable, script("make_model.py")]))
        make_data = [sys.executable, script("make_data.py"), "--max-held-out", str(HELD_OUT)]
        step("data", lambda: command(make_data))
        fourfold = shutil.which("fourfold", path=str(Path(sys.executable).parent)) or "fourfold"
        train = [fourfold, "train", script("config.yaml"), *overrides]
        step("train", lambda: command(train))
        failures = step("reload and check", lambda: check(overrides))
    except subprocess.CalledProcessError as error:
        print(f"quickstart: {error.cmd[1]} ended with status {error.returncode}", file=sys.stderr)
        return error.returncode
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n{time.perf_counter() - started:.0f} s in all: {parts}")
    for failure in failures:
        print(f"quickstart: {failure}", file=sys.stderr)
    return 1 if failures else 0


def script(name: str) -> str:
    """A file of the quickstart, as seen from the root of the repository."""
    return str((HERE / name).relative_to(ROOT))


def command(arguments: list[str]) -> None:
    """Run a command from the root of the repository, where config.yaml's paths begin."""
    print("$", Path(arguments[0]).name, *arguments[1:], flush=True)
    subprocess.run(arguments, check=True, cwd=ROOT)


def check(overrides: list[str], config_file: Path = CONFIG) -> list[str]:
    """Load base and adapter afresh and compare with what the training run reported; returns what is wrong.

    The model is loaded as the run loaded it, whatever format ``overrides`` ask for. In fp32 a few answers
    suffice: in other batches than the run's they differ by up to 8e-6 nats. In bf16 that is 1e-3 (a tiny
    random Mixtral), and in the run's own batches nothing: so those are evaluated again, all of them.
    """
    from fourfold.cli.libraries import quiet

    quiet(debug=False)

    from fourfold.adapters.peft_lora import load_adapter
    from fourfold.training import preflight
    from fourfold.training.evaluate import answer, evaluate_answers
    from fourfold.training.read_config import load_config
    from fourfold.training.run import EVALUATION_BATCHES, SAMPLE_TOKENS, load
    from fourfold.training.trainer import make_collator

    config = load_config(config_file, overrides)
    report = json.loads((Path(config.output_dir) / "report.json").read_text(encoding="utf-8"))
    losses, sample = report["held_out_loss"], report["sample"]
    if losses is None:
        return ["nothing was held out, so there is no loss to compare: name test_datasets or val_set_size"]
    # The run is over: a checkpoint it was resumed from is no longer one to resume.
    checked = preflight.check(config.model_copy(update={"resume_from_checkpoint": False}))
    assert checked.held_out is not None
    rows, batch_size = checked.held_out.dataset, config.micro_batch_size * EVALUATION_BATCHES
    if not checked.bf16:
        rows = rows.select(range(min(COMPARED, len(rows))))
    collate = make_collator(checked.tokenizer)
    failures: list[str] = []

    def expect(what: str, holds: bool, details: str) -> None:
        print(f"{'ok ' if holds else 'NO '} {what}: {details}", flush=True)
        if not holds:
            failures.append(f"{what}: {details}")

    def compare(model: Any, when: str) -> None:
        again = evaluate_answers(model, rows, collate, batch_size).per_answer
        reported = losses[when]["per_answer"][: len(rows)]
        off = max(abs(a - b) for a, b in zip(again, reported, strict=True))
        expect(f"the reloaded model's loss {when} training", off < TOLERANCE, f"to {off:.1e} nats")

    model, packed = load(config, checked)
    if config.quantized and config.quantize_moe_experts is not False:
        share = packed.bytes / packed.bytes_before
        expect("every expert is packed", not packed.unquantized, f"the model takes {share:.0%} of its bytes")
    compare(model, "before")
    model = load_adapter(model, config.output_dir)
    compare(model, "after")

    reloaded = answer(model, checked.tokenizer, checked.sample.ids, SAMPLE_TOKENS)
    expect("the reloaded model answers as the trained one", reloaded == sample["after"], reloaded)
    expect("and not as the base model", reloaded != sample["before"], sample["before"])

    fell, error = losses["improvement"]["mean"], losses["improvement"]["standard_error"]
    if error is None:
        return [*failures, "a single held-out answer gives no standard error: hold out more"]
    details = f"by {fell:.3f} ± {error:.3f} nats a token"
    expect(f"the held-out loss fell by {MIN_FALL} nats", fell >= MIN_FALL, details)
    expect(f"and by {MIN_SIGMAS} standard errors", fell >= MIN_SIGMAS * error, details)
    return failures


if __name__ == "__main__":
    os.chdir(ROOT)  # config.yaml's paths begin there
    sys.exit(main(sys.argv[1:]))
