"""The keys of ``fourfold train``'s YAML file, with axolotl's names and meaning.

Each key does something or is refused; settings that contradict each other are errors, never silently
resolved; a null is the key's default. Keys that are given differently, or not yet, are in ``other_keys.py``;
``read_config.py`` reads a file. Imports neither torch nor transformers: a file is validated in well under a
second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fourfold.training.adapter_keys import AdapterKeys
from fourfold.training.contradictions import ContradictionError, contradictions
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.fsdp_keys import FsdpKeys
from fourfold.training.key_types import (
    BelowOne,
    PathText,
    Share,
    not_bool,
)
from fourfold.training.model_keys import ModelKeys
from fourfold.training.offload_keys import OffloadKeys
from fourfold.training.run_keys import RunKeys
from fourfold.training.templates import TEMPLATES
from fourfold.training.tracker_keys import TrackerKeys
from fourfold.training.zero import DeepSpeedKeys


class TrainConfig(TrackerKeys, FsdpKeys, DeepSpeedKeys, RunKeys, AdapterKeys, OffloadKeys, ModelKeys):
    """A training run. Field names are the YAML keys; see ``load_config``."""

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
    chat_template: Literal[TEMPLATES] = Field(  # type: ignore[valid-type]
        "tokenizer_default",
        description="`tokenizer_default` (the model's own), `tokenizer_default_fallback_chatml`, `chatml`, "
        "`jinja` (chat_template_jinja), or the name of the model's family, which means its own as well",
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
        trackio = self.use_trackio
        if trackio is None:
            trackio = self.trackio_project_name is not None
        asked = {"tensorboard": self.use_tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}
        return [name for name, wanted in asked.items() if wanted]

    @property
    def run_names(self) -> dict[str, str]:
        """Key and name of the run, of each tracker in use that is given one (the trainer has one for all)."""
        names = {
            "wandb_name": ("wandb", self.wandb_name),
            "mlflow_run_name": ("mlflow", self.mlflow_run_name),
            "trackio_run_name": ("trackio", self.trackio_run_name),
        }
        return {key: name for key, (tracker, name) in names.items() if name and tracker in self.trackers}

    @property
    def target_modules(self) -> list[str] | str | None:
        """``lora_target_modules``, or all Linears."""
        return "all-linear" if self.lora_target_linear else self.lora_target_modules
