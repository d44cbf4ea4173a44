"""TRL's ``SFTTrainer`` with the things a run of Fourfold needs of it, each in one small place.

Adapters keep their dtype; the order of examples is a function of seed and epoch, so that a resumed run sees
the same batches; a loss that is not finite stops the run and names the examples; tokens are counted; a
checkpoint counts only once it is whole. The loss is TRL's own, which multiplies with the head in tiles
(4,096 tokens, 32,768 words): no tensor of [tokens, vocabulary] is ever held.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fourfold.adapters.peft_lora import loraplus_optimizer
from fourfold.errors import TrainingError
from fourfold.training import collective, processes
from fourfold.training.encode import IGNORED
from fourfold.training.fsdp_keys import recomputes, sharding
from fourfold.training.packing import lies_within
from fourfold.training.resume import RUN_FILE, Settings, commit, first_line, keep_newest
from fourfold.training.sampler import LengthGroupedSampler, reach_sampler
from fourfold.training.schedules import schedule_arguments
from fourfold.training.schema import TrainConfig
from fourfold.training.zero import trainer_settings

SHOWN_EXAMPLES, SHOWN_TOKENS, SHOWN_TEXT = 8, 24, 40
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


class MoeTrainer(SFTTrainer):
    """``SFTTrainer`` on pretokenized data with grouped lengths, finite losses and counted tokens.

    Args:
        model: with its adapters.
        settings: what a run that resumes this one has to agree with; written into each checkpoint.
        loraplus: LoRA+'s ratio, and its rate for embeddings, if any.
        kwargs: of ``SFTTrainer``.

    Attributes:
        tokens_seen: tokens of training batches so far in this process, padding not counted.
        beside: writes further files into a checkpoint's folder, before it counts; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings | None = None,
        loraplus: tuple[float, float | None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens_seen = 0
        self.beside: Callable[[Path], None] | None = None
        self.run_settings, self.loraplus = settings or {}, loraplus
        self.step_inputs: tuple[int, list[dict[str, Any]]] = (-1, [])
        self.examples = len(kwargs["train_dataset"]) if kwargs.get("train_dataset") is not None else 0
        if processes.count() > 1:
            kwargs["train_dataset"] = with_filler(kwargs["train_dataset"])
        with keep_adapter_dtype(model):
            super().__init__(model=model, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in dataset["input_ids"]][: self.examples]
        batch = self._train_batch_size * self.args.gradient_accumulation_steps * processes.count()
        filler = self.examples if len(dataset) > self.examples else None
        return LengthGroupedSampler(lengths, batch, self.args.seed, filler)

    def get_train_dataloader(self) -> Any:
        return reach_sampler(super().get_train_dataloader())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer asked for; with LoRA+, by PEFT's own grouping of the factors."""
        if self.loraplus is not None and getattr(self, "optimizer", None) is None:
            cls, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = loraplus_optimizer(
                self.model, cls, arguments, *self.loraplus, weight_decay=self.args.weight_decay
            )
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One micro-batch forward and backward.

        Raises:
            TrainingError: the loss is NaN or infinite; names the step and the examples.
        """
        # (without a mask nothing is padding: packed rows lie end to end)
        mask = inputs.get("attention_mask")
        self.tokens_seen += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        step = self.state.global_step
        if self.step_inputs[0] != step:
            self.step_inputs = (step, [])
        self.step_inputs[1].append({key: inputs[key] for key in ("input_ids", "labels") if key in inputs})
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(float(loss)):
            blame = "the last update has ruined the adapters, or a row is damaged"
            if step == 0:
                blame = "a row or a weight of the base model is damaged"
            examples = self.name_examples(self.step_inputs[1][-1:])
            raise TrainingError(
                f"The loss at step {step + 1} is {float(loss)}{examples}: {blame}. Lower "
                "learning_rate, or look for damaged rows in the data."
            )
        return loss

    def name_examples(self, batches: list[dict[str, Any]] | None = None) -> str:
        """Which training examples were in some batches (those of this step), for a message."""
        batches = self.step_inputs[1] if batches is None else batches
        return describe_examples(batches, self.train_dataset, self.examples, self.processing_class)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that counts only once all of it is there; then older ones are deleted.

        Raises:
            TrainingError: it cannot be written.
        """
        output = Path(str(self.args.output_dir))
        folder = output / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if processes.is_first():
                (folder / RUN_FILE).unlink(missing_ok=True)  # of a run that got as far before
            collective.wait()
            super()._save_checkpoint(model, trial)
            collective.wait()
            if processes.is_first():
                if self.beside is not None:
                    self.beside(folder)
                commit(folder, self.run_settings)
                keep_newest(output, limit)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"output_dir: the checkpoint {folder} cannot be written ({first_line(error)}). Make room "
                "there, or name another output_dir."
            ) from error
        finally:
            self.args.save_total_limit = limit


def with_filler(dataset: Any) -> Any:
    """The dataset and one more row: its shortest, without labels, which adds nothing to a loss."""
    from datasets import Dataset, concatenate_datasets

    shortest = min(range(len(dataset)), key=lambda index: len(dataset[index]["input_ids"]))
    row = dict(dataset[shortest])
    row["labels"] = [IGNORED] * len(row["labels"])
    return concatenate_datasets([dataset, Dataset.from_list([row], features=dataset.features)])


def describe_examples(batches: list[dict[str, Any]], dataset: Any, count: int, tokenizer: Any) -> str:
    """The rows of the training data that some batches hold, with their beginnings; found by their tokens."""
    wanted = []
    for batch in batches:
        for ids_T, labels_T in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            trained = tuple(label for label in labels_T if label != IGNORED)
            if trained:
                wanted.append((trained, ids_T))
    found: dict[int, str] = {}
    for index in range(count):
        row = dataset[index]
        ids = list(row["input_ids"])
        for trained, ids_T in wanted:
            same = ids == ids_T[: len(ids)] and trained == tuple(x for x in row["labels"] if x != IGNORED)
            if same or ("seq_lengths" in row and lies_within(ids, ids_T)):
                text = " ".join(str(tokenizer.decode(ids[:SHOWN_TOKENS])).split())
                found[index] = text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + "..."
    if not found:
        return ""
    shown = [f'{index + 1} ("{text}")' for index, text in list(found.items())[:SHOWN_EXAMPLES]]
    more = f" and {len(found) - SHOWN_EXAMPLES} more" if len(found) > SHOWN_EXAMPLES else ""
    what = "packed row" if "seq_lengths" in dataset[0] else "training example"
    return f" on {what}{'s' if len(found) > 1 else ''} {', '.join(shown)}{more}"


@contextmanager
def keep_adapter_dtype(model: nn.Module) -> Iterator[None]:
    """Undo SFTTrainer's cast of trainable parameters to bf16.

    TRL 1.16 casts them in ``SFTTrainer.__init__`` where the model says ``is_loaded_in_4bit`` (or 8bit). Small
    updates are then rounded away, and since PEFT loads adapters in fp32 a resumed run drifts from the one it
    continues (by 1e-3 in the loss). There is no switch; the fp32 values are kept aside, by reference, and put
    back.
    """
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name].to(parameter.device)


def interval(config: TrainConfig, kind: str, examples: int) -> float | None:
    """Every how many steps to evaluate (``kind="eval"``) or save (``"save"``).

    Returns:
        A number of steps, a fraction of the run, 0 for never, None for each epoch.
    """
    strategy, per_epoch = getattr(config, f"{kind}_strategy"), getattr(config, f"{kind}s_per_epoch")
    if strategy == "no" or per_epoch == 0:
        return 0
    if per_epoch is not None:
        return max(1, round(steps_per_epoch(config, examples) / per_epoch))
    steps: float | None = getattr(config, f"{kind}_steps")
    return None if strategy == "epoch" else steps


def steps_per_epoch(config: TrainConfig, examples: int) -> int:
    """Optimizer steps in an epoch of so many examples; the last batch may be smaller."""
    batches = math.ceil(examples / (config.micro_batch_size * processes.count()))
    return math.ceil(batches / config.gradient_accumulation_steps)


def trainer_arguments(config: TrainConfig, *, bf16: bool, use_cpu: bool, examples: int) -> SFTConfig:
    """The trainer's arguments for so many training examples.

    Evaluation is not among them: our own callback does it (see evaluate.py).
    """
    known = {f.name for f in dataclasses.fields(SFTConfig)}
    # transformers renamed the switch on the way to version 6, where the old name ends.
    recompute = recomputes(config)
    checkpointing = "gradient_checkpointing"
    if "activation_checkpointing" in known:
        checkpointing = "activation_checkpointing"
    save_steps = interval(config, "save", examples)
    if save_steps is None:
        saving: dict[str, Any] = {"save_strategy": "epoch"}
    elif save_steps == 0:
        saving = {"save_strategy": "no"}
    else:
        saving = {"save_strategy": "steps", "save_steps": save_steps if save_steps < 1 else int(save_steps)}
    arguments = SFTConfig(
        loss_type="chunked_nll",  # the same loss; no tensor of [tokens, vocabulary] is ever held
        output_dir=config.output_dir,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        **schedule_arguments(config),
        # A value below 1 is a share of all steps. `constant` has no warm-up.
        warmup_steps=_warmup(config),
        optim=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        **{key: getattr(config, key) for key in ADAM if getattr(config, key) is not None},
        save_total_limit=config.save_total_limit,
        bf16=bf16,
        fp16=config.fp16,
        **_compilation(config, use_cpu),
        neftune_noise_alpha=config.neftune_noise_alpha,
        # Each adapter takes part in each step (FirstStepGradients looks at it), so that DDP need not search.
        ddp_find_unused_parameters=False,
        use_cpu=use_cpu and config.deepspeed is None,  # (on what it calls a CPU, accelerate takes none)
        deepspeed=trainer_settings(config),
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # it would replace NaN by the mean of earlier losses
        eval_strategy="no",
        seed=config.seed,
        report_to=config.trackers or "none",
        **({"project": config.trackio_project_name} if config.trackio_project_name else {}),
        **_upload(config),
        run_name=next(iter(config.run_names.values()), None),
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=not use_cpu,
        max_length=None,  # truncated, and counted, in data.py
        shuffle_dataset=False,
        router_aux_loss_coef=config.router_aux_loss_coef or 0.0,  # (None would mean the model's own)
        **{
            checkpointing: recompute,
            f"{checkpointing}_kwargs": (
                {"use_reentrant": config.gradient_checkpointing_kwargs.use_reentrant} if recompute else None
            ),
        },
        **saving,
    )
    # One process trains on one card: DataParallel, which more than one visible card would mean, replicates
    # packed weights at each step, and TRL refuses it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _compilation(config: TrainConfig, use_cpu: bool) -> dict[str, Any]:
    auto = not use_cpu and sharding(config) is None
    wanted = auto if config.torch_compile == "auto" else config.torch_compile
    if not wanted:
        return {}
    return {
        "torch_compile": True,
        "torch_compile_backend": config.torch_compile_backend,
        "torch_compile_mode": config.torch_compile_mode,
    }


def _upload(config: TrainConfig) -> dict[str, Any]:
    if config.hub_model_id is None:
        return {}
    return {
        "push_to_hub": True,
        "hub_model_id": config.hub_model_id,
        "hub_strategy": config.hub_strategy or "every_save",
        "hub_private_repo": True,
    }


def _warmup(config: TrainConfig) -> float:
    if config.lr_scheduler == "constant":
        return 0
    if config.warmup_ratio is not None:
        return config.warmup_ratio
    return 0.03 if config.warmup_steps is None else config.warmup_steps


def make_collator(tokenizer: Any) -> DataCollatorForLanguageModeling:
    """Right-padded batches of ``input_ids``, ``attention_mask`` and ``labels`` (-100 on padding)."""
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
