"""Everything that can be found wrong with a run before a weight is read.

In order of cost: paths, settings, the data's rows, the model's skeleton on the meta device with its LoRA
targets, then the tokenized data; last of all the output folder is made. A run that passes this has only the
machine's limits left to meet.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import ConfigurationError
from fourfold.loading.paths import ensure_reachable, is_meant_as_path
from fourfold.training import processes
from fourfold.training.adapting import check_adapters, saved_targets
from fourfold.training.contradictions import ignored_within
from fourfold.training.data import Tokenized, load_records
from fourfold.training.encode import Sample
from fourfold.training.isolation import check_isolation
from fourfold.training.launched import check_launched
from fourfold.training.offloaded import loading_there
from fourfold.training.packing import pack
from fourfold.training.prepared import prepare_data, templates_of
from fourfold.training.remarks import beyond, needed_packages
from fourfold.training.resume import (
    check_unchanged,
    find_checkpoint,
    first_line,
    fixed_settings,
    is_over,
    run_settings,
)
from fourfold.training.schema import TrainConfig
from fourfold.training.sharding_checks import check_sharding
from fourfold.training.targets import check_patterns, find_targets
from fourfold.training.tokenizer import choose_template, load_tokenizer
from fourfold.training.trackers import check_trackers
from fourfold.training.zero import check_start

MERGED = "merged"
BNB_OPTIMIZERS = (
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)


@dataclass
class Checked:
    """What the checks have made on the way, and a run goes on with.

    Attributes:
        tokenizer: the base model's.
        train: tokenized training conversations.
        held_out: tokenized held-out conversations, if any.
        sample: one question, to be answered before and after; held out if anything is.
        bad: place and problem of each record that was left out.
        quantization_config: for ``from_pretrained``; None where nothing is to be quantized or the checkpoint
        is packed.
        target_modules: LoRA targets among the modules; text is a regular expression, or "all-linear".
        target_parameters: LoRA targets among the parameters (experts).
        bf16: whether to compute in bf16.
        checkpoint: the checkpoint to resume from.
        settings: what a run that resumes this one has to agree with.
        notes: what there is to know of the settings beside these data, a line each.
        over: whether the run was over at ``checkpoint``, and only its end is to be done again.
    """

    tokenizer: Any
    train: Tokenized
    held_out: Tokenized | None
    sample: Sample
    bad: list[str]
    quantization_config: Any
    target_modules: list[str] | str
    target_parameters: list[str]
    bf16: bool
    checkpoint: str | None
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    over: bool = False


def check(config: TrainConfig) -> Checked:
    """Check everything short of loading the model.

    Raises:
        FourfoldError: what is wrong, where, and how to mend it.
    """
    check_model_folder(config.base_model)
    checkpoint = find_checkpoint(config)
    if checkpoint is not None:
        check_unchanged(checkpoint, fixed_settings(config))
    check_device(config)
    # (where they may be kept already, they are read once it is clear that they are not)
    loaded = None if config.dataset_prepared_path is not None else load_records(config)
    quantization_config = make_quantization_config(config)
    loading_there(config, quantization_config)
    skeleton = make_skeleton(config, quantization_config)
    check_balance(config, skeleton)
    rows = skeleton.get_input_embeddings().weight.shape[0]
    saved = saved_targets(config)
    modules, parameters = find_targets(config, skeleton) if saved is None else saved
    if saved is None:
        check_patterns(config, skeleton, modules, parameters)
    check_sharding(config, skeleton)
    check_adapters(config, skeleton, modules, parameters)
    if config.sample_packing or config.eval_sample_packing:
        check_isolation(config.base_model, config.attention, config.trust_remote_code)
    tokenizer = load_tokenizer(config.base_model, config.special_tokens, config.trust_remote_code)
    templates = templates_of(config, tokenizer)
    tokenizer.chat_template = choose_template(config, tokenizer)
    data = prepare_data(config, tokenizer, templates, loaded)
    tokenized, tokenized_held_out = data.train, data.held_out
    check_vocabulary(tokenizer, rows, (tokenized, tokenized_held_out))
    if config.sample_packing:
        tokenized.packed = pack(tokenized.dataset, config.sequence_len)
    notes = [
        *data.notes,
        *check_steps(config, len(tokenized.rows)),
        *absent_targets(config, modules, saved is None),
    ]
    bf16 = resolve_bf16(config)
    check_launched(config, bf16, os.environ)
    check_start(
        config,
        bf16=bf16,
        has_gpu=torch.cuda.is_available(),
        installed=importlib.util.find_spec("deepspeed") is not None,
        launched=os.environ.get("ACCELERATE_USE_DEEPSPEED", ""),
    )
    settings = run_settings(config, modules, parameters, bf16, tokenized.digest)
    if checkpoint is not None:
        check_unchanged(checkpoint, settings)
    check_hub(config)
    if processes.is_first():
        check_trackers(config)
    check_merge(config, checkpoint)
    if processes.is_first():
        check_writable(Path(config.output_dir))  # last: it makes the folder
    return Checked(
        tokenizer=tokenizer,
        train=tokenized,
        held_out=tokenized_held_out,
        sample=data.sample,
        bad=data.bad,
        quantization_config=quantization_config,
        target_modules=modules,
        target_parameters=parameters,
        bf16=bf16,
        checkpoint=checkpoint,
        settings=settings,
        notes=notes,
        over=checkpoint is not None and is_over(config, checkpoint),
    )


def check_model_folder(name: str) -> None:
    """A base model that can only be a folder must be one that holds a model; another must be within reach."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"base_model: the folder {path} has no config.json, so it holds no model."
            )
        stored_quantization(name)  # reads the file: a broken one is found here, not by the tokenizer
        return
    if is_meant_as_path(name):
        raise ConfigurationError(
            f"base_model: there is no folder {name}. Relative paths start at the current directory, "
            f"{Path.cwd()}."
        )
    try:
        ensure_reachable(name)
    except ConfigurationError as error:
        raise ConfigurationError(f"base_model: {error}") from None


def check_steps(config: TrainConfig, examples: int) -> list[str]:
    """Settings without effect in a run of so few steps, where num_epochs and the data decide how many.

    Returns:
        What there is to know of intervals.
    """
    batches = math.ceil(examples / (config.micro_batch_size * processes.count()))
    per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    steps = config.max_steps or math.ceil(config.num_epochs * per_epoch)
    notes = [f"{key}: {what}" for key, what in beyond(config, steps, per_epoch)]
    if config.max_steps is not None:  # (the rest was looked at with the other contradictions)
        return [note for note in notes if "_per_epoch" in note.partition(":")[0]]
    problems = [str(problem) for _, problem in ignored_within(config, steps)]
    if problems:
        raise ConfigurationError("\n".join(problems))
    return notes


def absent_targets(config: TrainConfig, modules: list[str] | str, chosen: bool) -> list[str]:
    """What is said of usual names among the targets that the model lacks."""
    given = config.lora_target_modules
    absent = [name for name in given if name not in modules] if chosen and isinstance(given, list) else []
    if not absent:
        return []
    return [f"lora_target_modules: the model has no {', '.join(absent)}; trained are {', '.join(modules)}"]


def check_balance(config: TrainConfig, skeleton: Any) -> None:
    """Whether the model has the term that ``router_aux_loss_coef`` weighs."""
    if not config.router_aux_loss_coef:
        return
    text = skeleton.config.get_text_config()
    needed = ("output_router_logits", "num_experts", "num_experts_per_tok")
    missing = [name for name in needed if not hasattr(text, name)]
    if missing:
        raise ConfigurationError(
            f"router_aux_loss_coef: {type(skeleton).__name__} has no balancing term (its configuration lacks "
            f"{missing[0]}). Set it to 0, or drop it."
        )


def check_hub(config: TrainConfig) -> None:
    """Uploading needs a login, and the hub within reach: asked before the run, not after it."""
    if config.hub_model_id is None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # by what is wrong: no token, no network, a hub that says no
        raise ConfigurationError(
            f"hub_model_id: nothing can be uploaded to {config.hub_model_id} ({first_line(error)}). Log in "
            "with `hf auth login`, or drop the key."
        ) from error


def check_merge(config: TrainConfig, checkpoint: str | None) -> None:
    """Merging at the end needs the original weights, and a free place."""
    if not config.merge_lora:
        return
    if packed_already(config.base_model) is not None:
        raise ConfigurationError(
            f"merge_lora: {config.base_model} is packed, and merging adds to the original weights. Set it to "
            "false, and run `fourfold merge` with those."
        )
    merged = Path(config.output_dir) / MERGED
    if merged.exists() and checkpoint is None:
        raise ConfigurationError(
            f"merge_lora: {merged} is there already. Move it away, or name another output_dir."
        )


def check_vocabulary(tokenizer: Any, rows: int, data: Any) -> None:
    """Every token id of the data must have a row in the embeddings; beyond them a GPU reads anything."""
    largest = max(tokenizer.pad_token_id, *(part.largest_id for part in data if part is not None))
    if largest >= rows:
        raise ConfigurationError(
            f"base_model: the tokenizer gives token {largest}, and the model has embeddings for {rows} "
            "tokens only. It is another model's tokenizer, or tokens were added without embeddings."
        )


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
    """Settings that need a package or a GPU that is not there."""
    for key, value, package, distribution in needed_packages(config):
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"{key}: {value} needs the package {package}, which is not installed. pip install "
                f"{distribution}, or change the key."
            )
    if torch.cuda.is_available():
        if config.tf32 is True and torch.cuda.get_device_capability() < (8, 0):
            raise ConfigurationError("tf32: true needs a GPU of capability 8.0. Set it to auto.")
        return
    if (config.attention or "").startswith("flash_attention"):
        raise ConfigurationError(
            f"attn_implementation: {config.attention} needs a GPU, and none is here. Use sdpa."
        )
    if config.fp16:
        raise ConfigurationError("fp16: true needs a GPU, and none is here. Set it to false.")
    if config.optimizer in BNB_OPTIMIZERS:
        raise ConfigurationError(
            f"optimizer: {config.optimizer} is bitsandbytes' and needs a GPU, and none is here. Use "
            "adamw_torch."
        )


def resolve_bf16(config: TrainConfig) -> bool:
    """Whether to compute in bf16; ``auto`` means where the GPU has units for it."""
    if config.fp16:
        return False
    if config.bf16 == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(config.bf16)


def make_quantization_config(config: TrainConfig) -> Any:
    """The quantization to apply while loading, or None.

    A checkpoint that is packed already brings its own: settings in the file could not change it and are
    refused.
    """
    import fourfold

    kwargs = config.quantization_kwargs()
    packed = packed_already(config.base_model)
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
    bits = stored_bits(packed)
    if bits is not None and bits != (4 if config.load_in_4bit else 8):
        wanted = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        raise ConfigurationError(
            f"{wanted}: {config.base_model} is packed in {bits} bit already, and that cannot be changed. Set "
            f"load_in_{bits}bit: true instead (adapter: {'qlora' if bits == 4 else 'lora'}), or take the "
            "original weights."
        )
    if config.bnb_config_kwargs or config.quantize_moe_experts is False:
        raise ConfigurationError(
            f"bnb_config_kwargs, quantize_moe_experts: {config.base_model} is packed already and these "
            "settings cannot change that. Drop them, or take the original weights."
        )
    return None


def packed_already(name: str) -> dict[str, Any] | None:
    """The quantization of a local checkpoint, unless it is one that is read and packed anew (MXFP4, say)."""
    from fourfold.loading.patch import READABLE, stored_method

    stored = stored_quantization(name)
    return None if stored is None or stored_method(stored) in READABLE else stored


def stored_quantization(name: str) -> dict[str, Any] | None:
    """The quantization that a local checkpoint's config.json declares.

    Raises:
        ConfigurationError: the file is no model's configuration.
    """
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: not a model's configuration ({error}).") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path}: not a model's configuration (a {type(config).__name__}).")
    stored = config.get("quantization_config")
    return stored if isinstance(stored, dict) else None


def stored_bits(stored: dict[str, Any]) -> int | None:
    """4 or 8, by a packed checkpoint's Linears, or by its experts where those alone are packed."""
    by_name = {"4bit": 4, "8bit": 8, "nf4": 4, "fp4": 4, "int8": 8}
    return by_name.get(str(stored.get("linears"))) or by_name.get(str(stored.get("experts_quant_type")))


def make_skeleton(config: TrainConfig, quantization_config: Any) -> Any:
    """The model without weights, as loading would prepare it."""
    from fourfold.loading.skeleton import build_skeleton

    return build_skeleton(config.base_model, quantization_config, config.trust_remote_code, causal=True)
