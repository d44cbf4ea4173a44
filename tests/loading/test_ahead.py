"""Packed tensors are read into their places by other threads; the loader's own order is taken back."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import tiny
from transformers import AutoModelForCausalLM

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


def test_packed_tensors_are_read_ahead_and_equal(checkpoint, monkeypatch) -> None:
    packed = load(checkpoint / "plain", quantization_config=fourfold.MoeBitsAndBytesConfig(**CONFIG))
    packed.save_pretrained(checkpoint / "packed")
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setattr(ahead, "PIECE_BYTES", 1000)
    taken, take = [], ahead.AheadReader.take

    def counted(self, name):
        taken.append(name)
        return take(self, name)

    monkeypatch.setattr(ahead.AheadReader, "take", counted)
    again = load(checkpoint / "packed")
    assert same(packed, again)
    assert taken, "nothing was read ahead"
    assert all("experts" in name for name in taken)
    assert not any(p.requires_grad for n, p in again.named_parameters() if n in taken)


def test_what_the_loader_has_begun_is_taken_from_it(checkpoint, monkeypatch) -> None:
    packed = load(checkpoint / "plain", quantization_config=fourfold.MoeBitsAndBytesConfig(**CONFIG))
    packed.save_pretrained(checkpoint / "packed")
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setattr("concurrent.futures.Future.cancel", lambda self: False)
    monkeypatch.setattr(ahead.AheadReader, "take", lambda *_: pytest.fail("read twice"))
    assert same(packed, load(checkpoint / "packed"))


def test_another_device_or_no_threads_read_as_ever(checkpoint, monkeypatch) -> None:
    packed = load(checkpoint / "plain", quantization_config=fourfold.MoeBitsAndBytesConfig(**CONFIG))
    packed.save_pretrained(checkpoint / "packed")
    monkeypatch.setattr(ahead.AheadReader, "take", lambda *_: pytest.fail("read ahead"))
    assert same(packed, load(checkpoint / "packed"))
    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    assert same(packed, load(checkpoint / "packed"))


def test_what_a_thread_raises_comes_out(checkpoint, monkeypatch) -> None:
    packed = load(checkpoint / "plain", quantization_config=fourfold.MoeBitsAndBytesConfig(**CONFIG))
    packed.save_pretrained(checkpoint / "packed")
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
