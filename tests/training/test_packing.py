"""Packed examples are trained as if each were alone, and a model in which they would not be is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fourfold.errors import ConfigurationError
from fourfold.training import isolation
from fourfold.training.encode import IGNORED
from fourfold.training.evaluate import evaluate_answers
from fourfold.training.isolation import check_isolation, narrow_model, refuse_leaks
from fourfold.training.packing import fill, pack, packing_collator
from fourfold.training.remarks import remarks
from fourfold.training.schema import TrainConfig
from fourfold.training.trainer import describe_examples, make_collator

LENGTHS = (9, 3, 14, 5, 1, 8)


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    """Every token trained, the first ones too: nothing may predict those."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 22, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": list(ids)} for ids in rows]


def dataset(rows: list[dict[str, list[int]]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def config_of(kind: str) -> Any:
    """Tiny configurations of kinds of attention."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if kind == "mixtral":
        return transformers.MixtralConfig(**sizes, num_local_experts=4)
    if kind == "mixtral, sliding":  # shorter than examples and than rows
        return transformers.MixtralConfig(**sizes, num_local_experts=4, sliding_window=4)
    if kind == "gemma 3":  # layers of both kinds
        kinds = ["sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(**sizes, sliding_window=4, layer_types=kinds)
    if kind == "qwen 3":
        return transformers.Qwen3MoeConfig(
            **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        )
    if kind == "gpt-oss":
        return transformers.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    assert kind == "qwen next"
    return transformers.Qwen3NextConfig(
        **sizes,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )


def model_of(kind: str, attention: str, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(kind)
    config.update(settings)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    ).train()


def test_rows_hold_whole_examples_each_once() -> None:
    rows = examples((5, 60, 17, 40, 3, 64, 9, 22, 1))
    packed = pack(dataset(rows), 64)
    found = []
    for row in packed:
        assert row["length"] == len(row["input_ids"]) == sum(row["seq_lengths"]) <= 64
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert len(packed) == 4  # 221 tokens: fewer rows cannot hold them


def test_batches_of_held_out_examples_are_filled() -> None:
    assert list(fill([4, 4, 4, 9, 1], [0, 1, 2, 3, 4], 8)) == [[0, 1], [2], [3], [4]]
    assert list(fill([], [], 8)) == []


def test_positions_begin_anew_and_first_labels_are_of_none(tokenizer: Any) -> None:
    rows = pack(dataset(examples()), 24)
    batch = packing_collator(tokenizer)([dict(row) for row in rows])
    lengths = [length for row in rows for length in row["seq_lengths"]]
    assert batch["position_ids"].tolist() == [[at for length in lengths for at in range(length)]]
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    assert "attention_mask" not in batch
    assert batch["cu_seq_lens_q"].tolist() == [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["labels"][0, starts] == IGNORED).all()
    assert int((batch["labels"] != IGNORED).sum()) == sum(LENGTHS) - len(LENGTHS)


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean over all trained tokens of all batches, as accumulation takes it."""
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for batch in batches:
        labels_BT = batch.pop("labels")[:, 1:]
        logits_BTV = model(**batch, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum")
        total, count = total + losses, count + int((labels_BT != IGNORED).sum())
    (total / count).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()) / count, gradients


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of gradients, as a share of the largest gradient."""
    assert one.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in one.values())
    return max(float((g - other[name]).abs().max()) for name, g in one.items()) / largest


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["mixtral", "mixtral, sliding", "gemma 3", "qwen 3"])
def test_packed_losses_and_gradients_are_those_of_examples_alone(
    kind: str, attention: str, tokenizer: Any
) -> None:
    model = model_of(kind, attention)
    rows = examples()
    packed = [dict(row) for row in pack(dataset(rows), 24)]
    together = packing_collator(tokenizer)(packed)
    alone = [make_collator(tokenizer)([row]) for row in rows]
    loss, gradients = loss_and_gradients(model, [dict(together)])
    expected, expected_gradients = loss_and_gradients(model, alone)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert far(expected_gradients, gradients) < 1e-5
    # Plainly one behind the other they would be something else.
    plain = {key: together[key] for key in ("input_ids", "labels")}
    wrong, wrong_gradients = loss_and_gradients(model, [plain])
    assert abs(wrong - expected) > 1e-4
    assert far(expected_gradients, wrong_gradients) > 1e-2


def test_packed_rows_are_named_in_messages(tokenizer: Any) -> None:
    rows = pack(dataset(examples()), 15)
    batch = packing_collator(tokenizer)([dict(rows[index]) for index in (0, 2)])
    said = describe_examples([batch], rows, len(rows), tokenizer)
    assert said.startswith(' on packed rows 1 ("')
    assert ', 3 ("' in said
    assert ', 2 ("' not in said


def test_held_out_losses_are_the_same_packed(tokenizer: Any) -> None:
    model = model_of("mixtral, sliding", "sdpa")
    rows = [row for row in examples((9, 3, 14, 5, 8)) if len(row["labels"]) > 1]
    for row in rows:
        row["labels"][:2] = [IGNORED] * 2
    padded = evaluate_answers(model, rows, make_collator(tokenizer), 2)
    packed = evaluate_answers(model, rows, make_collator(tokenizer), 2, (packing_collator(tokenizer), 24))
    assert packed.tokens == padded.tokens
    assert packed.per_answer == pytest.approx(padded.per_answer, abs=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "mixtral, sliding", "gemma 3", "qwen 3"])
def test_models_that_keep_examples_apart_are_taken(kind: str, tmp_path: Path) -> None:
    config_of(kind).save_pretrained(tmp_path)
    check_isolation(str(tmp_path), None)
    refuse_leaks(model_of(kind, "sdpa"))


@pytest.mark.parametrize("kind", ["gpt-oss", "qwen next"])
def test_models_that_let_examples_meet_are_refused_before_loading(kind: str, tmp_path: Path) -> None:
    config_of(kind).save_pretrained(tmp_path)  # no weights there
    with pytest.raises(ConfigurationError) as caught:
        check_isolation(str(tmp_path), None)
    said = str(caught.value)
    assert "sample_packing: true, and " in said
    assert "Set sample_packing: false" in said
    # (transformers refuses linear attention itself from 5.20 on, without the kernels that take boundaries)
    assert "lets an example see those before it" in said or "can't keep packed sequences apart" in said


class Carrying(nn.Module):
    """Wraps a layer; what the token before said is added, over boundaries too."""

    def __init__(self, inner: nn.Module, differentiable: bool, start: int, stop: int | None) -> None:
        super().__init__()
        self.inner, self.differentiable, self.places = inner, differentiable, slice(start, stop)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = torch.zeros_like(hidden)
        before[:, self.places] = torch.roll(hidden, 1, dims=1)[:, self.places]
        before = before if self.differentiable else before.detach()
        return self.inner(hidden + 0.1 * before, *args, **kwargs)


@pytest.mark.parametrize(
    ("differentiable", "said"),
    [(True, "lets an example see those before it"), (False, "computes other logits")],
)
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 256), (256, None)])
def test_what_a_loaded_model_carries_over_is_found(
    differentiable: bool, said: str, start: int, stop: int | None
) -> None:
    """Also where it does so in the first 256 tokens of a row alone, or in later ones alone."""
    model = model_of("mixtral", "sdpa", max_position_embeddings=512)
    refuse_leaks(model)
    assert all(p.grad is None for p in model.parameters())
    model.model.layers[1] = Carrying(model.model.layers[1], differentiable, start, stop)
    with pytest.raises(ConfigurationError, match=said):
        refuse_leaks(model)


def test_windows_of_the_narrow_model_are_shorter_than_the_text() -> None:
    import transformers

    narrow = narrow_model(transformers.MixtralConfig(num_local_experts=4, sliding_window=4096), "sdpa")
    assert narrow.config.sliding_window < max(isolation.LENGTHS) < narrow.config.max_position_embeddings
    narrow = narrow_model(transformers.MixtralConfig(num_local_experts=4, sliding_window=None), "sdpa")
    assert narrow.config.sliding_window is None


def test_a_choice_that_rounding_turns_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one text it may happen, and not in another one as well."""
    measured = isolation._measure
    origins: list[int] = []

    def turned(model: Any, origin: int = 0) -> tuple[float, float]:
        origins.append(origin)
        leak, difference = measured(model, origin)
        return leak, difference if origin else 0.5

    monkeypatch.setattr(isolation, "_measure", turned)
    refuse_leaks(model_of("mixtral", "sdpa"))
    assert origins == [0, isolation.OTHER_TEXT]


def test_what_packing_costs_without_flash_attention_is_said() -> None:
    values = {"base_model": "m", "adapter": "lora", "datasets": [{"path": "d.jsonl"}], "sample_packing": True}
    for attention, said in (("sdpa", True), ("flash_attention_2", False), (None, True)):
        config = TrainConfig.model_validate({**values, "attn_implementation": attention})
        assert ("sample_packing" in dict(remarks(config))) is said, attention


def test_measuring_leaves_random_numbers_alone(tmp_path: Path) -> None:
    config_of("mixtral").save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_isolation(str(tmp_path), None)
    assert torch.equal(torch.rand(4), expected)


def test_a_packed_run(settings: Any, data_files: Any) -> None:
    """Steps, epochs, intervals and tokens are of rows; the losses those of a run on examples alone."""
    from fourfold.training.run import run

    def report(**changes: Any) -> Any:
        values = settings(
            datasets=[{"path": str(data_files[0])}],
            sequence_len=48,
            learning_rate=0.003,
            max_steps=None,
            num_epochs=2,
            warmup_steps=0,
            eval_steps=None,
            evals_per_epoch=1,
            saves_per_epoch=1,
            save_steps=None,
            **changes,
        )
        result = run(TrainConfig(**values), Console(file=io.StringIO()))
        return result, json.loads((Path(values["output_dir"]) / "report.json").read_text())

    packed, written = report(sample_packing=True, eval_sample_packing=True, micro_batch_size=4)
    train = written["data"]["train"]
    # 48 examples of 15 tokens (or 14, where the question is longer by none), 3 a row: 16 rows, 4 a step.
    assert train["examples"] == 48
    assert train["packed_rows"] == 16
    assert packed.steps == 8
    assert [step for step, _ in packed.curve.held_out] == [0, 4, 8]
    assert packed.curve.tokens == 2 * train["tokens"]
    # One batch of everything: the same gradient, however it is laid out.
    whole, _ = report(sample_packing=True, micro_batch_size=16)
    alone, _ = report(micro_batch_size=48)
    assert whole.steps == alone.steps == 2
    for (_, one), (_, other) in zip(whole.curve.train, alone.curve.train, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    assert whole.after.per_answer == pytest.approx(alone.after.per_answer, abs=2e-4)
