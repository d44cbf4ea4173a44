"""Modules of dynamic subclasses: copied, pickled, and given their own class back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fourfold
import tiny
from fourfold.errors import CheckpointError, UnsupportedExpertsError
from fourfold.experts import PackedExperts, find_experts
from fourfold.experts.packed import pack_module_
from fourfold.experts.plain import PlainExperts
from fourfold.formats import PackFormat
from tiny import IDS, logits

KINDS = {"qwen3_moe": tiny.qwen3_moe, "gpt_oss": tiny.gpt_oss, "llama4": tiny.llama4, "dbrx": tiny.dbrx}
SETTINGS: dict[str, dict[str, Any]] = {
    "experts": {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "all": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"experts_quant_type": "int8"},
}


def saved(module: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded: torch.nn.Module = torch.load(buffer, weights_only=False)
    return loaded


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "old-pickle": lambda module: pickle.loads(pickle.dumps(module, protocol=2)),
    "torch.save": saved,
}


def with_lora(model: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    arguments = {"r": 2, "target_parameters": fourfold.expert_targets(model), "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**(arguments | changes)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_models(kind: str, settings: str, way: str, tmp_path: Path) -> None:
    tiny.save(KINDS[kind](), tmp_path)
    model = tiny.load(tmp_path, **SETTINGS[settings])
    wanted = logits(model)
    made = WAYS[way](model)
    assert made is not model
    assert torch.equal(logits(made), wanted)
    classes = [[type(f.module) for f in find_experts(m)] for m in (model, made)]
    assert classes[0] == classes[1]
    assert all(issubclass(cls, PackedExperts) for cls in classes[0])
    fourfold.verify(made)
    # Neither is the other: what is done to the copy is not done to the original.
    copied, originals = {id(p) for p in made.parameters()}, {id(p) for p in model.parameters()}
    assert not copied & originals
    if settings == "all" and way != "deepcopy":
        return  # bitsandbytes' own 4-bit weights cannot be dequantized after pickle
    plain = fourfold.dequantize(made)
    assert torch.allclose(logits(plain), wanted, atol=1e-4)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_models_with_adapters_train_on(kind: str, way: str, tmp_path: Path) -> None:
    tiny.save(KINDS[kind](), tmp_path)
    model = with_lora(tiny.load(tmp_path, **SETTINGS["experts"]))
    made = WAYS[way](model)
    assert torch.equal(logits(made), logits(model))
    gradients = []
    for each in (model, made):
        each.train()
        each(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    made.save_pretrained(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "fourfold.json").is_file()


@pytest.mark.parametrize("way", WAYS)
def test_prepared_unquantized_experts(way: str) -> None:
    model = tiny.build(tiny.qwen3_moe())
    fourfold.prepare(model, gradient_checkpointing=False)
    model.disable_input_require_grads()  # (a function within a function of transformers)
    wrapped = with_lora(model)
    made = WAYS[way](wrapped)
    assert torch.equal(logits(made), logits(wrapped))
    assert isinstance(tiny.experts_of(made), PlainExperts)


def test_another_process_reads_it(tmp_path: Path) -> None:
    tiny.save(tiny.dbrx(), tmp_path)
    model = tiny.load(tmp_path, **SETTINGS["experts"])
    with (tmp_path / "model.pickle").open("wb") as file:
        numbers = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
        pickle.dump((model, IDS, logits(model), numbers), file)
    program = (  # (another process sums in another order: threads, alignment)
        "import pickle, sys, torch\n"
        "model, ids, wanted, numbers = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad(): off = (model(ids).logits - wanted).norm() / wanted.norm()\n"
        "same = [tensor.tolist() == numbers[name] for name, tensor in model.state_dict().items()]\n"
        "print(off.item() < 1e-6 and all(same) and len(same) == len(numbers))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pickle")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "True", done.stderr


# And back


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_unloading_gives_prepared_experts_their_own_class_back(way: str) -> None:
    model = tiny.build(tiny.qwen3_moe())
    own = type(tiny.experts_of(model))
    fourfold.prepare(model, gradient_checkpointing=False)
    wrapped = with_lora(model)
    wanted = logits(wrapped)
    if way == "unload":
        with wrapped.disable_adapter():
            wanted = logits(wrapped)
    base = getattr(wrapped, way)()
    assert [type(found.module) for found in find_experts(base)] == [own, own]
    assert not any(hasattr(found.module, "fourfold_layout") for found in find_experts(base))
    torch.testing.assert_close(logits(base), wanted, rtol=1e-5, atol=1e-5)
    fourfold.prepare(base, gradient_checkpointing=False)  # and once more
    assert isinstance(tiny.experts_of(with_lora(base)), PlainExperts)


def test_unloading_leaves_packed_experts_packed(tmp_path: Path) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path)
    model = tiny.load(tmp_path, **SETTINGS["experts"])
    wanted = logits(model)
    base = with_lora(model).unload()
    assert isinstance(tiny.experts_of(base), PackedExperts)
    assert torch.equal(logits(base), wanted)


def test_modules_that_cannot_be_packed_now() -> None:
    model, fmt = tiny.build(tiny.qwen3_moe()), PackFormat("nf4")
    experts = tiny.experts_of(model)
    fourfold.prepare(model, gradient_checkpointing=False)
    with pytest.raises(UnsupportedExpertsError, match=r"^mlp\.experts \(LowRank.*before `fourfold.prepare`"):
        pack_module_(experts, fmt, "mlp.experts")
    assert isinstance(experts, PlainExperts)
    packed = pack_module_(tiny.experts_of(tiny.build(tiny.qwen3_moe())), fmt)
    with pytest.raises(UnsupportedExpertsError, match="packed already"):
        pack_module_(packed, fmt)


def test_a_failure_leaves_the_module_as_it_was() -> None:
    experts = tiny.experts_of(tiny.build(tiny.qwen3_moe()))
    own, names = type(experts), [n for n, _ in experts.named_parameters()]
    with torch.no_grad():
        experts.down_proj[1, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"down_proj: weights of expert\(s\) 1"):
        pack_module_(experts, PackFormat("nf4"))
    assert type(experts) is own
    assert [n for n, _ in experts.named_parameters()] == names
    assert all(p.is_floating_point() for p in experts.parameters())
