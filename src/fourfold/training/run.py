"""The run: check, load and pack, train, evaluate, save, report.

Nothing slow happens before ``preflight.check`` has passed. The trainer is TRL's; what is ours is the packing,
the adapters' kernels, and that a result which means nothing is an error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerState, set_seed

import fourfold
from fourfold.errors import ConfigurationError, TrainingError
from fourfold.loading.skeleton import load_language_model
from fourfold.planning.report import Report, make_report
from fourfold.training import collective, processes
from fourfold.training.adapting import put_on
from fourfold.training.callbacks import (
    Curve,
    FiniteGradients,
    FirstStepGradients,
    HeldOut,
    Metrics,
    Progressing,
)
from fourfold.training.evaluate import AnswerLosses, Improvement, answer, evaluate_answers
from fourfold.training.fsdp_keys import recomputes, sharding
from fourfold.training.isolation import refuse_leaks
from fourfold.training.journal import Journal, figures_left, write_reports
from fourfold.training.offload_watch import OffloadWatch
from fourfold.training.offload_watch import warning as offload_warning
from fourfold.training.offloaded import UnchangedFiles, bring_back, loading_there, refuse_unpinnable
from fourfold.training.packing import packing_collator
from fourfold.training.planned import EVERYTHING_ELSE, Memory
from fourfold.training.preflight import MERGED, Checked, check
from fourfold.training.resume import STATE_FILE, first_line, step_of
from fourfold.training.schema import TrainConfig
from fourfold.training.summary import RunResult, write_loss_curve
from fourfold.training.trackers import ended_with_the_run, set_tracker_environment
from fourfold.training.watch import AtTheEnd, EarlyStop, Saved
from fourfold.training.zero_engine import EngineGradients

try:
    import matplotlib.figure  # noqa: F401  (the loss curve, drawn when the run is over)

    from fourfold.training.sharded import ShardedTrainer, load_shares, shard_model
    from fourfold.training.trainer import MoeTrainer, interval, make_collator, trainer_arguments
except ImportError as error:  # TRL, datasets and matplotlib are the extra `train`
    raise ConfigurationError(
        f"Training needs further packages ({error}): pip install 'fourfold[train]'"
    ) from error

SAMPLE_TOKENS = 24
SKIPPED_IN_FP16 = 17
# Held-out answers a batch: without gradients four times what a training step holds is a cautious choice.
EVALUATION_BATCHES = 4


def run(config: TrainConfig, console: Console | None = None) -> RunResult:
    """Train as ``config`` says; leaves adapter, tokenizer, report.html, report.json and loss.png in
    ``output_dir``. A run that breaks once it has begun leaves the reports too.

    Raises:
        ConfigurationError, DataError, AdapterError, UnsupportedExpertsError: the input is wrong; found before
        loading.
        UnquantizedExpertsError: an expert stayed in high precision although nobody asked for that.
        TrainingError: a loss is not finite, or a trainable parameter gets no gradient.
    """
    collective.join(sharding(config) is not None)
    console = console or Console()
    if not processes.is_first():
        console = Console(quiet=True)
    journal = Journal()
    with ended_with_the_run(config), journal.reporting():
        return _run(config, console, journal)


def _run(config: TrainConfig, console: Console, journal: Journal) -> RunResult:
    clock = _Clock(console, journal)
    with clock("checking configuration, data and targets"):
        checked = check(config)
        memory = Memory(config, checked)
        remark = memory.remark()
        journal.begin(config)
    for note in (*checked.notes, *([] if remark is None else [remark])):
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    with clock("loading and packing the model"):
        model, packed = load(config, checked)
        journal.facts["model"] = packed.to_dict()
        away = bring_back(model, config, memory.besides_experts())
    if away is not None:
        journal.facts["offload"] = away.to_dict()
        for line in (str(away), offload_warning(away.to_dict())):
            if line:
                console.print(line, soft_wrap=True, markup=False, highlight=False)
    collate, flatten = make_collator(checked.tokenizer), packing_collator(checked.tokenizer)

    def evaluate(what: str) -> AnswerLosses | None:
        if checked.held_out is None:
            return None
        with clock(f"{what}: {len(checked.held_out.dataset)} held-out answers", "evaluation"):
            size = config.eval_batch_size or config.micro_batch_size * EVALUATION_BATCHES
            packed = (flatten, config.sequence_len) if config.eval_sample_packing else None
            return evaluate_answers(model, checked.held_out.dataset, collate, size, packed)

    # A run that goes on with an adapter (lora_model_dir) is compared with what that one gave.
    # So is one whose model is sharded: that is done once, with adapters, which begin as nothing.
    wanted = sharding(config)
    begins_with = config.lora_model_dir is not None or wanted is not None
    lost = None
    if begins_with:
        model = with_adapters(model, config, checked)
    if wanted is not None:
        with clock("sharding the model"):
            model = shard_model(model, wanted)
    before = evaluate("before training")
    with clock("a sample answer", "samples"):
        answer_before = answer(model, checked.tokenizer, checked.sample.ids, SAMPLE_TOKENS)
    if not begins_with:
        model = with_adapters(model, config, checked)
    if config.sample_packing or config.eval_sample_packing:
        refuse_leaks(model)  # with the layers and kernels that are really there
    if config.peft_init_lora_weights == "loftq" and checked.checkpoint is None:
        with clock("fitting adapters to what packing lost"):
            lost = fourfold.loftq_init(model)
    curve = journal.curve
    if before is not None:
        curve.held_out.append((0, before.mean))
    if checked.checkpoint is not None:
        earlier_losses(checked.checkpoint, curve)
        journal.go_on_from(Path(checked.checkpoint), step_of(checked.checkpoint))
    batch_of = flatten if config.sample_packing else collate
    trainer = make_trainer(model, config, checked, batch_of, curve, console, evaluate)
    trainer.add_callback(journal)
    trainer.beside = journal.keep
    if away is not None:
        trainer.add_callback(OffloadWatch(away, journal.facts["offload"], curve))
    output, after = Path(config.output_dir), None

    def at_the_end() -> None:
        nonlocal after
        with clock("saving", announce=False):  # at once: whatever fails from here on, the adapter is safe
            save(model, checked.tokenizer, output)
        after = evaluate("after training")
        if after is not None:
            curve.held_out.append((trainer.state.global_step, after.mean))
            trainer.log({"eval_loss": after.mean})

    # Before the trackers' callbacks: MLflow's closes its run when training ends.
    trainer.callback_handler.callbacks.insert(0, AtTheEnd(at_the_end))
    with clock("training", "training (evaluations and checkpoints included)", announce=False):
        if checked.over and checked.checkpoint is not None:
            take_over(trainer, checked.checkpoint)
            at_the_end()
        else:
            train(trainer, checked.checkpoint, memory.advice)
    with clock("a sample answer", "samples"):
        answer_after = answer(model, checked.tokenizer, checked.sample.ids, SAMPLE_TOKENS)
    facts = _facts(model, config, checked)
    if lost is not None:
        facts["adapters"]["loftq"] = lost.to_dict()["roles"]
    result = RunResult(
        **facts,
        offload=journal.facts.get("offload"),
        packed=packed.to_dict(),
        steps=trainer.state.global_step,
        before=before,
        after=after,
        improvement=None if before is None or after is None else Improvement.between(before, after),
        curve=curve,
        sample={
            "prompt": checked.sample.question,
            "reference": checked.sample.reference,
            "before": answer_before,
            "after": answer_after,
        },
        seconds=clock.seconds,
        journal=journal.to_dict() | (figures_left(output) if checked.over else {}),
    )
    if processes.is_first():
        with writing(output):
            write_reports(result.to_dict(), output)
            write_loss_curve(result, output / "loss.png")
        if config.merge_lora:
            with clock("merging"):
                fourfold.merge(
                    config.base_model, output, output / MERGED, force=checked.checkpoint is not None
                )
            result.merged = str(output / MERGED)
    if config.hub_model_id is not None:
        with clock("uploading"):
            trainer.push_to_hub()
        result.uploaded = str(trainer.hub_model_id)
    if processes.is_first() and (config.merge_lora or config.hub_model_id is not None):
        with writing(output):
            write_reports(result.to_dict(), output)  # again: with what came of these two
    return result


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """The adapter and the tokenizer, written by the first process."""
    with writing(output):
        if processes.is_first() or collective.is_sharded(model):  # (put together by all)
            model.save_pretrained(str(output))
        if processes.is_first():
            tokenizer.save_pretrained(str(output))


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Whatever cannot be written there is said with the remedy.

    Raises:
        TrainingError: the disk is full, say.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"output_dir: {output} cannot be written to ({first_line(error)}). Make room there, and go "
            "on from the last checkpoint with auto_resume_from_checkpoints: true."
        ) from error


def take_over(trainer: MoeTrainer, checkpoint: str) -> None:
    """The adapters of a run that had only its end to do when it was stopped."""
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))


def earlier_losses(checkpoint: str, curve: Curve) -> None:
    """The losses of a run up to the checkpoint that it goes on from."""
    history = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE)).log_history
    for name, losses in (("loss", curve.train), ("eval_loss", curve.held_out)):
        losses += [(entry["step"], float(entry[name])) for entry in history if name in entry]


def load(config: TrainConfig, checked: Checked) -> tuple[Any, Report]:
    """The base model, packed while it loads, and the report of what was packed.

    Raises:
        UnquantizedExpertsError: see ``fourfold.verify``.
    """
    refuse_unpinnable(config)
    set_seed(config.seed)
    if config.tf32 != "auto":  # (transformers' own `enable_tf32` does it once in a process for each value)
        torch.backends.fp32_precision = "tf32" if config.tf32 else "ieee"
    half = torch.bfloat16 if checked.bf16 else torch.float16
    kwargs: dict[str, Any] = {"dtype": half if checked.bf16 or config.fp16 else torch.float32}
    if config.trust_remote_code:
        kwargs["trust_remote_code"] = True
    quantization_config = loading_there(config, checked.quantization_config)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if config.attention is not None:
        kwargs["attn_implementation"] = config.attention
    wanted = sharding(config)
    if wanted is not None:
        model = load_shares(config, wanted, kwargs)
    else:
        if torch.cuda.is_available():
            kwargs["device_map"] = {"": torch.cuda.current_device()}
        model = load_language_model(config.base_model, **kwargs)
    report = fourfold.verify(model) if config.quantized else make_report(model)
    return model, report


def with_adapters(model: Any, config: TrainConfig, checked: Checked) -> Any:
    """The model made ready for training, with fp32 LoRA factors on the checked targets."""
    model = fourfold.prepare(
        model,
        gradient_checkpointing=recomputes(config),
        use_reentrant=config.gradient_checkpointing_kwargs.use_reentrant,
    )
    set_seed(config.seed)  # the factors' initial values depend on the seed alone, not on what ran before
    return put_on(model, config, checked.target_modules, checked.target_parameters)


def make_trainer(
    model: Any,
    config: TrainConfig,
    checked: Checked,
    collate: Any,
    curve: Curve,
    console: Console,
    evaluate: Any,
) -> MoeTrainer:
    """The trainer with our callbacks and without the printing of its own."""
    examples = len(checked.train.rows)
    arguments = trainer_arguments(
        config, bf16=checked.bf16, use_cpu=not torch.cuda.is_available(), examples=examples
    )
    set_tracker_environment(config)
    kind = MoeTrainer if sharding(config) is None else ShardedTrainer
    trainer = kind(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=checked.train.rows,
        processing_class=checked.tokenizer,
        settings=checked.settings,
        loraplus=None
        if config.loraplus_lr_ratio is None
        else (config.loraplus_lr_ratio, config.loraplus_lr_embedding),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Metrics(curve, lambda: trainer.tokens_seen))
    # From 65,536 the scaler of fp16 gets below 1 in so many halvings.
    tolerated = SKIPPED_IN_FP16 if config.fp16 else 0
    if config.deepspeed is None:
        trainer.add_callback(FirstStepGradients())
        trainer.add_callback(FiniteGradients(trainer.name_examples, tolerated))
    else:
        trainer.add_callback(EngineGradients(trainer, tolerated))
    trainer.add_callback(Saved(step_of(checked.checkpoint) if checked.checkpoint else None))
    if config.experts_offload in ("disk", "auto"):
        trainer.add_callback(UnchangedFiles())
    if checked.held_out is not None:
        every = interval(config, "eval", examples)
        trainer.add_callback(HeldOut(lambda: evaluate("during training"), curve, every, trainer.log))
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStop(config.early_stopping_patience))
    trainer.add_callback(Progressing(console, curve))
    return trainer


def train(
    trainer: MoeTrainer, checkpoint: str | None, advice: Callable[[], str] = lambda: EVERYTHING_ELSE
) -> None:
    """Run the trainer; the progress bar is taken down whatever happens.

    Args:
        trainer: of `make_trainer`.
        checkpoint: to resume from.
        advice: what to change where memory runs out.

    Raises:
        TrainingError: a callback or the trainer stopped the run, or memory ran out; the message says what is
            left of it.
    """
    bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Progressing)]
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Out of GPU memory at step {trainer.state.global_step + 1} ({str(error).splitlines()[0]}). "
            f"{advice()} {_what_is_left(trainer, checkpoint)}"
        ) from error
    except TrainingError as error:
        raise TrainingError(f"{error} {_what_is_left(trainer, checkpoint)}") from error
    finally:
        for bar in bars:
            bar.close()


def _what_is_left(trainer: MoeTrainer, checkpoint: str | None) -> str:
    """Which checkpoint a run that was stopped leaves behind.

    One written at the very step that the run stopped after holds what may be to blame, and is not named.
    """
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Saved):
            sound = [saved for saved in callback.steps if saved < step]
            if sound and checkpoint is not None and max(sound) == callback.steps[0]:
                return f"Nothing new was saved; {checkpoint} is as it was."
            kept = [saved for saved in sound if _folder(trainer, saved).is_dir()]  # save_total_limit
            if kept:
                return f"The last checkpoint before that is {_folder(trainer, max(kept))}."
    return "Nothing was saved."


def _folder(trainer: MoeTrainer, step: int) -> Path:
    return Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"


class _Clock:
    """Says what is going on and adds up how long it took."""

    def __init__(self, console: Console, journal: Journal) -> None:
        self.console, self.journal = console, journal
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, what: str, key: str | None = None, announce: bool = True) -> Iterator[None]:
        if announce:
            self.console.print(f"{what} ...", style="dim", soft_wrap=True, highlight=False)
        started = time.perf_counter()
        outer, self.journal.doing = self.journal.doing, what
        try:
            yield
            self.journal.doing = outer
        finally:
            key = key or what
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started


def _facts(model: Any, config: TrainConfig, checked: Checked) -> dict[str, Any]:
    """What there is to say of a run besides its measurements."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held_out = checked.held_out
    return {
        "config": config.model_dump(),
        "adapter": config.output_dir,
        "adapters": {
            "target_modules": checked.target_modules,
            "target_parameters": checked.target_parameters,
            "trainable_parameters": sum(parameter.numel() for parameter in trainable),
            "dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trainable}),
        },
        "data": {
            "train": {**checked.train.to_dict(), "bad_records": len(checked.bad)},
            "held_out": None if held_out is None else held_out.to_dict(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "unused_gpus": max(0, torch.cuda.device_count() - 1),
        "bf16": checked.bf16,
    }
