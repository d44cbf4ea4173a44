"""Held-out loss per answer, and one answer to look at.

The mean over answers with its standard error, rather than the trainer's mean over batches: two runs of the
same answers pair up, so the error of an improvement is that of the paired differences (an order of magnitude
below that of either mean), and the result does not depend on how answers were batched.

Shapes: B answers in a batch, T tokens, P positions with a label in any answer of the batch, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fourfold.errors import TrainingError
from fourfold.training import collective, processes
from fourfold.training.encode import IGNORED
from fourfold.training.packing import fill

LOGITS = 2**25  # at a time; 128 MiB in fp32


@dataclass(frozen=True)
class AnswerLosses:
    """Loss on held-out answers, in nats per token.

    Attributes:
        per_answer: the mean over each answer's tokens, in the dataset's order.
        tokens: the number of labelled tokens of each answer.
    """

    per_answer: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Mean over all labelled tokens."""
        return sum(loss * n for loss, n in zip(self.per_answer, self.tokens, strict=True)) / sum(self.tokens)

    @property
    def standard_error(self) -> float:
        """Standard error of ``mean`` over answers."""
        return _standard_error(self.per_answer, self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "mean": self.mean,
            "standard_error": self.standard_error,
            "answers": len(self.tokens),
            "tokens": sum(self.tokens),
            "per_answer": self.per_answer,
            "tokens_per_answer": self.tokens,
        }


@dataclass(frozen=True)
class Improvement:
    """How far the loss fell from one evaluation to another of the same answers (positive: it fell)."""

    mean: float
    standard_error: float

    @classmethod
    def between(cls, before: AnswerLosses, after: AnswerLosses) -> Improvement:
        """The paired difference, answer by answer."""
        if before.tokens != after.tokens:
            raise ValueError("the two evaluations are of different answers")
        fell = [b - a for b, a in zip(before.per_answer, after.per_answer, strict=True)]
        return cls(before.mean - after.mean, _standard_error(fell, before.tokens))

    def to_dict(self) -> dict[str, float]:
        """For report.json."""
        return {"mean": self.mean, "standard_error": self.standard_error}


def _standard_error(values: Sequence[float], weights: Sequence[int]) -> float:
    """Of the weighted mean: a ratio estimator over independent answers (Cochran, Sampling Techniques 6.4)."""
    n, total = len(values), sum(weights)
    if n < 2:
        return math.inf
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / total
    residual = sum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return math.sqrt(residual * n / (n - 1)) / total


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each module's own mode restored afterwards.

    A model in bf16 computes under autocast, as the trainer does: adapters are fp32, and without it their
    products would be too. A model is then evaluated by the same arithmetic before, within and after training,
    and when it is loaded again (0.03 nats on single answers lay between the two).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    weight = next(p for p in model.parameters() if p.is_floating_point())
    low = weight.dtype in (torch.bfloat16, torch.float16)
    try:
        with (
            torch.no_grad(),
            torch.autocast(collective.device_of(model).type, weight.dtype if low else None, enabled=low),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate_answers(
    model: Any,
    dataset: Any,
    collate: Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]],
    batch_size: int,
    packed: tuple[Callable[[list[dict[str, list[int]]]], dict[str, Any]], int] | None = None,
) -> AnswerLosses:
    """The loss of ``model`` on each answer of ``dataset`` (``input_ids``, ``labels`` not shifted, -100
    elsewhere), the batches shared out among the processes of the run.

    Args:
        model: a causal language model, with or without adapters.
        dataset: rows with ``input_ids`` and ``labels``.
        collate: makes a right-padded batch of rows.
        batch_size: how many answers at once; the result does not depend on it.
        packed: instead, a collator that lays rows end to end, and the most tokens of a batch.

    Raises:
        TrainingError: a loss is not finite; the message names the row.
    """
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in dataset]
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index]["input_ids"]), index))
    losses = [0.0] * len(rows)
    tokens = [0] * len(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if packed is not None:
        batches = list(fill(lengths, order, packed[1]))
    with evaluating(model):
        for chosen, counts in _shares(batches, collective.is_sharded(model)):
            members = [rows[i] for i in chosen]
            if packed is not None:
                found = _packed_losses(model, packed[0](members), [lengths[i] for i in chosen])
            else:
                found = _batch_losses(model, collate(members))
            if not counts:
                continue
            for index, loss, count in zip(chosen, *found, strict=True):
                if not math.isfinite(loss):
                    raise TrainingError(f"The loss on held-out row {index} is {loss}. Are the weights sound?")
                losses[index], tokens[index] = loss, count
    device = collective.device_of(model)
    everyone = collective.sum_of([*losses, *(float(count) for count in tokens)], device)
    return AnswerLosses(everyone[: len(rows)], [round(count) for count in everyone[len(rows) :]])


def _shares(batches: list[list[int]], together: bool) -> Iterator[tuple[list[int], bool]]:
    """This process's batches, and whether each counts.

    The processes of a sharded model compute ``together``, each as many batches as any other: who has none
    left takes the first once more, for nothing.
    """
    count, rank = processes.count(), processes.rank()
    for number in range(math.ceil(len(batches) / count)):
        index = number * count + rank
        if index < len(batches):
            yield batches[index], True
        elif together:
            yield batches[0], False


def _batch_losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[int]]:
    device = collective.device_of(model)
    labels_BT = batch["labels"].to(device)[:, 1:]
    used_T = (labels_BT != IGNORED).any(dim=0)
    positions_P = used_T.nonzero().squeeze(1)
    labels_BP = labels_BT[:, positions_P]
    inputs: dict[str, Any] = {
        key: batch[key].to(device) for key in ("input_ids", "attention_mask") if key in batch
    }
    rows = len(labels_BP)
    sums, counts = [0.0] * rows, (labels_BP != IGNORED).sum(1).tolist()
    for part, logits_BCV in _logits(model, inputs, positions_P, rows):
        for row, (logits_CV, labels_C) in enumerate(zip(logits_BCV, labels_BP[:, part], strict=True)):
            kept = labels_C != IGNORED
            loss = nn.functional.cross_entropy(logits_CV[kept].float(), labels_C[kept], reduction="sum")
            sums[row] += float(loss)
    return [total / count for total, count in zip(sums, counts, strict=True)], counts


def _packed_losses(
    model: Any, batch: dict[str, Any], lengths: Sequence[int]
) -> tuple[list[float], list[int]]:
    """As ``_batch_losses``, of examples laid end to end in one row."""
    device = collective.device_of(model)
    labels_T = batch.pop("labels")[0, 1:].to(device)
    positions_P = (labels_T != IGNORED).nonzero().squeeze(1)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    losses_P = torch.zeros(len(positions_P), device=device)
    for part, logits_1CV in _logits(model, inputs, positions_P, 1):
        labels_C = labels_T[positions_P[part]]
        losses_P[part] = nn.functional.cross_entropy(logits_1CV[0].float(), labels_C, reduction="none")
    # The position before a token predicts it: an example's first one is predicted by none of its own.
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    owner_P = torch.searchsorted(ends, positions_P, right=True)
    sums = torch.zeros(len(lengths), device=device).index_add_(0, owner_P, losses_P)
    counts = torch.bincount(owner_P, minlength=len(lengths))
    return (sums / counts).tolist(), counts.tolist()


def _logits(
    model: Any, inputs: dict[str, Any], positions_P: torch.Tensor, rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits at the positions with labels, `LOGITS` of them at a time: at 4,096 tokens and 150,000 words all
    of them are 2.5 GB an answer in fp32.

    What comes before the head is computed once. The model's own forward takes it up for each part, so that
    whatever it does to logits (caps, scales) is done.

    Args:
        model: with or without adapters.
        inputs: of its forward.
        positions_P: of every row.
        rows: B, how many there are.

    Yields:
        A slice of the positions, C of them, and logits ``[B, C, V]``.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner, head = base.base_model, base.get_output_embeddings()
    if not _takes_positions(base) or inner is base or head is None:
        yield slice(None), model(**inputs, use_cache=False).logits[:, positions_P]
        return
    count = len(positions_P)
    size = max(1, LOGITS // (rows * head.weight.shape[0]))
    parts = [slice(start, start + size) for start in range(0, count, size)]
    calls = len(parts)
    if collective.is_sharded(model):  # its processes call it together: who has fewer parts repeats one
        calls = collective.most(calls, collective.device_of(model))
    with _computed_once(inner):
        for call in range(calls):
            part = parts[min(call, len(parts) - 1)]
            logits = model(**inputs, use_cache=False, logits_to_keep=positions_P[part]).logits
            if call < len(parts):
                yield part, logits


def _takes_positions(base: Any) -> bool:
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@contextmanager
def _computed_once(module: nn.Module) -> Iterator[None]:
    """Within it the module computes at its first call, and gives the same at later ones."""
    plain, own = module.forward, "forward" in vars(module)
    found: list[Any] = []

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(plain(*args, **kwargs))
        return found[0]

    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = plain
        else:
            del module.forward


def answer(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int = 64) -> str:
    """The model's greedy answer to the tokens of a prompt."""
    ids_BT = torch.tensor([ids], device=collective.device_of(model))
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    with evaluating(model):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
