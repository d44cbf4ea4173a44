"""Keys of axolotl's files that are no fields of ``TrainConfig``: given differently, or not yet. (Those of
several cards, which a file may have and a run refuses, are in ``cards.py``.)

Two tables, one literal each. Results decide which one a key belongs to: a key that could only change speed,
memory or what is shown is *given differently* (accepted, and said); one that changes what is trained is *not
yet* and refused, unless its value is one that switches it off. `fourfold validate`, `fourfold train`,
the JSON Schema and docs/configuration.md all read them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

from fourfold.training.cards import card_problems, given_differently
from fourfold.training.fsdp_keys import FSDP, fsdp_instead, fsdp_problems, is_off
from fourfold.training.yaml_file import Problem, nearest, short
from fourfold.training.zero import DEEPSPEED

_PRODUCTS = "Fourfold's own kernels multiply experts and their LoRA (`fourfold inspect MODEL --ways`)"
_LINEARS = "attention and other Linears run as PEFT and bitsandbytes compute them; the same results"
_LIGER = "the model's own layers are used; the same results"
_LOSS = "the loss is taken in tiles, always: no tensor of [tokens, vocabulary] is ever held"
_LOADED = "loading is always shard by shard, packed as it goes"
_TOKENIZED = "data are read and tokenized in one process; dataset_prepared_path keeps them"
_ATTENTION = "attention is that of transformers: see attn_implementation"
_MEMORY = "it stays on the GPU: the same results, more memory"
_PROCESSES = "torchrun or accelerate launch start the processes, and torch's DDP averages their gradients"
_COMPILED = "torch.compile keeps its own options: the same results"
_PACKED = "with sample_packing the whole training set is packed by best fit, once"
_SHOWN = "tokens a second are always shown and in report.json"

# Key -> what happens instead.
DIFFERENT: dict[str, str] = {
    "plugins": "each plugin's work is done otherwise, or it is refused: see the table of plugins",
    "cut_cross_entropy": _LOSS,
    "chunked_cross_entropy": _LOSS,
    "chunked_cross_entropy_num_chunks": _LOSS,
    "liger_rope": _LIGER,
    "liger_rms_norm": _LIGER,
    "liger_rms_norm_gated": _LIGER,
    "liger_layer_norm": _LIGER,
    "liger_glu_activation": _LIGER,
    "liger_swiglu": _LIGER,
    "liger_cross_entropy": _LOSS,
    "liger_fused_linear_cross_entropy": _LOSS,
    "lora_mlp_kernel": _LINEARS + "; " + _PRODUCTS,
    "lora_qkv_kernel": _LINEARS,
    "lora_o_kernel": _LINEARS,
    "lora_embedding_kernel": _LINEARS,
    "use_kernels": _PRODUCTS,
    "use_scattermoe": _PRODUCTS,
    "use_sonicmoe": _PRODUCTS,
    "experts_implementation": _PRODUCTS,
    "llama4_linearized_experts": "experts are packed in the layout that the model has",
    "model_quantization_config": "a checkpoint in MXFP4 or FP8 is recognised and packed anew",
    "model_quantization_config_kwargs": "a checkpoint in MXFP4 or FP8 is recognised and packed anew",
    "fused_attn_kernel": _ATTENTION,
    "gemma4_hybrid_attn_impl": _ATTENTION + "; sdpa takes heads of any size",
    "large_head_attention": _ATTENTION,
    "flash_attn_d512": _ATTENTION,
    "sdpa_varlen": _ATTENTION,
    "flash_attn_cross_entropy": _LOSS,
    "flash_attn_fuse_mlp": _ATTENTION,
    "torch_compile_options": _COMPILED,
    "activation_offloading": _MEMORY,
    "layer_offloading": _MEMORY,
    "selective_checkpointing": "gradient_checkpointing recomputes whole layers: the same results",
    "ple_cpu_offload": _MEMORY,
    "embeddings_skip_upcast": "embeddings are never upcast",
    "low_cpu_mem_usage": _LOADED,
    "qlora_sharded_model_loading": _LOADED,
    "lora_on_cpu": "adapters are made where the model lies",
    "dataset_num_proc": _TOKENIZED,
    "dataset_processes": _TOKENIZED,
    "dataset_keep_in_memory": _TOKENIZED,
    "num_dataset_shards_to_save": _TOKENIZED,
    "dataloader_num_workers": "batches are made in the process that trains",
    "dataloader_pin_memory": "memory is pinned wherever there is a GPU",
    "dataloader_prefetch_factor": "batches are made in the process that trains",
    "shuffle_merged_datasets": "the order of examples is drawn anew for each epoch, whatever the files' own",
    "remove_unused_columns": "the trainer gets token ids and labels, whatever columns the data have",
    "group_by_length": "examples of similar length always share a batch; their order hangs on seed and epoch",
    "pad_to_sequence_len": "batches are padded to their longest example: the same results, fewer tokens",
    "sample_packing_group_size": _PACKED,
    "sample_packing_bin_size": _PACKED,
    "multipack_real_batches": "the rows of a batch are laid end to end: the same results",
    "batch_flattening": "without sample_packing batches are padded: the same results",
    "eot_tokens": "what the chat template writes after an answer is trained, its end token included",
    "ddp": _PROCESSES,
    "ddp_timeout": _PROCESSES,
    "ddp_bucket_cap_mb": _PROCESSES,
    "ddp_broadcast_buffers": _PROCESSES,
    "ddp_find_unused_parameters": _PROCESSES,
    "save_safetensors": "weights are always saved as safetensors",
    "hf_use_auth_token": "the hub login of this machine is used wherever the hub is asked",
    "merge_method": "`fourfold merge` streams, always",
    "strict": "key=value on the command line may set any key, always",
    "include_tokens_per_second": _SHOWN,
    "include_tkps": _SHOWN,
    "gc_steps": "there is nothing to collect between steps",
    "gc_collect_steps": "there is nothing to collect between steps",
    "torch_empty_cache_steps": "the allocator keeps its cache: the same results",
    "axolotl_config_path": "the file given on the command line is the configuration",
    "gradio_title": "there is no chat page; `fourfold generate` answers a prompt",
    "gradio_share": "there is no chat page; `fourfold generate` answers a prompt",
    "gradio_server_name": "there is no chat page; `fourfold generate` answers a prompt",
    "gradio_server_port": "there is no chat page; `fourfold generate` answers a prompt",
    "gradio_max_new_tokens": "there is no chat page; `fourfold generate` answers a prompt",
    "gradio_temperature": "there is no chat page; `fourfold generate` answers a prompt",
}

# Those whose false asks for something too.
ALSO_FALSE = (
    "shuffle_merged_datasets",
    "group_by_length",
    "remove_unused_columns",
    "dataloader_pin_memory",
    "save_safetensors",
)

# Plugins whose work is done otherwise, by the last part of their names; any other may change results.
PLUGINS: dict[str, str] = {
    "CutCrossEntropyPlugin": _LOSS,
    "LigerPlugin": _LIGER,
    "KernelsPlugin": _PRODUCTS,
}


@dataclass(frozen=True)
class NotYet:
    """A key whose effect is missing.

    Attributes:
        what: what is missing.
        remedy: what to do meanwhile.
        off: values that ask for nothing, beside null.
    """

    what: str
    remedy: str = "Drop the key."
    off: tuple[Any, ...] = (False,)


_CARDS = NotYet(
    "this way to use several GPUs",
    "Drop the key; under `torchrun --nproc_per_node N -m fourfold train` GPUs share the data.",
)
_DEGREE = NotYet(_CARDS.what, _CARDS.remedy, (False, 0, 1))
_PREFERENCE = NotYet("training on preferences or rewards", "Fourfold trains on conversations (datasets).")
_OPTIMIZER = NotYet("this way to train", "Drop the key, or choose another optimizer.")
_CURVE = NotYet("this curve of the learning rate", "Drop the key, or choose another lr_scheduler.")
_HUB = NotYet("this upload to the hub", "Drop the key; hub_model_id uploads the adapter.")
_CODE = NotYet("code of a dataset is never run", "Take its files as JSON or Parquet.")
_PRECISION = NotYet("this number format", "Set bf16: true or false.")
_BEST = NotYet("choosing among checkpoints", "Drop the key; report.json has the loss of each evaluation.")
_PLACES = NotYet("a model spread over devices", "Drop the key; the model lies on one GPU.")
_IMAGES = NotYet("training on images", "Drop the key, and train on text.")
_TOKENS = NotYet("tokens or embeddings added to the model", "Drop the key, or use tokens that it has.")
_TEMPLATE = NotYet("this setting of the chat template", "Write what it says into the conversations.")
_LORA = NotYet("this kind of LoRA", "Drop the key.")
_DATA = NotYet("this way to arrange data", "Prepare the file so, and drop the key.")
_ATTENDING = NotYet("this change to positions or attention", "Drop the key.")
_NAMED = NotYet("taking it from elsewhere than base_model", "Drop the key.")

# Key -> what is missing.
NOT_YET: dict[str, NotYet] = {
    "sample_packing_sequentially": NotYet("packing in the files' order", "Drop it: the longest come first."),
    "curriculum_sampling": _DATA,
    "deepcompile": _CARDS,
    "context_parallel_size": _DEGREE,
    "sequence_parallel_degree": _DEGREE,
    "tensor_parallel_size": _DEGREE,
    "expert_parallel_size": _DEGREE,
    "dp_shard_size": _DEGREE,
    "dp_replicate_size": _DEGREE,
    "heads_k_stride": _CARDS,
    "ring_attn_func": _CARDS,
    "use_ray": _CARDS,
    "device_map": _PLACES,
    "max_memory": _PLACES,
    "gpu_memory_limit": _PLACES,
    "bfloat16": _PRECISION,
    "float16": _PRECISION,
    "float32": _PRECISION,
    "fp8": _PRECISION,
    "fp32_norms": _PRECISION,
    "lora_fan_in_fan_out": _LORA,
    "peft_use_dora": _LORA,
    "peft_layers_to_transform": _LORA,
    "peft_layers_pattern": _LORA,
    "peft_layer_replication": _LORA,
    "peft_trainable_token_indices": _LORA,
    "peft_ensure_weight_tying": _LORA,
    "peft_autocast_adapter_dtype": NotYet("adapters in half precision", "Set it to true.", (True,)),
    "peft": NotYet(
        "settings by PEFT's own names",
        "For loftq_config, write peft_init_lora_weights: loftq; drop others.",
    ),
    "relora": _LORA,
    "gptq": NotYet("a model in GPTQ", "Take the original weights; they are packed while they load."),
    "qat": _LORA,
    "lisa_n_layers": _LORA,
    "unfrozen_parameters": NotYet("training parts of the base model", "Drop the key; LoRA trains adapters."),
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "adam_beta3": _OPTIMIZER,
    "adam_epsilon2": _OPTIMIZER,
    "embedding_lr": _OPTIMIZER,
    "embedding_lr_scale": _OPTIMIZER,
    "lr_groups": _OPTIMIZER,
    "cosine_constant_lr_ratio": _CURVE,
    "lr_div_factor": _CURVE,
    "lr_quadratic_warmup": _CURVE,
    "jagged_restart_steps": _CURVE,
    "batch_size": NotYet("a batch size of all GPUs together", "Set gradient_accumulation_steps."),
    "auto_find_batch_size": NotYet("searching the batch size", "Set micro_batch_size."),
    "eval_sequence_len": NotYet("another length for held-out examples", "Drop it: sequence_len holds."),
    "min_sample_len": _DATA,
    "max_prompt_len": _DATA,
    "pad_to_multiple_of": NotYet("padding to a multiple", "Drop the key.", (False, 1)),
    "shuffle_before_merging_datasets": _DATA,
    "dataset_shard_num": _DATA,
    "dataset_shard_idx": _DATA,
    "dataset_exact_deduplication": _DATA,
    "skip_prepare_dataset": _DATA,
    "pretraining_dataset": NotYet("reading data as they are trained on", "Write datasets, type: completion."),
    "streaming": _DATA,
    "push_dataset_to_hub": _HUB,
    "chat_template_kwargs": NotYet(_TEMPLATE.what, _TEMPLATE.remedy, (False, {})),
    "default_system_message": _TEMPLATE,
    "tokens": NotYet(_TOKENS.what, _TOKENS.remedy, (False, [])),
    "added_tokens_overrides": _TOKENS,
    "fix_untrained_tokens": _TOKENS,
    "resize_token_embeddings_to_32x": _TOKENS,
    "mean_resizing_embeddings": _TOKENS,
    "shrink_embeddings": _TOKENS,
    "processor_type": _IMAGES,
    "processor_kwargs": _IMAGES,
    "image_size": _IMAGES,
    "image_resize_algorithm": _IMAGES,
    "freeze_mm_modules": _IMAGES,
    "tokenizer_config": _NAMED,
    "base_model_config": _NAMED,
    "revision_of_model": _NAMED,
    "overrides_of_model_config": NotYet("changing the model's configuration", "Drop the key.", (False, {})),
    "overrides_of_model_kwargs": NotYet("further arguments for loading", "Drop the key.", (False, {})),
    "tokenizer_use_fast": NotYet("slow tokenizers", "Drop the key.", (True,)),
    "tokenizer_legacy": NotYet("old behaviour of tokenizers", "Drop the key."),
    "tokenizer_use_mistral_common": NotYet("mistral-common's tokenizer", "Drop the key."),
    "xformers_attention": NotYet("this attention", "Set attn_implementation: sdpa."),
    "sage_attention": NotYet("this attention", "Set attn_implementation: sdpa."),
    "scaling_softmax": _ATTENDING,
    "use_pose": _ATTENDING,
    "rope_scaling": _ATTENDING,
    "use_eaft": NotYet("another loss", "Drop the key."),
    "dataloader_drop_last": NotYet("leaving out a last, smaller batch", "Drop the key."),
    "tiled_mlp": NotYet("dense layers in tiles", "Drop the key."),
    "reinit_weights": NotYet("training from random weights", "Drop the key."),
    "trainer_cls": NotYet("another trainer", "Drop the key."),
    "rl": _PREFERENCE,
    "trl": _PREFERENCE,
    "vllm": _PREFERENCE,
    "reward_model": _PREFERENCE,
    "process_reward_model": _PREFERENCE,
    "num_labels": _PREFERENCE,
    "quantization": NotYet("quantizing after the run", "See `fourfold quantize`."),
    "hub_revision": _HUB,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "save_first_step": NotYet("a checkpoint after the first step", "Set save_steps."),
    "save_only_model": NotYet("checkpoints that cannot be resumed", "Set save_total_limit to save space."),
    "loss_watchdog_threshold": NotYet("stopping at a loss", "Drop it: one that is not finite stops the run."),
    "loss_watchdog_patience": NotYet("stopping at a loss", "Drop it: one that is not finite stops the run."),
    "do_causal_lm_eval": NotYet("other measures than the loss", "Drop the key."),
    "do_bench_eval": NotYet("benchmarks during a run", "Drop the key."),
    "generate_samples": NotYet("samples during a run", "Drop it: one answer is shown before and after."),
    "profiler_steps": NotYet("recording a profile", "Drop the key."),
    "use_comet": NotYet("logging to Comet", "See use_tensorboard, use_trackio and wandb_project."),
    "comet_project_name": NotYet("logging to Comet", "See use_tensorboard, use_trackio and wandb_project."),
    "use_otel_metrics": NotYet("this log of metrics", "See use_tensorboard, use_trackio and wandb_project."),
    "hf_mlflow_log_artifacts": NotYet("uploading checkpoints to MLflow", "Drop the key."),
}

# The same for an entry of datasets and test_datasets.
DATASET_NOT_YET: dict[str, NotYet] = {
    "shards": _DATA,
    "shards_idx": _DATA,
    "preprocess_shards": _DATA,
    "conversation": _TEMPLATE,
    "input_transform": _DATA,
    "input_format": _DATA,
    "field_human": _DATA,
    "field_model": _DATA,
    "field_tools": NotYet("tools in conversations", "Write what they say into the turns."),
    "field_thinking": _DATA,
    "template_thinking_key": _DATA,
    "split_thinking": _DATA,
    "message_field_training_detail": NotYet(
        "marks within a turn", "Mark whole turns: message_field_training."
    ),
    "trust_remote_code": _CODE,
}

# Names of other tools, and old ones -> the key to write.
ELSEWHERE: dict[str, str] = {
    "model_name_or_path": "base_model",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "type_of_model": "model_type",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "max_seq_length": "sequence_len",
    "max_length": "sequence_len",
    "evaluation_strategy": "eval_strategy",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "packing": "sample_packing",
    "quant_type": "bnb_config_kwargs",
    "bnb_4bit_quant_type": "bnb_config_kwargs",
    "bnb_4bit_use_double_quant": "bnb_config_kwargs",
    "bnb_4bit_compute_dtype": "bnb_config_kwargs",
}


def take_others(
    values: Mapping[str, Any],
) -> tuple[dict[str, Any], list[Problem], list[tuple[str, str]]]:
    """Take keys of the two tables out of a file's values.

    Returns:
        The values without them; what is not yet; (key, what happens instead) for each that asks for
        something.
    """
    rest: dict[str, Any] = {}
    missing: list[Problem] = []
    instead: list[tuple[str, str]] = list(fsdp_instead(values))
    faulty = any(True for _ in fsdp_problems(values))  # (said below, by line: not again as a contradiction)
    for key, value in values.items():
        if key in NOT_YET:
            missing += _refused(key, value, NOT_YET[key])
        elif (key == DEEPSPEED and is_off(value)) or (key in FSDP and (is_off(value) or faulty)):
            continue
        elif key == "plugins" and value is not None:
            for full_name in value if isinstance(value, list) else [value]:
                text = full_name if isinstance(full_name, str) else brief(full_name)
                name = short(text.rpartition(".")[2])
                if name in PLUGINS:
                    instead.append((key, f"{name}: {PLUGINS[name]}"))
                else:
                    remedy = f"Take it out. {nearest(name, PLUGINS)}"
                    missing.append(Problem(key, f"the plugin {name}", remedy, not_yet=True))
        elif key in DIFFERENT:
            if value is not None and (value is not False or key in ALSO_FALSE):
                instead.append((key, DIFFERENT[key]))
        elif key in ("datasets", "test_datasets") and isinstance(value, list):
            rest[key] = [_entry(f"{key}.{index}", entry, missing) for index, entry in enumerate(value)]
        else:
            rest[key] = value
    missing += card_problems(values)
    instead += given_differently(values)
    return rest, missing, instead


def _entry(place: str, entry: Any, missing: list[Problem]) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    for key in entry:
        if key in DATASET_NOT_YET:
            missing += _refused(f"{place}.{key}", entry[key], DATASET_NOT_YET[key])
    return {key: value for key, value in entry.items() if key not in DATASET_NOT_YET}


def _refused(key: str, value: Any, entry: NotYet) -> Iterator[Problem]:
    # By type too: 1 == True, and `sample_packing: 0` is no false. (0.0 is a 0.)
    kinds = {int: float}
    if value is None or value in ("", [], {}):
        return
    for off in entry.off:
        if value == off and kinds.get(type(value), type(value)) is kinds.get(type(off), type(off)):
            return
    yield Problem(key, entry.what, entry.remedy, not_yet=True)
