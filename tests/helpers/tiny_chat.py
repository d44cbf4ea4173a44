"""A tiny random Mixtral with a word-level tokenizer, and conversations it can learn, made in a temporary
folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
COLOURS = ["red", "green", "blue", "white"]
THINGS = ["sky", "grass", "snow", "rose"]
WORDS = [
    "<pad>",
    "<unk>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "what",
    "colour",
    "is",
    "the",
]


def make_tokenizer() -> Any:
    """One token a word; the template puts a newline (no token of its own) after each turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*WORDS, *COLOURS, *THINGS, "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="removed")
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<pad>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def byte_tokenizer(begin: bool = True) -> Any:
    """Every text to ids and back; with a beginning-of-text token, as Llama's and Mistral's have one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if begin:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", len(alphabet))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def conversation(index: int) -> dict[str, Any]:
    """The colour follows from the thing: learnable."""
    thing = index % len(THINGS)
    question = f"what colour is the {THINGS[thing]}" if index % 3 else f"the {THINGS[thing]} is what colour"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"the {THINGS[thing]} is {COLOURS[thing]}"},
        ]
    }


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The word-level tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral, 2 layers of 4 experts, with its tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = MixtralConfig(**tiny_sizes(), num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: no experts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**tiny_sizes())).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def tiny_sizes() -> dict[str, Any]:
    """What both models share."""
    return {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
    }


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and held-out conversations."""
    folder = tmp_path_factory.mktemp("data")
    return (
        write_jsonl(folder / "train.jsonl", [conversation(index) for index in range(48)]),
        write_jsonl(folder / "held-out.jsonl", [conversation(index) for index in range(100, 110)]),
    )


def quiet() -> Any:
    """A console that keeps what is printed."""
    from rich.console import Console

    return Console(file=io.StringIO(), width=100)


Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(moe_folder: Path, data_files: tuple[Path, Path], tmp_path: Path) -> Settings:
    """A sound configuration for the tiny model; keyword arguments replace keys, None drops them."""

    def make(**changes: Any) -> dict[str, Any]:
        train, held_out = data_files
        values: dict[str, Any] = {
            "base_model": str(moe_folder),
            "adapter": "qlora",
            "load_in_4bit": True,
            "lora_target_parameters": "all",
            "lora_r": 8,
            "lora_alpha": 16,
            "datasets": [{"path": str(train), "type": "chat_template"}],
            "test_datasets": [{"path": str(held_out), "type": "chat_template"}],
            "sequence_len": 64,
            "micro_batch_size": 8,
            "max_steps": 12,
            "learning_rate": 0.02,
            "warmup_steps": 1,
            "bf16": False,
            "eval_steps": 6,
            "save_steps": 0,
            "output_dir": str(tmp_path / "out"),
        }
        values.update(changes)
        return {key: value for key, value in values.items() if value is not None}

    return make


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a configuration file."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write
