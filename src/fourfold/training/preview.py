"""The first examples of a run as the model sees them, with the trained tokens told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.training.data import load_records
from fourfold.training.encode import IGNORED
from fourfold.training.packing import pack
from fourfold.training.preflight import check_model_folder
from fourfold.training.prepared import prepare_data, templates_of
from fourfold.training.schema import TrainConfig
from fourfold.training.tokenizer import choose_template, load_tokenizer


@dataclass(frozen=True)
class Shown:
    """One example.

    Attributes:
        runs: texts one behind the other, and whether their tokens are trained.
        tokens: how many there are.
        trained_tokens: how many of them are trained.
        ids: token ids.
        trained: whether each is trained. The first never is: nothing predicts it.
    """

    runs: list[tuple[str, bool]]
    tokens: int
    trained_tokens: int
    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Preview:
    """The first examples of a run's data, and what there is to count.

    Attributes:
        examples: the first ones of the training set, in the files' order.
        train: counts of the training set.
        held_out: those of the held-out set, if there is one.
        bad: place and problem of each record that was left out.
        notes: lines that say these and what became of long examples.
    """

    examples: list[Shown]
    train: dict[str, int]
    held_out: dict[str, int] | None
    bad: list[str]
    notes: list[str]


def preview(config: TrainConfig, count: int) -> Preview:
    """The first ``count`` examples, by the very steps of a run; the model itself is not looked at.

    Raises:
        ConfigurationError, DataError: as `fourfold train` would.
    """
    check_model_folder(config.base_model)
    loaded = None if config.dataset_prepared_path is not None else load_records(config)
    tokenizer = load_tokenizer(config.base_model, config.special_tokens, config.trust_remote_code)
    templates = templates_of(config, tokenizer)
    tokenizer.chat_template = choose_template(config, tokenizer)
    data = prepare_data(config, tokenizer, templates, loaded)
    if config.sample_packing:
        data.train.packed = pack(data.train.dataset, config.sequence_len)
    first = data.train.dataset.select(range(min(count, len(data.train.dataset))))
    return Preview(
        [shown(row["input_ids"], row["labels"], tokenizer) for row in first],
        data.train.to_dict(),
        None if data.held_out is None else data.held_out.to_dict(),
        data.bad,
        data.notes,
    )


def shown(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Shown:
    """One example in runs of tokens that are trained, and that are not."""
    trained = [index > 0 and label != IGNORED for index, label in enumerate(labels)]
    runs: list[tuple[str, bool]] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or trained[stop] != trained[start]:
            runs.append((tokenizer.decode(list(ids[start:stop])), trained[start]))
            start = stop
    return Shown(runs, len(ids), sum(trained), list(ids), trained)
