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
TOLERANCE = 1e-4  # nats a token, fp32


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


def check(overrides: list[str]) -> list[str]:
    """Load base and adapter afresh and compare with what the training run reported; returns what is wrong."""
    from fourfold.cli.libraries import quiet

    quiet(debug=False)

    import torch

    import fourfold
    from fourfold.adapters.peft_lora import load_adapter
    from fourfold.training.data import load_conversations, tokenize
    from fourfold.training.evaluate import answer, evaluate_answers
    from fourfold.training.generation import load_model
    from fourfold.training.preflight import load_tokenizer
    from fourfold.training.run import SAMPLE_TOKENS
    from fourfold.training.schema import load_config
    from fourfold.training.trainer import make_collator

    config = load_config(CONFIG, overrides)
    report = json.loads((Path(config.output_dir) / "report.json").read_text(encoding="utf-8"))
    losses, sample = report["held_out_loss"], report["sample"]
    tokenizer = load_tokenizer(config.base_model)
    _, held_out = load_conversations(config)
    rows = tokenize(held_out, tokenizer, config.sequence_len, "held-out data").dataset.select(range(COMPARED))
    collate = make_collator(tokenizer)
    failures: list[str] = []

    def expect(what: str, holds: bool, details: str) -> None:
        print(f"{'ok ' if holds else 'NO '} {what}: {details}", flush=True)
        if not holds:
            failures.append(f"{what}: {details}")

    def compare(model: Any, when: str) -> None:
        again = evaluate_answers(model, rows, collate, COMPARED).per_answer
        off = max(abs(a - b) for a, b in zip(again, losses[when]["per_answer"], strict=False))
        expect(f"the reloaded model's loss {when} training", off < TOLERANCE, f"to {off:.1e} nats")

    model = load_model(config.base_model, 4, torch.bfloat16 if report["bf16"] else torch.float32)
    packed = fourfold.verify(model)
    share = packed.bytes / packed.bytes_before
    expect("every expert is packed", not packed.unquantized, f"the model takes {share:.0%} of its bytes")
    compare(model, "before")
    model = load_adapter(model, config.output_dir)
    compare(model, "after")

    prompt = held_out[0].messages[:-1]
    reloaded = answer(model, tokenizer, prompt, SAMPLE_TOKENS)
    expect("the reloaded model answers as the trained one", reloaded == sample["after"], reloaded)
    expect("and not as the base model", reloaded != sample["before"], sample["before"])

    fell, error = losses["improvement"]["mean"], losses["improvement"]["standard_error"]
    details = f"by {fell:.3f} ± {error:.3f} nats a token"
    expect(f"the held-out loss fell by {MIN_FALL} nats", fell >= MIN_FALL, details)
    expect(f"and by {MIN_SIGMAS} standard errors", fell >= MIN_SIGMAS * error, f"by {fell / error:.1f}")
    return failures


if __name__ == "__main__":
    os.chdir(ROOT)  # config.yaml's paths begin there
    sys.exit(main(sys.argv[1:]))
