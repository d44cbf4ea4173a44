"""The held-out measure: independent of batching, equal to the plain formula, paired."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.errors import TrainingError
from fourfold.training import evaluate
from fourfold.training.data import tokenize
from fourfold.training.encode import sample_of
from fourfold.training.evaluate import (
    LOGITS,
    AnswerLosses,
    Improvement,
    answer,
    evaluate_answers,
    evaluating,
)
from fourfold.training.packing import packing_collator
from fourfold.training.records import Conversation
from fourfold.training.trainer import make_collator
from tiny_chat import conversation, tiny_sizes


@pytest.fixture(scope="module")
def model(moe_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(moe_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def dataset(tokenizer: Any) -> Any:
    """Answers of several lengths."""
    records = []
    for index in range(7):
        messages = conversation(index)["messages"]
        messages[1]["content"] += " red" * (index * 3 % 5)
        records.append(Conversation(messages, "here"))
    return tokenize(records, tokenizer, 64, "held-out").dataset


def test_equal_to_the_plain_formula(model: Any, dataset: Any, tokenizer: Any) -> None:
    losses = evaluate_answers(model, dataset, make_collator(tokenizer), 3)
    total = count = 0.0
    for row, loss, tokens in zip(dataset, losses.per_answer, losses.tokens, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            expected = model(input_ids=ids, labels=labels).loss.item()  # transformers' own, shifted inside
        assert loss == pytest.approx(expected, abs=2e-6)
        assert tokens == sum(label != -100 for label in row["labels"])
        total, count = total + expected * tokens, count + tokens
    assert losses.mean == pytest.approx(total / count, abs=2e-6)
    assert len({round(loss, 3) for loss in losses.per_answer}) > 3  # the rows do differ


@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_made_a_few_at_a_time(
    model: Any, dataset: Any, tokenizer: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses, from layers that are computed once; no tensor of all positions times all words."""
    rows = (packing_collator(tokenizer), 256) if packed else None
    runs = []
    for most in (LOGITS, 2 * 7 * 32):  # of 32 words
        monkeypatch.setattr(evaluate, "LOGITS", most)
        layers, heads = [], []
        hooks = [
            model.model.layers[0].register_forward_hook(lambda *_, layers=layers: layers.append(1)),
            model.lm_head.register_forward_hook(
                lambda _m, _i, logits, heads=heads: heads.append(logits.numel())
            ),
        ]
        found = evaluate_answers(model, dataset, make_collator(tokenizer), 7, rows)
        for hook in hooks:
            hook.remove()
        assert len(layers) == 1
        runs.append((found, heads))
    (whole, [everything]), (parts, heads) = runs
    assert max(heads) <= 2 * 7 * 32 < everything
    assert sum(heads) == everything
    assert parts.tokens == whole.tokens
    assert parts.per_answer == pytest.approx(whole.per_answer, abs=2e-6)
    assert "forward" not in vars(model.model)


def test_what_a_model_does_to_its_logits_is_done_to_each_part(
    dataset: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cap, say; and another inner model's outputs are not taken for it."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    capped = Gemma2Config(**tiny_sizes(), head_dim=16, final_logit_softcapping=0.5)
    model = AutoModelForCausalLM.from_config(capped, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    whole = evaluate_answers(model, dataset, make_collator(tokenizer), 3)
    monkeypatch.setattr(evaluate, "LOGITS", 96)
    parts = evaluate_answers(model, dataset, make_collator(tokenizer), 3)
    assert parts.per_answer == pytest.approx(whole.per_answer, abs=2e-6)
    model.config.final_logit_softcapping = None
    assert evaluate_answers(model, dataset, make_collator(tokenizer), 3).mean > whole.mean + 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
def test_independent_of_the_batch_size(model: Any, dataset: Any, tokenizer: Any, batch_size: int) -> None:
    reference = evaluate_answers(model, dataset, make_collator(tokenizer), 3)
    other = evaluate_answers(model, dataset, make_collator(tokenizer), batch_size)
    assert other.tokens == reference.tokens
    assert other.per_answer == pytest.approx(reference.per_answer, abs=2e-6)


def test_without_logits_to_keep(
    model: Any, dataset: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = evaluate_answers(model, dataset, make_collator(tokenizer), 3)
    monkeypatch.setattr("fourfold.training.evaluate._takes_positions", lambda _: False)
    other = evaluate_answers(model, dataset, make_collator(tokenizer), 3)
    assert other.per_answer == pytest.approx(reference.per_answer, abs=2e-6)


def test_modes_and_gradients_are_restored(model: Any) -> None:
    model.train()
    model.lm_head.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    model.eval()


def test_a_loss_that_is_not_finite_is_an_error(
    model: Any, dataset: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.lm_head.weight, "data", torch.full((32, 64), math.nan))
    with pytest.raises(TrainingError, match=r"held-out row \d is nan"):
        evaluate_answers(model, dataset, make_collator(tokenizer), 3)


def test_standard_error_of_equal_weights_is_the_textbook_one() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    losses = AnswerLosses(values, [5, 5, 5, 5])
    assert losses.mean == pytest.approx(3.5)
    assert losses.standard_error == pytest.approx(torch.tensor(values).std().item() / 2)


def test_improvement_is_paired_and_weighted() -> None:
    before = AnswerLosses([1.0, 5.0, 9.0], [1, 1, 2])
    after = AnswerLosses([0.5, 4.5, 8.5], [1, 1, 2])
    fell = Improvement.between(before, after)
    assert fell.mean == pytest.approx(0.5)
    assert fell.standard_error == pytest.approx(0.0, abs=1e-12)  # each fell alike, however far apart they lie
    assert before.standard_error > 1
    with pytest.raises(ValueError, match="different answers"):
        Improvement.between(before, AnswerLosses([0.5, 4.5, 8.5], [1, 2, 2]))


def test_a_single_answer_has_no_standard_error() -> None:
    assert AnswerLosses([1.0], [3]).standard_error == math.inf


def test_an_answer_is_greedy_and_repeatable(model: Any, tokenizer: Any) -> None:
    sample = sample_of(Conversation(conversation(0)["messages"], "here"), tokenizer)
    assert (sample.question, sample.reference) == tuple(m["content"] for m in conversation(0)["messages"])
    first = answer(model, tokenizer, sample.ids, 6)
    torch.manual_seed(99)
    assert answer(model, tokenizer, sample.ids, 6) == first
