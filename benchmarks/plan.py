"""Planned memory against measured: runs of `fourfold train` on a Qwen3-30B-A3B-shaped model.

    python benchmarks/plan.py --out benchmarks/results/plan.json
    python benchmarks/plan.py --only-plan            what is planned, for an H100, on any machine

Random weights, a tokenizer of a hundred words, examples of exactly ``sequence_len`` tokens. Each case is a
run of a few steps by `fourfold.training.run`, from its YAML keys on; the peak is torch's, of the steps alone
(loading, evaluation and samples are not in it), and so is the peak of their forwards with the loss. The
record is written after each case.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import GIB, versions, warm_cache

# Cases by name: keys of the configuration beside those of `BASE`.
CASES: dict[str, dict[str, Any]] = {
    "2 x 4096": {"micro_batch_size": 2, "sequence_len": 4096},
    "2 x 4096, 8-bit AdamW": {
        "micro_batch_size": 2,
        "sequence_len": 4096,
        "optimizer": "adamw_8bit",
    },
    "2 x 4096, attention only": {
        "micro_batch_size": 2,
        "sequence_len": 4096,
        "lora_target_parameters": [],
    },
    "1 x 2048, r=8, no checkpointing": {"lora_r": 8, "gradient_checkpointing": False},
    "1 x 2048, r=64": {"lora_r": 64},
    "4 x 4096, r=8": {"micro_batch_size": 4, "sequence_len": 4096, "lora_r": 8},
    "2 x 2048, 2 micro batches a step": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "2 x 4096, NF4 without double quantization": {
        "micro_batch_size": 2,
        "sequence_len": 4096,
        "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False},
    },
}
BASE: dict[str, Any] = {
    "lora_target_parameters": ["all"],
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "excess_length_strategy": "truncate",
    "sequence_len": 2048,
    "micro_batch_size": 1,
    "gradient_checkpointing": True,
    "optimizer": "adamw_torch_fused",
    "max_steps": 3,
    "warmup_steps": 0,
    "save_steps": 0,
    "bf16": True,
}
EXAMPLES = 16
HOPPER = (9, 0)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words, and a chat template of marks around turns."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    words = {word: index for index, word in enumerate([*marks, *(f"w{i}" for i in range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for turn in messages %}<|{{ turn['role'] }}|> {{ turn['content'] }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    fast.save_pretrained(folder)


def write_data(path: Path, length: int) -> None:
    """Examples a little longer than ``length`` tokens, to be cut to it."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(EXAMPLES):
            answer = " ".join(f"w{i}" for i in torch.randint(0, 100, (length,), generator=generator).tolist())
            turns = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def configuration(case: str, checkpoint: str, folder: Path) -> Any:
    """The configuration of a case, its data written."""
    from fourfold.training.schema import TrainConfig

    values = {**BASE, **CASES[case]}
    data = folder / f"{values['sequence_len']}.jsonl"
    if not data.is_file():
        write_data(data, values["sequence_len"])
    return TrainConfig(
        base_model=checkpoint, datasets=[{"path": str(data)}], output_dir=str(folder / "out"), **values
    )


def planned(config: Any, capability: tuple[int, int]) -> dict[str, Any]:
    """What the plan says; the examples of a batch are of one length here."""
    from fourfold.planning.standins import Target
    from fourfold.training.planned import planner_of

    start = time.perf_counter()
    planner, settings = planner_of(config, Target("cuda", capability))
    plan = planner.plan(replace(settings, padded=False))
    assert plan.activations is not None, plan.unknown
    return {
        "peak_bytes": plan.peak,
        "forward_bytes": plan.resident + max(plan.activations.forward, plan.activations.kept),
        "weights_bytes": plan.weights.bytes,
        "parts": plan.parts(),
        "seconds": time.perf_counter() - start,
    }


def measured(config: Any) -> dict[str, Any]:
    """What torch says of a run's steps."""
    from rich.console import Console

    from fourfold.training import run as run_module
    from fourfold.training.trainer import MoeTrainer

    found: dict[str, Any] = {}
    peaks: list[int] = []
    forwards: list[int] = []
    train, compute_loss = run_module.train, MoeTrainer.compute_loss

    def watched_loss(self: Any, *arguments: Any, **settings: Any) -> Any:
        peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        result = compute_loss(self, *arguments, **settings)
        forwards.append(torch.cuda.max_memory_allocated())
        return result

    def watched_train(*arguments: Any) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        found["adapted_bytes"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(*arguments)
        peaks.append(torch.cuda.max_memory_allocated())
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()

    run_module.train = watched_train
    MoeTrainer.compute_loss = watched_loss
    try:
        result = run_module.run(config, Console(quiet=True))
    finally:
        run_module.train, MoeTrainer.compute_loss = train, compute_loss
    found |= {"peak_bytes": max(*peaks, *forwards), "forward_bytes": max(forwards)}
    found["weights_bytes"] = result.packed["bytes"]
    found["tokens_per_second"] = result.curve.tokens_per_second
    found["losses"] = [loss for _, loss in result.curve.train]
    return found


def line(name: str, case: dict[str, Any]) -> str:
    """A row of the table."""
    plan, real = case["planned"], case.get("measured")
    if real is None:
        return f"| {name} | {plan['peak_bytes'] / GIB:.2f} | {case.get('error', '')} | | | |"
    forward = f"{plan['forward_bytes'] / GIB:.2f} | {real['forward_bytes'] / GIB:.2f}"
    return (
        f"| {name} | {plan['peak_bytes'] / GIB:.2f} | {real['peak_bytes'] / GIB:.2f} | "
        f"{case['error_share']:+.1%} | {forward} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--checkpoint", default=None, help="where it lies or is written")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=140, help="begin no case after so many")
    parser.add_argument("--only-plan", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.json"))
    arguments = parser.parse_args()
    begun = time.perf_counter()
    from checkpoint import qwen3_30b_config, write_checkpoint

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        checkpoint = arguments.checkpoint or str(folder / "model")
        if arguments.only_plan:
            qwen3_30b_config(arguments.layers).save_pretrained(checkpoint)
        else:
            write_checkpoint(Path(checkpoint), arguments.layers, "cuda")
            warm_cache(checkpoint)
        write_tokenizer(Path(checkpoint))
        capability = HOPPER if arguments.only_plan else torch.cuda.get_device_capability()
        record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "layers": arguments.layers, "cases": {}}
        if not arguments.only_plan:
            record["versions"] = versions()
        print("| case | planned GiB | measured GiB | off by | forward, planned | measured |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        for name in arguments.cases:
            if time.perf_counter() - begun > arguments.seconds:
                record["cases"][name] = {"error": "not begun: out of time"}
                continue
            config = configuration(name, checkpoint, folder)
            case = record["cases"][name] = {"keys": {**BASE, **CASES[name]}}
            case["planned"] = planned(config, capability)
            if not arguments.only_plan:
                try:
                    case["measured"] = measured(config)
                    off = case["planned"]["peak_bytes"] / case["measured"]["peak_bytes"] - 1
                    case["error_share"] = off
                except Exception as error:
                    traceback.print_exc()
                    case["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                gc.collect()
                torch.cuda.empty_cache()
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(record, indent=1))
            print(line(name, case), flush=True)
    print(f"{time.perf_counter() - begun:.0f} s")
    if arguments.only_plan:
        return 0
    shares = [case.get("error_share") for case in record["cases"].values()]
    within = all(share is not None and abs(share) <= 0.1 for share in shares)
    print("every case within 10 %" if within else "NOT every case within 10 %")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
