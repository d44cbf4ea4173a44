"""Packed tensors are read into their places by other threads; the loader's own order is taken back."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from tests.helpers import tiny
from transformers import AutoModelForCausalLM, core_model_loading

import fourfold
from fourfold.loading import ahead, converters, reading, staging

TYPES = ("qwen3_moe", "gpt_oss", "dbrx")


@pytest.fixture(params=TYPES)
def checkpoint(request, tmp_path):
    tiny.save(getattr(tiny, request.param)(), tmp_path / "plain")
    return tmp_path


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **settings)


def same(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


CONFIG = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def pack(folder):
    packed = load(folder / "plain", quantization_config=fourfold.MoeBitsAndBytesConfig(**CONFIG))
    packed.save_pretrained(folder / "packed")
    return packed


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"], ids=str)
def test_packed_tensors_are_read_ahead_and_equal(checkpoint, monkeypatch, device_map) -> None:
    packed = pack(checkpoint)
    assert packed.hf_quantizer.read_ahead_bytes == 0
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setattr(ahead, "PIECE_BYTES", 1000)
    taken, take = [], ahead.AheadReader.take

    def counted(self, name):
        # (An automatic map is made after the converters; without it all would seem to be on a CPU.)
        assert self.device_map == {"": "cpu"}
        taken.append(name)
        return take(self, name)

    monkeypatch.setattr(ahead.AheadReader, "take", counted)
    again = AutoModelForCausalLM.from_pretrained(checkpoint / "packed", device_map=device_map)
    assert same(packed, again)
    assert taken, "nothing was read ahead"
    assert all("experts" in name for name in taken)
    assert not any(p.requires_grad for n, p in again.named_parameters() if n in taken)
    nbytes = sum(again.get_parameter(name).nbytes for name in taken)
    assert again.hf_quantizer.read_ahead_bytes == nbytes


def test_reading_begins_before_the_loader_waits_for_the_first_tensor(checkpoint, monkeypatch) -> None:
    pack(checkpoint)
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    begun, placed, begin, place = [], [], ahead.AheadReader.begin, core_model_loading.set_param_for_module

    def beginning(self, name, key):
        begun.append(name)
        begin(self, name, key)

    def placing(model, name, *args, **kwargs):
        placed.append((name, len(begun)))
        return place(model, name, *args, **kwargs)

    monkeypatch.setattr(ahead.AheadReader, "begin", beginning)
    monkeypatch.setattr(core_model_loading, "set_param_for_module", placing)
    load(checkpoint / "packed")
    assert begun
    assert "experts" not in placed[0][0]
    assert placed[0][1] == len(begun)


def test_a_load_that_fails_elsewhere_stops_reading(checkpoint, monkeypatch) -> None:
    pack(checkpoint)
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setattr(ahead, "PIECE_BYTES", 256)
    failed, copied = threading.Event(), []

    def waiting(*_):
        failed.wait(60)
        copied.append(1)

    def broken(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr(ahead, "_copy_piece", waiting)
    monkeypatch.setattr(core_model_loading, "set_param_for_module", broken)
    with pytest.raises(OSError, match="no room"):
        load(checkpoint / "packed")
    gc.collect()
    failed.set()
    for thread in threading.enumerate():
        if thread.name.startswith("fourfold-read"):
            thread.join(60)
            assert not thread.is_alive()
    assert len(copied) <= ahead.THREADS


def test_what_the_loader_has_begun_is_taken_from_it(checkpoint, monkeypatch) -> None:
    packed = pack(checkpoint)
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setattr("concurrent.futures.Future.cancel", lambda self: False)
    monkeypatch.setattr(ahead.AheadReader, "take", lambda *_: pytest.fail("read twice"))
    assert same(packed, load(checkpoint / "packed"))


def test_another_device_or_no_threads_read_as_ever(checkpoint, monkeypatch) -> None:
    packed = pack(checkpoint)
    monkeypatch.setattr(ahead.AheadReader, "take", lambda *_: pytest.fail("read ahead"))
    assert same(packed, load(checkpoint / "packed"))
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    assert same(packed, load(checkpoint / "packed"))


def test_what_a_thread_raises_comes_out(checkpoint, monkeypatch) -> None:
    pack(checkpoint)
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))

    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(ahead, "_copy_piece", broken)
    with pytest.raises(Exception, match="the disk is gone"):
        load(checkpoint / "packed")


@pytest.mark.parametrize(
    "settings",
    [CONFIG, {"load_in_8bit": True}, {**CONFIG, "bnb_4bit_use_double_quant": False}],
    ids=["nf4 double", "int8", "nf4"],
)
def test_batches_that_arrive_together_are_packed_alike(checkpoint, monkeypatch, settings) -> None:
    """As on a GPU, where experts come in groups; here the device test is lifted."""
    config = fourfold.MoeBitsAndBytesConfig(**settings)
    one_by_one = load(checkpoint / "plain", quantization_config=config)
    groups = []

    def staged(sources):
        known = [staging.deferred(source) for source in sources]
        return None if None in known else known

    def read_groups(known, threads):
        for group in staging.read_groups(known, threads, 40_000):
            groups.append(len(group))
            yield group

    monkeypatch.setattr(converters, "staged", staged)
    monkeypatch.setattr(converters, "read_groups", read_groups)
    together = load(checkpoint / "plain", quantization_config=config)
    assert same(one_by_one, together)
    if one_by_one.config.model_type == "qwen3_moe":
        assert max(groups) > 1
    assert reading.THREADS > 1
