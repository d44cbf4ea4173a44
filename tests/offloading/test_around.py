"""What stands around offloaded experts: trainers, saving, merging, resuming, moving, copies, compilers."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import fourfold
import offloading
import own_forward
import tiny
from fourfold.errors import ConfigurationError, NoExpertsError
from fourfold.experts import PackedExperts
from fourfold.offloading import api, streamer
from fourfold.offloading.sizes import parse_bytes
from tiny_chat import make_tokenizer

COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}
CONFIG = tiny.qwen3_moe(num_hidden_layers=4)


def experts(model: nn.Module) -> list[PackedExperts]:
    return [m for m in model.modules() if isinstance(m, PackedExperts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save(CONFIG, path)
    return path


def adapted(folder: Path, away: bool) -> PeftModel:
    """Loaded into host memory (or not), prepared, with LoRA on attention and experts."""
    settings = {"experts_device": "cpu"} if away else {}
    model = fourfold.prepare(tiny.load(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings))
    torch.manual_seed(1)
    targets = fourfold.expert_targets(model)
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def tokens() -> Dataset:
    ids = torch.randint(3, 20, (12, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 10} for row in ids])


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make_trainer(kind: str, model: PeftModel, out: Path) -> Trainer:
    data = {"train_dataset": tokens(), "eval_dataset": tokens()}
    if kind == "Trainer":
        return Trainer(model, TrainingArguments(output_dir=str(out), **COMMON), **data)
    arguments = SFTConfig(output_dir=str(out), **COMMON)
    return SFTTrainer(model, arguments, processing_class=make_tokenizer(), **data)


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_trainers_train_save_and_resume_as_with_resident_experts(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    trainers = {}
    for away in (False, True):
        trainer = make_trainer(kind, adapted(folder, away), tmp_path / str(away))
        trainer.train()
        trainer.model.save_pretrained(tmp_path / str(away) / "adapter")
        trainers[away] = trainer
    assert all(m.fourfold_host is not None for m in experts(trainers[True].model))
    assert losses(trainers[True]) == losses(trainers[False])
    assert trainers[True].evaluate()["eval_loss"] == trainers[False].evaluate()["eval_loss"]
    ours, theirs = (load_file(tmp_path / f"{a}/adapter/adapter_model.safetensors") for a in (True, False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    if kind == "Trainer":
        again = make_trainer(kind, adapted(folder, True), tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-2"))
        assert losses(again)[-2:] == losses(trainers[True])[-2:]


def test_an_adapter_is_merged_into_what_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    """Merging reads the base from its files; the adapter's record of them is that of a resident base."""
    for away in (False, True):
        model = adapted(folder, away)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        model.save_pretrained(tmp_path / f"adapter-{away}")
        fourfold.merge(folder, tmp_path / f"adapter-{away}", tmp_path / f"merged-{away}")
    records = [(tmp_path / f"adapter-{a}" / "fourfold.json").read_text() for a in (True, False)]
    assert records[0] == records[1]
    ours, theirs = (tiny.load(tmp_path / f"merged-{a}").state_dict() for a in (True, False))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_model_is_saved_and_reported_as_a_resident_one(tmp_path: Path) -> None:
    model = offloading.packed_model("qwen3_moe")
    plain = copy.deepcopy(model)
    fourfold.offload(model)
    tiny.logits(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in model.state_dict().items())
    assert fourfold.expert_targets(model) == fourfold.expert_targets(plain)
    again = offloading.packed_model("qwen3_moe")
    fourfold.offload(again)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(plain.state_dict())  # (into host memory, in place)
    assert torch.equal(tiny.logits(again), tiny.logits(plain))


def test_a_state_loaded_between_passes_is_what_the_next_one_computes_with() -> None:
    """Buffers hold modules as they were."""
    model, other = (offloading.packed_model("qwen3_moe", layers=3) for _ in range(2))
    with torch.no_grad():
        for module in experts(other):
            module.gate_up_proj.random_(0, 256)
    expected = tiny.logits(other)
    fourfold.offload(model)
    assert not torch.equal(tiny.logits(model), expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(tiny.logits(model), expected)


def test_what_moves_a_model_leaves_experts_and_keeps_the_order_of_parameters() -> None:
    model = offloading.packed_model("gpt_oss")  # (with biases, which do move)
    fourfold.offload(model)
    before = [name for name, _ in model.named_parameters()]
    kept = {id(p) for m in experts(model) for p in (m._parameters[n] for n in m.packed_names())}
    moved: list[int] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(id(tensor))
        return tensor.to(torch.float64) if tensor.is_floating_point() else tensor

    model._apply(record)
    assert not kept & set(moved)
    assert [name for name, _ in model.named_parameters()] == before
    assert all(m.gate_up_proj_bias.dtype == torch.float64 for m in experts(model))
    model.float()
    fourfold.onload(model)
    moved.clear()
    model._apply(record)
    assert kept <= set(moved)


def test_moved_before_its_first_pass_a_model_computes_where_it_was_moved_to() -> None:
    model = offloading.packed_model("qwen3_moe")
    (made,) = fourfold.offload(model).streamers
    made.move(torch.device("meta"))  # (as if it had been offloaded elsewhere)
    with pytest.raises(ConfigurationError, match=r"layers\.0\.mlp\.experts: .* to meta, .* are on cpu"):
        tiny.logits(model)
    model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    assert made.device == torch.device("cpu")
    tiny.logits(model)


def test_a_copy_has_no_share_in_the_buffers() -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    fourfold.offload(model)
    tiny.logits(model)
    twin = copy.deepcopy(model)
    assert all(m.fourfold_host is None for m in experts(twin))
    assert torch.equal(tiny.logits(twin), expected)
    fourfold.offload(twin)
    assert torch.equal(tiny.logits(twin), expected)
    assert torch.equal(tiny.logits(model), expected)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert torch.equal(tiny.logits(loaded), expected)


def test_a_copy_is_computed_where_the_rest_of_it_lies() -> None:
    """(Its experts lie in host memory, and it has no share in what brings them.)"""
    model = offloading.packed_model("qwen3_moe")
    packed = {id(t) for m in experts(model) for t in api._packed(m)}
    assert api._computing_device(model, experts(model)[0]).type == "cpu"
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in packed:  # to a device that stands for a GPU
                module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    assert {api._computing_device(model, m).type for m in experts(model)} == {"meta"}


def test_a_copy_on_two_devices_says_what_to_do() -> None:
    model = offloading.packed_model("qwen3_moe")
    hidden = torch.empty(3, 64, device="meta")
    index = torch.zeros(3, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ConfigurationError, match=r"experts are on cpu, .* on meta.*fourfold\.offload"):
        experts(model)[0](hidden, index, torch.empty(3, 2, device="meta"))


def test_compiled_models_bring_experts_between_their_graphs() -> None:
    model = offloading.packed_model("qwen3_moe", layers=3)
    expected = tiny.logits(model)
    fourfold.offload(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(tiny.logits(compiled), expected)
    torch._dynamo.reset()


def test_offload_again_and_onload() -> None:
    model = offloading.packed_model("qwen3_moe", layers=6)
    expected = tiny.logits(model)
    whole = fourfold.offload(model)
    assert (len(whole.streamed), len(whole.resident)) == (6, 0)
    one = streamer.Unit(experts(model)[:1]).nbytes
    half = fourfold.offload(model, 4 * one)
    assert [name.split(".")[2] for name in half.streamed] == ["1", "2", "4", "5"]
    assert half.buffer_bytes + half.resident_bytes <= 4 * one
    assert "experts of 2 modules on cpu" in str(half)
    assert torch.equal(tiny.logits(model), expected)
    every = fourfold.offload(model, "1 GiB")
    assert (every.streamed, every.buffers) == ([], 0)
    assert torch.equal(tiny.logits(model), expected)
    fourfold.offload(model)
    for _ in range(2):
        fourfold.onload(model)
        assert all(m.fourfold_host is None for m in experts(model))
        assert torch.equal(tiny.logits(model), expected)


def test_a_budget_for_one_module_has_one_buffer() -> None:
    model = offloading.packed_model("qwen3_moe")
    expected = tiny.logits(model)
    one = streamer.Unit(experts(model)[:1]).nbytes
    report = fourfold.offload(model, one)
    assert report.buffers == 1
    assert report.buffer_bytes == one
    assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 1000}, r"budget of 0\.000 GiB .* one module's take 0\.000 GiB"),
        ({"budget": 0}, r"budget of 0\.000 GiB"),
        ({"budget": -1}, r"budget=-1 is no number of bytes"),
        ({"budget": "much"}, r"budget='much' is no number of bytes.*'8GiB'"),
        ({"budget": "8 TB"}, r"budget='8 TB' is no number of bytes"),
        ({"budget": True}, r"budget=True is no number of bytes"),
        ({"budget": "auto"}, r"budget='auto' asks cpu for its free memory"),
        ({"buffers": 0}, r"buffers=0"),
        ({"reserve": 5}, r"reserve=5 belongs to budget='auto'"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments: dict[str, Any], message: str) -> None:
    model = offloading.packed_model("qwen3_moe", layers=2)
    with pytest.raises(ConfigurationError, match=message):
        fourfold.offload(model, **arguments)
    assert all(m.fourfold_host is None for m in experts(model))


def test_a_model_without_packed_experts() -> None:
    for call in (fourfold.offload, fourfold.onload):
        with pytest.raises(NoExpertsError, match="no packed experts"):
            call(tiny.build(tiny.qwen3_moe()))


def test_what_is_left_for_a_budget_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourfold.offloading import budget

    cuda = torch.device("cuda")
    monkeypatch.setattr(budget, "free_bytes", lambda device: 10_000)
    assert budget.automatic(cuda, held=500, reserve=4_000) == 6_500
    assert budget.automatic(cuda, held=500, reserve=40_000) == 0
    assert parse_bytes("1.5 kB") == 1_500
    assert parse_bytes("2GiB") == 2**31
    assert parse_bytes("12G") == parse_bytes("12gi") == 12 * 2**30  # as `fourfold plan --gpu` reads them
    assert budget.choose_streamed([10] * 6, 40, 2) == [False, True, True, False, True, True]
    assert budget.choose_streamed([10] * 6, 60, 2) == [False] * 6
    assert budget.choose_streamed([10] * 6, 10, 2) == [True] * 6
    assert budget.fitting_buffers([10] * 6, [True] * 6, 10, 2) == 1


def test_own_forwards_that_share_a_reader_are_brought_together() -> None:
    if not own_forward.is_known("jetmoe"):
        pytest.skip("this version of transformers has no such model")
    model, _ = own_forward.pair("jetmoe")
    expected = own_forward.output(model)
    report = fourfold.offload(model, buffers=1)
    assert len(report.streamed) == len(experts(model))
    assert torch.equal(own_forward.output(model), expected)


def test_loading_by_name_reads_the_adapter_onto_offloaded_experts(folder: Path, tmp_path: Path) -> None:
    adapted(folder, False).save_pretrained(tmp_path)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    models = [tiny.load(folder, **nf4, **s) for s in ({}, {"experts_device": "cpu"})]
    found = [tiny.logits(PeftModel.from_pretrained(m, tmp_path)) for m in models]
    assert torch.equal(*found)


def test_experts_spread_over_processes_are_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = offloading.packed_model("qwen3_moe", layers=2)
        module, mesh = experts(model)[1], init_device_mesh("cpu", (1,))
        for name in module.packed_names():
            whole = module._parameters[name]
            assert whole is not None
            spread = distribute_tensor(whole.data, mesh, [Shard(0)])
            module._parameters[name] = nn.Parameter(spread, requires_grad=False)
        with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.experts: .* spread over processes"):
            fourfold.offload(model)
        assert all(m.fourfold_host is None for m in experts(model))
    finally:
        dist.destroy_process_group()


def test_a_model_without_memory_is_refused() -> None:
    model = offloading.packed_model("qwen3_moe", layers=2).to("meta")
    with pytest.raises(ConfigurationError, match=r"layers\.0\.mlp\.experts: .* no memory \(meta device\)"):
        fourfold.offload(model)
