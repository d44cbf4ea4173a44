"""A whole model with LoRA on its experts under `torch.compile`: one graph, equal loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import fourfold
import tiny
from tiny import IDS


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def lora(model: torch.nn.Module, **changes: object) -> LoraConfig:
    arguments = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**(arguments | {"target_parameters": fourfold.expert_targets(model)} | changes))


def model_with_lora(folder: Path, kind: str) -> PeftModel:
    """NF4 experts from a checkpoint, as a user has them."""
    tiny.save(tiny.KINDS[kind](), folder)
    model = tiny.load(folder, experts_quant_type="nf4")
    fourfold.prepare(model, gradient_checkpointing=False)
    torch.manual_seed(1)
    model = get_peft_model(model, lora(model)).train()
    # A hook of transformers', for reentrant checkpointing; no compiler traces it.
    model.disable_input_require_grads()
    return model


def step(model: torch.nn.Module, run: torch.nn.Module) -> list[torch.Tensor]:
    """Loss, and gradient of everything that is trained."""
    loss = run(input_ids=IDS, labels=IDS, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 8
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(mine, theirs), f"result {number}"
        assert bool(theirs.any()), f"result {number}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_loss_and_gradients_are_eagers(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    model = model_with_lora(tmp_path, kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    equal(step(model, compiled), step(model, model))


def test_inductor_trains_as_eager_does(tmp_path: Path) -> None:
    model = model_with_lora(tmp_path, "qwen3_moe")
    found = step(model, torch.compile(model, fullgraph=True))
    for mine, theirs in zip(found, step(model, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_adapters_switched_off_and_two_at_once(tmp_path: Path) -> None:
    model = model_with_lora(tmp_path, "qwen3_moe")
    targets = list(model.peft_config["default"].target_parameters)
    model.add_adapter("second", lora(model, r=3, target_parameters=targets))
    compiled = torch.compile(model, backend="aot_eager")

    def logits(run: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return run(input_ids=IDS, use_cache=False).logits

    seen = []
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        seen.append(logits(model))
        assert torch.equal(logits(compiled), seen[-1]), active
    with model.disable_adapter():
        seen.append(logits(model))
        assert torch.equal(logits(compiled), seen[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_unquantized_experts(tmp_path: Path) -> None:
    model = fourfold.prepare(tiny.build(tiny.qwen3_moe()), gradient_checkpointing=False)
    model = get_peft_model(model, lora(model)).train()
    model.disable_input_require_grads()
    equal(step(model, torch.compile(model, fullgraph=True, backend="aot_eager")), step(model, model))


def test_experts_that_keep_their_forward_run_as_they_are(tmp_path: Path) -> None:
    """Undecorated: a break in the graph for each layer, no tracing of what decodes, the same numbers."""
    tiny.save(tiny.llama4(), tmp_path)
    model = tiny.load(tmp_path, experts_quant_type="nf4")
    model = get_peft_model(model, lora(model)).train()
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        traced.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    found = step(model, torch.compile(model, backend=backend))
    for mine, theirs in zip(found, step(model, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert any("modeling_llama4" in trace for trace in traced)
    assert not any("own_forward" in trace for trace in traced)
