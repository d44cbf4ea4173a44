"""Everything that can be found wrong with a run before a weight is read.

In order of cost: paths, the data's rows, the tokenizer and its template, then the model's skeleton on the
meta device with its LoRA targets. A run that passes this has only the machine's limits left to meet.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import ConfigurationError, NoExpertsError
from fourfold.loading.paths import is_meant_as_path
from fourfold.training.data import Conversation, Messages, Tokenized, load_conversations, tokenize
from fourfold.training.schema import TrainConfig

BNB_OPTIMIZERS = ("8bit", "paged_", "lion_")


@dataclass
class Checked:
    """What the checks have made on the way, and a run goes on with.

    Attributes:
        tokenizer: the base model's.
        train: tokenized training conversations.
        held_out: tokenized held-out conversations, if any.
        sample: the turns before one answer, to show before and after; held out if anything is.
        reference: the answer in the data.
        quantization_config: for ``from_pretrained``; None where nothing is to be quantized or the checkpoint
        is packed.
        target_modules: LoRA targets among the modules.
        target_parameters: LoRA targets among the parameters (experts).
        bf16: whether to compute in bf16.
        checkpoint: the checkpoint to resume from.
    """

    tokenizer: Any
    train: Tokenized
    held_out: Tokenized | None
    sample: Messages
    reference: str
    quantization_config: Any
    target_modules: list[str]
    target_parameters: list[str]
    bf16: bool
    checkpoint: str | None


def check(config: TrainConfig) -> Checked:
    """Check everything short of loading the model.

    Raises:
        FourfoldError: what is wrong, where, and how to mend it.
    """
    check_model_folder(config.base_model)
    checkpoint = find_checkpoint(config)
    check_writable(Path(config.output_dir))
    train, held_out = load_conversations(config)
    check_device(config)
    tokenizer = load_tokenizer(config.base_model)
    tokenized = tokenize(train, tokenizer, config.sequence_len, "datasets")
    tokenized_held_out = (
        tokenize(held_out, tokenizer, config.sequence_len, "held-out data") if held_out else None
    )
    sample, reference = _sample((held_out or train)[0])
    quantization_config = make_quantization_config(config)
    modules, parameters = find_targets(config, quantization_config)
    return Checked(
        tokenizer=tokenizer,
        train=tokenized,
        held_out=tokenized_held_out,
        sample=sample,
        reference=reference,
        quantization_config=quantization_config,
        target_modules=modules,
        target_parameters=parameters,
        bf16=resolve_bf16(config),
        checkpoint=checkpoint,
    )


def check_model_folder(name: str) -> None:
    """A base model that can only be a folder must be one that holds a model."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"base_model: the folder {path} has no config.json, so it holds no model."
            )
        return
    if is_meant_as_path(name):
        raise ConfigurationError(
            f"base_model: there is no folder {name}. Relative paths start at the current directory, "
            f"{Path.cwd()}."
        )


def find_checkpoint(config: TrainConfig) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means."""
    wanted = config.resume_from_checkpoint
    if wanted is False:
        return None
    if wanted is True:
        steps = [
            (int(path.name.removeprefix("checkpoint-")), path)
            for path in Path(config.output_dir).glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdigit() and (path / "trainer_state.json").is_file()
        ]
        if not steps:
            raise ConfigurationError(
                f"resume_from_checkpoint: true, but {config.output_dir} holds no checkpoint. "
                "Set it to false to start anew, or name a checkpoint's folder."
            )
        wanted = str(max(steps)[1])
    state = Path(wanted) / "trainer_state.json"
    if not state.is_file():
        raise ConfigurationError(
            f"resume_from_checkpoint: {wanted} is no checkpoint of a run (it has no trainer_state.json). "
            "Name a folder such as output_dir/checkpoint-20."
        )
    done = int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    if config.max_steps is not None and done >= config.max_steps:
        raise ConfigurationError(
            f"resume_from_checkpoint: {wanted} is at step {done} of {config.max_steps} already: nothing is "
            "left to train. Raise max_steps."
        )
    return wanted


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try to write there: better now than after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"output_dir: cannot write to {folder} ({error.strerror}). Name another."
        ) from None


def check_device(config: TrainConfig) -> None:
    """Settings that need a GPU, without one."""
    if torch.cuda.is_available():
        return
    if any(part in config.optimizer for part in BNB_OPTIMIZERS):
        raise ConfigurationError(
            f"optimizer: {config.optimizer} is bitsandbytes' and needs a GPU, and none is here. Use "
            "adamw_torch."
        )


def resolve_bf16(config: TrainConfig) -> bool:
    """Whether to compute in bf16; ``auto`` means where the GPU has units for it."""
    if config.bf16 == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(config.bf16)


def load_tokenizer(name: str) -> Any:
    """The base model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"base_model: {name} gives no tokenizer ({reason}). It must be a folder with a model and its "
            "tokenizer, or a model's id on the hub (which must be within reach)."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_quantization_config(config: TrainConfig) -> Any:
    """The quantization to apply while loading, or None.

    A checkpoint that is packed already brings its own: settings in the file could not change it and are
    refused.
    """
    import fourfold

    kwargs = config.quantization_kwargs()
    packed = stored_quantization(config.base_model)
    if packed is None:
        if kwargs is None:
            return None
        try:
            return fourfold.MoeBitsAndBytesConfig(**kwargs)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"bnb_config_kwargs: {error}. Mend that setting.") from error
    if packed.get("quant_method") != "fourfold":
        raise ConfigurationError(
            f"base_model: {config.base_model} is quantized already ({packed.get('quant_method')}). "
            "Take the original weights; Fourfold packs them while loading."
        )
    if not config.quantized:
        raise ConfigurationError(
            f"base_model: {config.base_model} is packed already: say so with load_in_4bit or load_in_8bit, "
            "or take the original weights."
        )
    if config.bnb_config_kwargs or config.quantize_moe_experts is False:
        raise ConfigurationError(
            f"bnb_config_kwargs, quantize_moe_experts: {config.base_model} is packed already and these "
            "settings cannot change that. Drop them, or take the original weights."
        )
    return None


def stored_quantization(name: str) -> dict[str, Any] | None:
    """The quantization that a local checkpoint's config.json declares."""
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigurationError(f"{path}: not a model's configuration ({error}).") from None
    return stored if isinstance(stored, dict) else None


def find_targets(config: TrainConfig, quantization_config: Any) -> tuple[list[str], list[str]]:
    """LoRA targets, given or found, checked against the model's skeleton."""
    import fourfold
    from fourfold.adapters.peft_lora import check_targets
    from fourfold.loading.skeleton import build_skeleton

    skeleton = build_skeleton(os.path.expanduser(config.base_model), quantization_config)
    parameters = config.lora_target_parameters
    if parameters is None:
        try:
            parameters = list(fourfold.expert_targets(skeleton))
        except NoExpertsError:
            parameters = []  # a dense model: QLoRA of its Linears
    modules = config.lora_target_modules
    if modules is None:
        modules = attention_projections(skeleton)
        if not modules and not parameters:
            raise ConfigurationError(
                f"lora_target_modules: no attention projection was found in {type(skeleton).__name__}. Name "
                "the modules."
            )
    check_targets(skeleton, modules, parameters)
    return modules, parameters


def attention_projections(model: torch.nn.Module) -> list[str]:
    """Names of the Linears directly inside attention modules: q/k/v/o_proj in most models, MLA's or fused
    ones in others.

    Directly: what lies deeper (a sparse-attention indexer) may lie beside the path of the gradient.
    """
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        inside = parent.rpartition(".")[2].lower()
        if isinstance(module, torch.nn.Linear) and ("attn" in inside or "attention" in inside):
            found.setdefault(leaf)
    return list(found)


def _sample(conversation: Conversation) -> tuple[Messages, str]:
    """The turns before the first answer, and that answer."""
    messages = conversation.messages
    index = next(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
    return messages[:index], messages[index]["content"]
