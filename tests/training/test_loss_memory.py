"""The loss never holds [tokens, vocabulary]; measured on every tensor that a training step makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fourfold.training import run as run_module
from fourfold.training.run import run
from fourfold.training.schema import TrainConfig
from tiny_chat import Settings, make_tokenizer, quiet

VOCABULARY, TOKENS = 50_000, 1000
TILE = 4096 * 32768  # of logits, at most, whatever the batch and the vocabulary


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_of_all_tokens_times_all_words(
    settings: Settings, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tiny_chat import conversation, tiny_sizes, write_jsonl

    sizes = {**tiny_sizes(), "vocab_size": VOCABULARY, "hidden_size": 64, "max_position_embeddings": 1024}
    folder = tmp_path / "wide"
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    long = conversation(0)
    long["messages"][1]["content"] = " ".join(["the sky is blue"] * (TOKENS // 4))
    data = write_jsonl(tmp_path / "long.jsonl", [long] * 4)
    seen: list[int] = []
    plain = run_module.MoeTrainer.training_step

    def measured(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with Largest() as largest:
            loss = plain(self, *args, **kwargs)
        seen.append(largest.elements)
        return loss

    monkeypatch.setattr(run_module.MoeTrainer, "training_step", measured)
    changes: dict[str, Any] = {
        "base_model": str(folder),
        "datasets": [{"path": str(data)}],
        "test_datasets": None,
    }
    changes |= {
        "sequence_len": 1024,
        "micro_batch_size": 4,
        "max_steps": 1,
        "eval_steps": 0,
        "warmup_steps": 0,
    }
    run(TrainConfig(**settings(**changes)), quiet())
    assert len(seen) == 1
    # Four examples of 1,000 tokens and more; the head alone is 50,000 x 64.
    assert VOCABULARY * 64 <= max(seen) <= TILE < 0.7 * 4 * TOKENS * VOCABULARY
