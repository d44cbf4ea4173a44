"""The matrices of a fused parameter, read one at a time from a checkpoint of any layout.

Where they lie is `loading.places`' answer: one key per expert, gate and up under keys of their own, all
experts under one key, turned over or not. A parameter behind another conversion is read whole (`places`
limits its size).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from fourfold.errors import CheckpointError
from fourfold.loading.places import Places, Stored
from fourfold.loading.raw import DTYPES, RawTensor, read_numbers, read_whole


def read_matrices(places: Places, parameter: str, matrices: int) -> Iterator[torch.Tensor]:
    """Every matrix of a parameter in fp32, in the orientation in which the model stores it.

    Args:
        places: of the parameter, among others.
        parameter: its full name in the model.
        matrices: how many it has; where it is flattened to two dimensions, equal parts of its rows.

    Raises:
        CheckpointError: a tensor is no numbers in high precision, or its file became shorter.
    """
    for conversion in places.conversions:
        if parameter in conversion.parameters:
            whole = conversion.to_model({t.key: read_whole(_checked(t)) for t in conversion.tensors})
            value = whole[parameter]
            yield from value.reshape(matrices, -1, value.shape[-1]).float()
            return
    keys: dict[int, list[Stored]] = defaultdict(list)
    for stored in places.stored:
        if stored.parameter == parameter:
            _checked(stored.tensor)
            for matrix in [stored.expert] if stored.one_expert else range(matrices):
                keys[matrix].append(stored)
    with contextlib.ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for matrix in range(matrices):
            pieces = []
            for stored in sorted(keys[matrix], key=lambda stored: stored.first_row):
                path = stored.tensor.file
                if path not in files:
                    files[path] = stack.enter_context(path.open("rb"))
                pieces.append(_read(stored, files[path], 0 if stored.one_expert else matrix, matrices))
            yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _read(stored: Stored, source: BinaryIO, matrix: int, matrices: int) -> torch.Tensor:
    """The rows of one matrix that a key holds."""
    tensor = stored.tensor
    rows, columns, dtype = tensor.shape[-2], tensor.shape[-1], DTYPES[tensor.dtype]
    if len(tensor.shape) == 2 and stored.is_whole:
        rows //= matrices
    source.seek(tensor.begin + matrix * rows * columns * dtype.itemsize)
    w_RC = read_numbers(source, rows * columns, dtype).view(rows, columns).float()
    return w_RC.T if stored.turned else w_RC


def _checked(tensor: RawTensor) -> RawTensor:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{tensor.file}: {tensor.key} is {tensor.dtype}, where weights in high precision "
            f"({', '.join(DTYPES)}) are needed; name the checkpoint that was packed"
        )
    return tensor
