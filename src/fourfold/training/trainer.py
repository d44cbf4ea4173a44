"""TRL's ``SFTTrainer`` with the four things a run of Fourfold needs of it, each in one small place.

Adapters keep their dtype; the order of examples is a function of seed and epoch, so that a resumed run sees
the same batches; a loss that is not finite stops the run; tokens are counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fourfold.errors import TrainingError
from fourfold.training.schema import TrainConfig

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


class LengthGroupedSampler(Sampler[int]):
    """Shuffled indices with examples of similar length side by side; padding costs time.

    Like transformers' sampler of that name (shuffle, cut into runs of 50 batches, sort within each by length,
    longest batch first), but from its own generator seeded with seed and epoch: transformers' draws from
    torch's global one, whose state a resumed run does not share, so that it would see other batches than the
    run it continues.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        run = self.batch_size * 50
        runs = [
            sorted(order[i : i + run], key=lambda index: -self.lengths[index])
            for i in range(0, len(order), run)
        ]
        indices = [index for part in runs for index in part]
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        # Sorted batches would train from long to short: shuffle them, but begin with the longest, so that a
        # run that will exhaust memory does so at once. A smaller last batch stays last.
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []
        longest = max(batches, key=lambda batch: self.lengths[batch[0]], default=[])
        others = [batch for batch in batches if batch is not longest]
        shuffled = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
        return iter([index for batch in (longest, *shuffled, rest) for index in batch])


class MoeTrainer(SFTTrainer):
    """``SFTTrainer`` on pretokenized data with grouped lengths, finite losses and counted tokens.

    Attributes:
        tokens_seen: tokens of training batches so far in this process, padding not counted.
    """

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        self.tokens_seen = 0
        with keep_adapter_dtype(model):
            super().__init__(model=model, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in dataset["input_ids"]]
        batch = self._train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(lengths, batch, self.args.seed)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One micro-batch forward and backward.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        # (without a mask nothing is padding: packed rows lie end to end)
        mask = inputs.get("attention_mask")
        self.tokens_seen += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(float(loss)):
            blame = "the last update has ruined the adapters, or a row is damaged"
            if self.state.global_step == 0:
                blame = "a row or a weight of the base model is damaged"
            raise TrainingError(
                f"The loss at step {self.state.global_step + 1} is {float(loss)}: {blame}. Lower "
                "learning_rate, or look for damaged rows in the data."
            )
        return loss


def run_name(config: TrainConfig) -> str | None:
    """Of the tracker in use (transformers has one name for all)."""
    return config.wandb_name if "wandb" in config.trackers else config.mlflow_run_name


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
    batches = math.ceil(examples / config.micro_batch_size)
    return math.ceil(batches / config.gradient_accumulation_steps)


def trainer_arguments(config: TrainConfig, *, bf16: bool, use_cpu: bool, examples: int) -> SFTConfig:
    """The trainer's arguments for so many training examples.

    Evaluation is not among them: our own callback does it (see evaluate.py).
    """
    known = {f.name for f in dataclasses.fields(SFTConfig)}
    # transformers renamed the switch on the way to version 6, where the old name ends.
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
        output_dir=config.output_dir,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        # A value below 1 is a share of all steps. `constant` has no warm-up.
        warmup_steps=_warmup(config),
        optim=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        **{key: getattr(config, key) for key in ADAM if getattr(config, key) is not None},
        save_total_limit=config.save_total_limit,
        bf16=bf16,
        use_cpu=use_cpu,
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # it would replace NaN by the mean of earlier losses
        eval_strategy="no",
        seed=config.seed,
        report_to=config.trackers or "none",
        run_name=run_name(config),
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=not use_cpu,
        max_length=None,  # truncated, and counted, in data.py
        shuffle_dataset=False,
        # The routers are frozen: a load-balancing term could only bend the hidden states, and the loss shown
        # would no longer be the loss on answers.
        router_aux_loss_coef=0.0,
        **{
            checkpointing: bool(config.gradient_checkpointing),
            f"{checkpointing}_kwargs": (
                {"use_reentrant": config.gradient_checkpointing_kwargs.use_reentrant}
                if config.gradient_checkpointing
                else None
            ),
        },
        **saving,
    )
    # One process trains on one card: DataParallel, which more than one visible card would mean, replicates
    # packed weights at each step, and TRL refuses it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _warmup(config: TrainConfig) -> float:
    if config.lr_scheduler == "constant":
        return 0
    if config.warmup_ratio is not None:
        return config.warmup_ratio
    return 0.03 if config.warmup_steps is None else config.warmup_steps


def make_collator(tokenizer: Any) -> DataCollatorForLanguageModeling:
    """Right-padded batches of ``input_ids``, ``attention_mask`` and ``labels`` (-100 on padding)."""
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
