"""Slices are read in order, a bounded number ahead, and let go of."""

import copy
import threading
import weakref
from concurrent.futures import Future

import torch
from transformers.core_model_loading import MergeModulelist, WeightConverter

from fourfold.loading import reading
from fourfold.loading.converters import PackingConverter
from fourfold.loading.stored import DecodingConverter


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


def test_a_bounded_number_of_slices_is_read_ahead(monkeypatch) -> None:
    read, lock = [], threading.Lock()

    def source(number: int):
        def job() -> torch.Tensor:
            with lock:
                read.append(number)
            return torch.full((256,), number).as_subclass(Elsewhere)

        return job

    monkeypatch.setattr(reading, "AHEAD_BYTES", 3 * 256 * 8)
    slices = reading.read_slices(source(i) for i in range(20))
    for number, tensor in enumerate(slices):
        assert tensor is not None
        assert int(torch.Tensor.max(tensor)) == number
        with lock:
            assert max(read) <= number + 3
    assert sorted(read) == list(range(20))


def test_large_slices_are_not_read_ahead() -> None:
    MiB = 2**20
    assert [reading.slices_ahead(n * MiB) for n in (3, 16, 20, 28)] == [4, 1, 1, 0]


def test_on_a_cpu_nothing_is_read_ahead_and_sources_are_let_go_of() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def job() -> torch.Tensor:
        tensor = torch.zeros(8)
        made.append(weakref.ref(tensor))
        return tensor

    for number, _ in enumerate(reading.read_slices([job] * 5)):
        assert len(made) == number + 1
        assert sum(ref() is not None for ref in made) <= 2


def test_a_copied_converter_collects_for_itself_and_shares_the_rest() -> None:
    operations = [MergeModulelist(dim=0)]
    original = PackingConverter.wrap(WeightConverter("experts.*.w1.weight", "experts.up_proj", operations))
    original.scope_prefix = "text"
    made = copy.deepcopy(original)
    made.add_tensor("experts.up_proj", "experts.0.w1.weight", "experts.*.w1.weight", Future())
    assert (len(made.collected_tensors), len(original.collected_tensors)) == (1, 0)
    assert (len(made.layer_targets), len(original.layer_targets)) == (1, 0)
    assert made.operations is original.operations
    assert made.scope_prefix == "text"
    assert made.rename_source_key("text.experts.3.w1.weight") == original.rename_source_key(
        "text.experts.3.w1.weight"
    )


def test_a_copied_decoding_converter_finds_a_device_of_its_own() -> None:
    """One converter serves all layers, and layers may lie on different devices."""

    class Stored:
        dtype = torch.bfloat16

    class Format:
        stored = Stored()

        def is_encoded(self, key: str) -> bool:
            return True

    original = DecodingConverter.around(
        WeightConverter("experts.*.w1.weight", "experts.up_proj", [MergeModulelist(dim=0)]), Format()
    )
    copies = [copy.deepcopy(original) for _ in range(2)]
    for made, device in zip(copies, ("cpu", "meta"), strict=True):
        made.add_tensor("up", "experts.0.w1.weight", "experts.*.w1.weight", torch.zeros(1, device=device))
    assert [made.target.device().type for made in copies] == ["cpu", "meta"]
