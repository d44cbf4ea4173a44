"""Keys of the run: batches, steps, the optimizer, number formats, evaluations and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from fourfold.training.key_types import (
    NOT_YET_OPTIMIZERS,
    NOT_YET_SCHEDULERS,
    BelowOne,
    Count,
    Epochs,
    Number,
    Optimizer,
    PathText,
    Positive,
    PositiveFloat,
    Scheduler,
    Share,
    Strategy,
    Strict,
    Text,
    not_bool,
    only,
)

_SHARE = "a whole number of steps, or a fraction of the run"


class Checkpointing(Strict):
    """How activations are recomputed."""

    use_reentrant: bool = Field(False, description="torch's older kind; false is recommended")


class RunKeys(Strict):
    """How it is trained."""

    micro_batch_size: Positive = Field(
        1, description="a positive whole number of examples (of rows, with sample_packing)"
    )
    eval_batch_size: Positive | None = Field(
        None, description="a positive whole number of held-out examples; absent means 4 micro batches"
    )
    gradient_accumulation_steps: Positive = Field(1, description="a positive whole number")
    max_steps: Positive | None = Field(
        None, description="a positive whole number; takes precedence over num_epochs"
    )
    num_epochs: Epochs = Field(1.0, description="a positive number, at most a million")
    learning_rate: PositiveFloat = Field(2e-4, description="a positive number")
    lr_scheduler: Annotated[
        Scheduler, only(get_args(Scheduler), "Choose another lr_scheduler.", NOT_YET_SCHEDULERS)
    ] = Field("cosine", description="the name of a schedule")
    lr_scheduler_kwargs: dict[str, Number | Text] = Field(
        default_factory=dict, description="a mapping of the schedule's own settings, such as {num_cycles: 2}"
    )
    cosine_min_lr_ratio: BelowOne | None = Field(
        None, description="the fraction of learning_rate that lr_scheduler: cosine ends at; absent means 0"
    )
    warmup_steps: Count | None = Field(
        None, description="a whole number, less than the steps of the run; absent means 3 % of them"
    )
    warmup_ratio: BelowOne | None = Field(
        None, description="a fraction of the run's steps, instead of warmup_steps"
    )
    optimizer: Annotated[
        Optimizer, only(get_args(Optimizer), "Choose another optimizer.", NOT_YET_OPTIMIZERS)
    ] = Field("adamw_torch_fused", description="the name of an optimizer")
    weight_decay: Share = Field(0.0, description="a number; 0 for none")
    max_grad_norm: Share = Field(1.0, description="gradients are scaled down to this norm; 0 leaves them")
    adam_beta1: BelowOne | None = Field(None, description="a fraction below 1; absent means 0.9")
    adam_beta2: BelowOne | None = Field(None, description="a fraction below 1; absent means 0.999")
    adam_epsilon: PositiveFloat | None = Field(None, description="a positive number; absent means 1e-8")
    bf16: bool | Literal["auto"] = Field(
        "auto", description="true, false or auto (true where a GPU supports it)"
    )
    fp16: bool = Field(
        False, description="true: compute in fp16 on a GPU, gradients scaled so that none vanishes"
    )
    tf32: bool | Literal["auto"] = Field(
        "auto", description="true or false for products of fp32 on a GPU; auto leaves torch's setting"
    )
    gradient_checkpointing: bool | Literal["offload", "offload_disk"] = Field(
        False, description="true or false; `offload` recomputes as true does, and keeps inputs on the GPU"
    )
    gradient_checkpointing_kwargs: Checkpointing = Field(
        default_factory=lambda: Checkpointing.model_validate({}),
        description="a mapping: {use_reentrant: false}",
    )

    torch_compile: bool | Literal["auto"] = Field(
        False, description="true, false, or auto (true where there is a GPU): compile the model"
    )
    torch_compile_backend: Text | None = Field(
        None, description="a backend of torch.compile; absent means inductor"
    )
    torch_compile_mode: (
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    ) = Field(None, description="a mode of torch.compile")
    neftune_noise_alpha: PositiveFloat | None = Field(
        None,
        description="NEFTune: how much noise the embeddings get while training; absent for none",
    )

    logging_steps: Positive = Field(
        1, description="a positive whole number of steps, no more than the run has"
    )
    eval_steps: Share | None = Field(None, description=f"{_SHARE}; absent means each epoch, 0 never")
    evals_per_epoch: Count | None = Field(
        None, description="a whole number of evaluations in each epoch, instead of eval_steps"
    )
    eval_strategy: Strategy | None = Field(
        None, description="`no`, `epoch` or `steps` (eval_steps); absent follows eval_steps"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="after how many evaluations without a lower loss the run ends; absent for never"
    )
    save_steps: Share | None = Field(None, description=f"{_SHARE}; absent means each epoch, 0 never")
    saves_per_epoch: Count | None = Field(
        None, description="a whole number of checkpoints in each epoch, instead of save_steps"
    )
    save_strategy: Annotated[
        Strategy | None, only(("no", "epoch", "steps"), "Set save_steps.", ("best",))
    ] = Field(None, description="`no`, `epoch` or `steps` (save_steps); absent follows save_steps")
    save_total_limit: Positive | None = Field(
        None, description="a positive whole number of checkpoints to keep, the newest; absent keeps all"
    )
    output_dir: PathText = Field("./model-out", description="the folder for checkpoints and the adapter")
    # numpy, which the trainer seeds as well, takes no more than 32 bits.
    seed: Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(not_bool)] = Field(
        42, description="a whole number below 2**32"
    )
    resume_from_checkpoint: bool | PathText = Field(
        False,
        description="true (the last checkpoint in output_dir), false, or a checkpoint's folder; the settings "
        "that decide batches and adapters must be those it was written with",
    )
    auto_resume_from_checkpoints: bool = Field(
        False, description="true: from the last checkpoint in output_dir, or from the start if there is none"
    )
    merge_lora: bool = Field(
        False, description="true: after the run, write the model with the adapter merged to output_dir/merged"
    )
