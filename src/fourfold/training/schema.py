"""The keys of ``fourfold train``'s YAML file, with axolotl's names and meaning.

Each key does something or is refused; settings that contradict each other are errors, never silently
resolved; a null is the key's default. Keys that are given differently, or not yet, are in ``other_keys.py``;
``read_config.py`` reads a file. Imports neither torch nor transformers: a file is validated in well under a
second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fourfold.training.contradictions import ContradictionError, contradictions
from fourfold.training.dataset_keys import DatasetConfig, Template
from fourfold.training.key_types import (
    Attention,
    BelowOne,
    Count,
    Names,
    NamesOrPattern,
    OneOrMore,
    Optimizer,
    PathText,
    Positive,
    PositiveFloat,
    Ranks,
    Scheduler,
    Share,
    Strategy,
    Strict,
    Text,
    false_is_none,
    not_bool,
    only,
    refuse_yet,
)

_SHARE = "a whole number of steps, or a fraction of the run"


class SpecialTokens(Strict):
    """Tokens with a meaning of their own; each must be in the model's vocabulary."""

    bos_token: Text | None = Field(None, description="begins a text")
    eos_token: Text | None = Field(None, description="ends a text or turn")
    pad_token: Text | None = Field(None, description="fills batches")
    unk_token: Text | None = Field(None, description="stands for what is unknown")
    additional_special_tokens: Names | None = Field(None, description="further ones, a list")


class Checkpointing(Strict):
    """How activations are recomputed."""

    use_reentrant: bool = Field(False, description="torch's older kind; false is recommended")


class TrainConfig(Strict):
    """A training run. Field names are the YAML keys; see ``load_config``."""

    base_model: PathText = Field(description="a folder, or a model's id on the hub")
    model_type: Annotated[
        Literal["AutoModelForCausalLM"], only(("AutoModelForCausalLM",), "Drop it: it is read off the model.")
    ] = Field("AutoModelForCausalLM", description="`AutoModelForCausalLM`: what config.json names")
    tokenizer_type: Annotated[
        Literal["AutoTokenizer"], only(("AutoTokenizer",), "Drop it: it is read off the model.")
    ] = Field("AutoTokenizer", description="`AutoTokenizer`: what the tokenizer's files name")
    special_tokens: SpecialTokens | None = Field(
        None, description="a mapping such as {pad_token: ...}, of tokens that the vocabulary has"
    )
    attn_implementation: Annotated[
        Attention | None,
        refuse_yet(
            lambda value: isinstance(value, str) and "/" in value,
            "kernels from the hub",
            "Take sdpa, or an installed flash_attention_2.",
        ),
    ] = Field(None, description="the name of an attention; absent means what transformers chooses")
    flash_attention: bool = Field(False, description="true: as attn_implementation: flash_attention_2")
    sdp_attention: bool = Field(False, description="true: as attn_implementation: sdpa")
    flex_attention: bool = Field(False, description="true: as attn_implementation: flex_attention")
    eager_attention: bool = Field(False, description="true: as attn_implementation: eager")
    adapter: Literal["qlora", "lora"] = Field(description="`qlora` (with load_in_4bit) or `lora`")
    load_in_4bit: bool = Field(False, description="true or false")
    load_in_8bit: bool = Field(False, description="true or false")
    quantize_moe_experts: bool | None = Field(
        None, description="true or false; absent means true wherever load_in_4bit or load_in_8bit is"
    )
    bnb_config_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="a mapping of quantization settings"
    )

    lora_r: Positive = Field(8, description="a positive whole number")
    lora_alpha: Positive = Field(16, description="a positive whole number")
    lora_dropout: BelowOne = Field(
        0.0, description="a fraction below 1, on lora_target_modules; experts take none"
    )
    lora_target_modules: NamesOrPattern | None = Field(
        None,
        description="a list of module names, or a regular expression of whole names; absent means the "
        "attention projections, [] none",
    )
    lora_target_linear: bool = Field(
        False, description="true: every Linear but the head, instead of lora_target_modules"
    )
    lora_target_parameters: OneOrMore | None = Field(
        None, description="a list of parameter names; absent means the experts' projections, [] none"
    )
    lora_exclude_modules: NamesOrPattern | None = Field(
        None, description="module names, or a regular expression: not to be wrapped though a target"
    )
    lora_rank_pattern: Ranks | None = Field(
        None, description="a mapping of names (regular expressions) to ranks other than lora_r"
    )
    lora_alpha_pattern: Ranks | None = Field(
        None, description="a mapping of names (regular expressions) to alphas other than lora_alpha"
    )
    peft_use_rslora: bool = Field(False, description="true: updates scaled by alpha / sqrt(r), not alpha / r")

    peft_init_lora_weights: Literal[True, "gaussian", "loftq"] = Field(
        True,
        description="true or `gaussian` (begin with no change), or `loftq` (begin with what packing lost)",
    )

    datasets: list[DatasetConfig] = Field(
        min_length=1, description="a list of entries with `path` and `type`, see below"
    )
    test_datasets: list[DatasetConfig] | None = Field(
        None, min_length=1, description="a list of entries as in datasets, held out for evaluation"
    )
    val_set_size: Share = Field(
        0.0,
        description="a fraction below 1 or a whole number of examples to hold out of datasets; 0 for none",
    )
    chat_template: Template = Field(
        "tokenizer_default",
        description="`tokenizer_default` (the model's own), `tokenizer_default_fallback_chatml`, `chatml` or "
        "`jinja` (chat_template_jinja)",
    )
    chat_template_jinja: PathText | None = Field(
        None, description="a Jinja template, or the path of a file with one; with chat_template: jinja"
    )
    train_on_inputs: bool = Field(
        False, description="true: every turn, or the whole prompt, is trained and not answers alone"
    )
    max_bad_records: BelowOne = Field(
        0.01,
        description="the share of a dataset's records that may be empty or malformed: they are counted, "
        "shown and left out; beyond it, and with 0 always, they are an error",
    )
    dataset_prepared_path: PathText | None = Field(
        None, description="a folder that keeps tokenized data, by what they were made of"
    )
    sequence_len: Annotated[int, Field(ge=8), BeforeValidator(not_bool)] = Field(
        512, description="a whole number of tokens, at least 8; longer ones: see excess_length_strategy"
    )
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop",
        description="`drop`, `truncate` or `raise`: what becomes of examples longer than sequence_len",
    )
    sample_packing: bool = Field(
        False,
        description="true: rows of sequence_len tokens hold several examples, each as if it were alone; "
        "a model in which they would see each other is refused",
    )
    eval_sample_packing: bool | None = Field(
        None, description="true: held-out examples packed too; the same losses, by fewer batches"
    )

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
    num_epochs: PositiveFloat = Field(1.0, description="a positive number")
    learning_rate: PositiveFloat = Field(2e-4, description="a positive number")
    lr_scheduler: Scheduler = Field("cosine", description="the name of a schedule")
    warmup_steps: Count | None = Field(
        None, description="a whole number, less than the steps of the run; absent means 3 % of them"
    )
    warmup_ratio: BelowOne | None = Field(
        None, description="a fraction of the run's steps, instead of warmup_steps"
    )
    optimizer: Optimizer = Field("adamw_torch_fused", description="the name of an optimizer")
    weight_decay: Share = Field(0.0, description="a number; 0 for none")
    max_grad_norm: Share = Field(1.0, description="gradients are scaled down to this norm; 0 leaves them")
    adam_beta1: BelowOne | None = Field(None, description="a fraction below 1; absent means 0.9")
    adam_beta2: BelowOne | None = Field(None, description="a fraction below 1; absent means 0.999")
    adam_epsilon: PositiveFloat | None = Field(None, description="a positive number; absent means 1e-8")
    bf16: bool | Literal["auto"] = Field(
        "auto", description="true, false or auto (true where a GPU supports it)"
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

    use_tensorboard: bool = Field(False, description="true: log to TensorBoard, in output_dir")
    use_wandb: bool | None = Field(None, description="true: log to W&B; absent means where wandb_project is")
    wandb_project: Text | None = Field(None, description="the name of a project")
    wandb_entity: Text | None = Field(None, description="the name of a team or user")
    wandb_name: Text | None = Field(None, description="the name of the run")
    wandb_run_id: Text | None = Field(None, description="the id of a run, to go on with it")
    wandb_mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="`online`, `offline` or `disabled`"
    )
    wandb_watch: Annotated[
        Literal["gradients", "all", "parameters"] | None, BeforeValidator(false_is_none)
    ] = Field(None, description="`gradients`, `parameters` or `all`: histograms to record")
    wandb_log_model: Annotated[Literal["checkpoint", "end"] | None, BeforeValidator(false_is_none)] = Field(
        None, description="`checkpoint` or `end`: adapters to upload, and when"
    )
    use_mlflow: bool | None = Field(
        None, description="true: log to MLflow; absent means where mlflow_tracking_uri or _experiment_name is"
    )
    mlflow_tracking_uri: Text | None = Field(None, description="where the tracking server is")
    mlflow_experiment_name: Text | None = Field(None, description="the name of an experiment")
    mlflow_run_name: Text | None = Field(None, description="the name of the run")

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        found = list(contradictions(self))
        if found:
            raise ContradictionError(found)
        return self

    @property
    def quantized(self) -> bool:
        """Whether the base model is held in 4 or 8 bit."""
        return self.load_in_4bit or self.load_in_8bit

    def quantization_kwargs(self) -> dict[str, Any] | None:
        """Arguments for ``MoeBitsAndBytesConfig``, or None where nothing is to be quantized.

        4 bit means NF4 with double quantization unless ``bnb_config_kwargs`` says otherwise.
        """
        if not self.quantized:
            return None
        settings: dict[str, Any] = {"load_in_8bit": True}
        if self.load_in_4bit:
            settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        if self.quantize_moe_experts is False:
            settings["experts_quant_type"] = "none"
        given = {name: value for name, value in self.bnb_config_kwargs.items() if value is not None}
        return {**settings, **given}  # (a null is no type: bitsandbytes' own default would be FP4)

    @property
    def attention(self) -> str | None:
        """The attention asked for, by whichever of the five keys."""
        named = {
            "flash_attention_2": self.flash_attention,
            "sdpa": self.sdp_attention,
            "flex_attention": self.flex_attention,
            "eager": self.eager_attention,
        }
        return self.attn_implementation or next((name for name, asked in named.items() if asked), None)

    @property
    def trackers(self) -> list[str]:
        """Where losses are logged to, by the trainer's names."""
        wandb, mlflow = self.use_wandb, self.use_mlflow
        if wandb is None:
            wandb = self.wandb_project is not None
        if mlflow is None:
            mlflow = self.mlflow_tracking_uri is not None or self.mlflow_experiment_name is not None
        asked = {"tensorboard": self.use_tensorboard, "wandb": wandb, "mlflow": mlflow}
        return [name for name, wanted in asked.items() if wanted]

    @property
    def target_modules(self) -> list[str] | str | None:
        """``lora_target_modules``, or all Linears."""
        return "all-linear" if self.lora_target_linear else self.lora_target_modules
