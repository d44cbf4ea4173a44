"""What is planned without a weight, against what is counted with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fourfold
import tiny
from fourfold.adapters.peft_lora import add_lora
from fourfold.planning.live import LiveBytes
from fourfold.planning.plan import Plan, Planner, Settings, attention_projections, default_parameters
from fourfold.planning.simulate import measuring
from fourfold.planning.standins import Target

CPU = Target("cpu", None)
ROUTED = ("mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3", "dense")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4-dq": NF4,
    "nf4": NF4 | {"bnb_4bit_use_double_quant": False},
    "fp4": NF4 | {"bnb_4bit_quant_type": "fp4"},
    "blocks of 128": NF4 | {"experts_blocksize": 128},
    "int8": {"load_in_8bit": True},
    "experts alone": {"experts_quant_type": "nf4"},
}
BATCH, LENGTH = 2, 48


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_weights_are_planned_to_the_byte(tmp_path: Path, kind: str, quantization: str) -> None:
    wide = {"moe_shared_expert_intermediate_size": 64} if kind == "nemotron_h" else {}
    tiny.save(tiny.KINDS[kind](**wide), tmp_path)
    # (what 4-bit Linears of these widths would compute on a CPU is another matter)
    settings = FORMATS[quantization] | {"llm_int8_skip_modules": ["lm_head", "o_proj", "in_proj", "out_proj"]}
    if "experts_quant_type" in settings:
        settings.pop("llm_int8_skip_modules")
    loaded = fourfold.verify(tiny.load(tmp_path, **settings))
    plan = fourfold.plan(
        tmp_path, quantization_config=fourfold.MoeBitsAndBytesConfig(**settings), bf16=False, length=8
    )
    assert plan.weights.to_dict() == loaded.to_dict()


EXPERTS_ALONE = {"experts_quant_type": "nf4"}


def _settings(quantization: dict[str, Any] = EXPERTS_ALONE, **changes: Any) -> Settings:
    base = {"r": 4, "batch": BATCH, "length": LENGTH, "bf16": False, "checkpointing": False}
    return Settings(quantization=fourfold.MoeBitsAndBytesConfig(**quantization), **(base | changes))


def _trainable(
    folder: Path, *, checkpointing: bool = False, quantization: dict[str, Any] = EXPERTS_ALONE
) -> Any:
    model = fourfold.prepare(tiny.load(folder, **quantization), gradient_checkpointing=checkpointing)
    return add_lora(
        model,
        r=4,
        alpha=4,
        target_modules=attention_projections(model),
        target_parameters=default_parameters(model),
    ).train()


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def _run(model: Any, autocast: bool) -> tuple[int, LiveBytes]:
    """One forward and backward through the model below its head; bytes kept between the two."""
    ids, base = _ids(), model.get_base_model()
    with measuring(model) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept = live.live
        gradient = torch.ones_like(hidden)
        live.restart_peaks()
        hidden.backward(gradient)
    return kept, live


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize("kind", ROUTED)
def test_activations_are_those_that_a_run_keeps(tmp_path: Path, kind: str, checkpointing: bool) -> None:
    tiny.save(getattr(tiny, kind)(), tmp_path)
    packed = (
        FORMATS["nf4"] if kind in ("dense", "mixtral") else EXPERTS_ALONE
    )  # Linears too, or experts alone
    kept, live = _run(_trainable(tmp_path, checkpointing=checkpointing, quantization=packed), autocast=False)
    planned = Planner(tmp_path, CPU).plan(_settings(packed, checkpointing=checkpointing)).activations
    assert planned is not None
    assert planned.kept == pytest.approx(kept, rel=0.1)
    assert planned.backward_with_gradients == pytest.approx(live.peak, rel=0.1)
    assert planned.gradients == live.gradients


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_activations_under_autocast(tmp_path: Path, kind: str) -> None:
    model = tiny.build(getattr(tiny, kind)()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    kept, live = _run(_trainable(tmp_path), autocast=True)
    planned = Planner(tmp_path, CPU).plan(_settings(bf16=True)).activations
    assert planned is not None
    assert planned.kept == pytest.approx(kept, rel=0.1)
    assert planned.backward_with_gradients == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_what_is_kept_is_what_autograd_says_it_saved(tmp_path: Path, kind: str) -> None:
    """Counted another way: the storages that autograd's own hooks are shown."""
    tiny.save(getattr(tiny, kind)(), tmp_path)
    model = _trainable(tmp_path)
    lying = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in lying:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.get_base_model().base_model(input_ids=_ids(), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    planned = Planner(tmp_path, CPU).plan(_settings()).activations
    assert planned is not None
    assert planned.kept == pytest.approx(sum(s.nbytes() for s in saved.values()), rel=0.1)


def test_live_bytes_counts_what_is_held() -> None:
    with LiveBytes() as live:
        a = torch.empty(1000)
        b = a.view(10, 100)  # shares
        assert live.live == 4000
        c = a + 1
        del a
        assert live.live == 8000
        del b
        assert (live.live, live.peak) == (4000, 8000)
        del c
    assert live.live == 0


def test_a_model_whose_code_wants_numbers_gets_a_lower_bound(tmp_path: Path) -> None:
    tiny.save(tiny.llama4(), tmp_path)
    plan = fourfold.plan(tmp_path, length=16)
    assert plan.activations is None
    assert plan.unknown
    assert plan.peak == plan.resident + plan.gradients
    assert str(plan).count("at least") == 1


def test_parts_add_up_to_the_peak(tmp_path: Path) -> None:
    tiny.qwen3_moe().save_pretrained(tmp_path)
    for changes in ({}, {"checkpointing": False}, {"accumulation": 4}, {"optimizer": "adamw_torch", "r": 64}):
        plan: Plan = fourfold.plan(tmp_path, length=16, **changes)
        assert sum(plan.parts().values()) == plan.peak


def test_accumulation_begins_with_gradients(tmp_path: Path) -> None:
    tiny.qwen3_moe().save_pretrained(tmp_path)
    once, often = (fourfold.plan(tmp_path, length=16, r=64, accumulation=n) for n in (1, 4))
    assert once.activations == often.activations
    assert often.peak - once.peak > 0


def test_a_batch_with_padding_needs_a_mask(tmp_path: Path) -> None:
    tiny.qwen3_moe().save_pretrained(tmp_path)
    even, padded = (fourfold.plan(tmp_path, length=64, batch=2, padded=p) for p in (False, True))
    assert even.activations is not None
    assert padded.activations is not None
    assert padded.activations.kept - even.activations.kept >= 2 * 64 * 64


def test_a_hopper_needs_no_decoded_workspace() -> None:
    config = tiny.qwen3_moe(
        hidden_size=256, moe_intermediate_size=256, num_experts=64, num_experts_per_tok=2, head_dim=64
    )
    hopper, ampere = (
        fourfold.plan(config, length=1024, capability=capability).activations
        for capability in ((9, 0), (8, 0))
    )
    assert hopper is not None
    assert ampere is not None
    decoded = 64 * 256 * 512 * 2  # the wider projection of a layer in bf16
    assert hopper.kept == ampere.kept
    assert ampere.backward - hopper.backward == pytest.approx(decoded, rel=0.25)


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    tiny.qwen3_moe().save_pretrained(tmp_path)
    with pytest.raises(fourfold.errors.ConfigurationError, match="rank is no setting"):
        fourfold.plan(tmp_path, rank=4)
    with pytest.raises(fourfold.errors.ConfigurationError, match="optimizer: adam is not one of"):
        fourfold.plan(tmp_path, optimizer="adam")
