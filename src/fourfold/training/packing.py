"""Several examples in one row, each as if it were alone.

With ``sample_packing`` a row of the training set is no example but as many as ``sequence_len`` holds, by
best fit, longest first (Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830; TRL's).
A batch is its rows laid end to end, without padding: ``input_ids [1, T]``, positions that begin anew with
each example, no attention mask. transformers makes of such positions a block-diagonal mask (sdpa, eager,
flex) or sequences of several lengths (flash attention); layers that carry a state read the boundaries passed
beside. Whether a model heeds them is measured, see ``isolation.py``.

The first label of each example is -100: nothing before an example predicts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

COLUMNS = ("input_ids", "labels")
# Examples that are packed with each other; beyond it rows begin anew. (At 500 tokens an example and 4,096 a
# row the rows that stay short at the end of a group are one in thousands.)
GROUP = 100_000


def pack(dataset: Any, sequence_len: int) -> Any:
    """Rows of up to ``sequence_len`` tokens made of whole examples.

    Args:
        dataset: rows with ``input_ids`` and ``labels``, none longer than ``sequence_len``.
        sequence_len: tokens a row holds.

    Returns:
        A dataset with ``input_ids``, ``labels`` and ``seq_lengths``, the lengths of a row's examples in their
        order, and ``length``, their sum. Every example is in it once.
    """
    examples = dataset.select_columns(list(COLUMNS))
    # (in memory: else it would write a file of its own beside one that is kept)
    options = {"batch_size": GROUP, "load_from_cache_file": False, "keep_in_memory": True}
    with without_bars():
        packed = pack_dataset(examples, sequence_len, "bfd", options)
    return packed.add_column("length", [len(ids) for ids in packed["input_ids"]])


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def packing_collator(tokenizer: Any) -> DataCollatorForLanguageModeling:
    """Rows laid end to end, with the examples' boundaries in every form that models read.

    Rows without ``seq_lengths`` are one example each. Gives ``input_ids``, ``labels`` and ``position_ids``
    ``[1, T]`` int64, ``cu_seq_lens_q``, ``cu_seq_lens_k`` ``[examples + 1]`` int32, ``max_length_q``,
    ``max_length_k`` and ``seq_idx`` ``[1, T]`` int32.
    """
    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)


def lies_within(row: list[int], batch: list[int]) -> bool:
    """Whether a row's tokens stand in a batch of rows laid end to end."""
    begins = (at for at, token in enumerate(batch) if token == row[0])
    return any(batch[at : at + len(row)] == row for at in begins)


def fill(lengths: Sequence[int], order: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of examples for each batch of up to ``tokens`` tokens, in the given order; none is empty."""
    batch: list[int] = []
    held = 0
    for index in order:
        if batch and held + lengths[index] > tokens:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += lengths[index]
    if batch:
        yield batch
