"""Whether a plan fits, and what would make it fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fourfold
import tiny
from fourfold.errors import ConfigurationError
from fourfold.planning.fit import CONTEXT_BYTES, room, suggest
from fourfold.planning.optimizers import STATES, optimizer_bytes
from fourfold.planning.plan import Planner, Settings
from fourfold.planning.size import parse_size
from fourfold.planning.standins import Target

GPU = Target("cuda", (9, 0))


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(tiny.qwen3_moe(num_hidden_layers=6), GPU)


def _settings(**changes: Any) -> Settings:
    config = fourfold.MoeBitsAndBytesConfig(load_in_4bit=True)
    base = {"r": 64, "batch": 4, "length": 1024, "checkpointing": False, "padded": True}
    return Settings(quantization=config, **(base | changes))


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24Gi", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("0.5GiB", 2**29),
        ("12345678901", 12345678901),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "24 cards", "0GiB", "-1GiB", "GiB", "1e9", "24TiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Write 24GiB"):
        parse_size(text)


def test_room_is_less_than_the_card() -> None:
    assert room(2**34) < 2**34 - CONTEXT_BYTES
    assert room(1) == 0


def test_nothing_is_suggested_where_it_fits(planner: Planner) -> None:
    settings = _settings()
    assert suggest(planner, settings, planner.plan(settings).peak) == []


def test_every_suggestion_fits_and_is_as_mild_as_suffices(planner: Planner) -> None:
    settings = _settings()
    available = int(0.8 * planner.plan(settings).peak)
    suggestions = suggest(planner, settings, available)
    by_key = {tuple(s.keys): s for s in suggestions}
    assert ("gradient_checkpointing",) in by_key
    batch = by_key["micro_batch_size", "gradient_accumulation_steps"]
    assert batch.keys["micro_batch_size"] * batch.keys["gradient_accumulation_steps"] == 4
    assert all(s.plan.peak <= available for s in suggestions)
    milder = replace(settings, length=by_key["sequence_len",].keys["sequence_len"] * 2)
    assert planner.plan(milder).peak > available


def test_one_change_alone_may_not_do(planner: Planner) -> None:
    settings = _settings(r=32)
    alone = []
    for changes in ({"checkpointing": True}, {"batch": 1, "accumulation": 4, "padded": False}, {"r": 4}):
        alone.append(planner.plan(replace(settings, **changes)).peak)
    alone.append(planner.plan(replace(settings, length=256)).peak)
    alone.append(planner.plan(replace(settings, target_parameters=())).peak)
    available = min(alone) - 1
    (together,) = suggest(planner, settings, available)
    assert together.plan.peak <= available
    assert len(together.keys) >= 2
    # none of them is needless
    assert str(together).count(": ") == len(together.keys)


def test_no_change_helps_where_weights_are_too_many(planner: Planner) -> None:
    settings = _settings()
    assert suggest(planner, settings, planner.plan(settings).weights.bytes) == []


def _trained(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _states(optimizer: Any) -> int:
    counted = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and t.ndim and not name.startswith("qmap")
    }
    return sum(counted.values())


SHAPES = [(8, 2048), (4096, 8), (16, 16)]


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor"])
def test_states_of_torch_optimizers(name: str) -> None:
    from transformers.optimization import Adafactor

    makers = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD, "adafactor": Adafactor}
    parameters = _trained(SHAPES)
    optimizer = makers[name](parameters)
    optimizer.step()
    assert optimizer_bytes(name, SHAPES, on_gpu=False).states == _states(optimizer)


@pytest.mark.parametrize("name, kind, bits", [("adamw_8bit", "AdamW", 8), ("lion_8bit", "Lion", 8)])
def test_states_of_bitsandbytes_optimizers(name: str, kind: str, bits: int) -> None:
    import bitsandbytes.optim

    parameters = _trained(SHAPES)
    optimizer = getattr(bitsandbytes.optim, kind)(parameters, lr=1e-3, optim_bits=bits)
    for group in range(len(optimizer.param_groups)):
        for index, parameter in enumerate(parameters):
            optimizer.init_state(optimizer.param_groups[group], parameter, group, index)
    assert optimizer_bytes(name, SHAPES, on_gpu=True).states == _states(optimizer)


def test_paged_states_lie_elsewhere() -> None:
    shapes = [(1000, 1000), (8, 8)]
    plain = optimizer_bytes("adamw_8bit", shapes, on_gpu=True)
    paged = optimizer_bytes("paged_adamw_8bit", shapes, on_gpu=True)
    assert paged.states + paged.paged == plain.states
    assert paged.states == 8 * 64
    assert optimizer_bytes("paged_adamw_8bit", shapes, on_gpu=False).paged == 0


def test_every_optimizer_of_the_configuration_is_known() -> None:
    from typing import get_args

    from fourfold.training.key_types import Optimizer

    assert set(STATES) == set(get_args(Optimizer))
    for name in STATES:
        assert optimizer_bytes(name, SHAPES, on_gpu=True).states >= 0
