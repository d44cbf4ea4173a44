"""Adapters that `loftq_init` began, where they are saved, loaded, merged and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fourfold
import needs
import tiny
from fourfold.adapters import provenance
from fourfold.adapters.peft_lora import load_adapter
from fourfold.cli.main import main
from fourfold.errors import AdapterError
from parity import lora
from tiny import IDS, logits

NF4 = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save(tiny.KINDS[request.param](), path)
    return path


def fresh(base: Path, **changes: object) -> PeftModel:
    model = tiny.load(base, **NF4)
    return get_peft_model(model, lora(model, **({"init_lora_weights": True} | changes)))


def trained(base: Path, folder: Path, **changes: object) -> PeftModel:
    """Begun and saved as ``initial``, moved as training would, saved as ``adapter``."""
    model = fresh(base, **changes)
    fourfold.loftq_init(model)
    model.save_pretrained(str(folder / "initial"))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(str(folder / "adapter"))
    return model.eval()


def said(folder: Path) -> str | None:
    found = json.loads((folder / "fourfold.json").read_text())["init"]
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def dequantized(base: Path) -> torch.nn.Module:
    return fourfold.dequantize(tiny.load(base, **NF4))


def test_stock_peft_on_the_dequantized_model_gives_the_same_logits(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path)
    stock = PeftModel.from_pretrained(dequantized(base), str(tmp_path / "adapter"))
    assert relative(logits(stock), logits(model)) < 1e-6
    dequantized(base).save_pretrained(tmp_path / "plain")  # and from disk
    reloaded = PeftModel.from_pretrained(tiny.load(tmp_path / "plain"), str(tmp_path / "adapter"))
    assert relative(logits(reloaded), logits(model)) < 1e-6


def test_the_saved_adapter_is_stocks_but_for_the_numbers(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    fresh(base).save_pretrained(str(tmp_path / "ordinary"))
    configs = [(tmp_path / n / "adapter_config.json").read_text() for n in ("adapter", "ordinary")]
    assert configs[0] == configs[1]
    assert [said(tmp_path / name) for name in ("initial", "adapter", "ordinary")] == ["loftq", "loftq", None]


def test_it_is_remembered_across_loading_and_saving(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    adapter = str(tmp_path / "adapter")
    once = PeftModel.from_pretrained(tiny.load(base, **NF4), adapter, is_trainable=True)
    once.save_pretrained(str(tmp_path / "once"))
    assert said(tmp_path / "once") == "loftq"
    # Beside another one, which is ordinary.
    both = fresh(base)
    both.load_adapter(adapter, "second")
    both.save_pretrained(str(tmp_path / "both"))
    assert (said(tmp_path / "both"), said(tmp_path / "both" / "second")) == (None, "loftq")
    # What is loaded over an adapter decides, both ways.
    both.load_adapter(adapter, "default")
    both.load_adapter(str(tmp_path / "both"), "second")
    both.save_pretrained(str(tmp_path / "over"))
    assert (said(tmp_path / "over"), said(tmp_path / "over" / "second")) == ("loftq", None)
    # A new adapter of a deleted one's name is new.
    both.delete_adapter("default")
    both.add_adapter("default", lora(both, init_lora_weights=True))
    both.save_pretrained(str(tmp_path / "new"))
    assert said(tmp_path / "new") is None
    with provenance.any_base():
        loose = load_adapter(tiny.load(base, **NF4), adapter, any_base=True)
    loose.save_pretrained(str(tmp_path / "loose"))
    assert said(tmp_path / "loose") == "loftq"


def test_it_is_remembered_through_hotswapping(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    model = fresh(base)
    model.save_pretrained(str(tmp_path / "ordinary"))
    hotswap_adapter(model, str(tmp_path / "adapter"), adapter_name="default", torch_device="cpu")
    model.save_pretrained(str(tmp_path / "swapped"))
    assert said(tmp_path / "swapped") == "loftq"
    hotswap_adapter(model, str(tmp_path / "ordinary"), adapter_name="default", torch_device="cpu")
    model.save_pretrained(str(tmp_path / "back"))
    assert said(tmp_path / "back") is None


def test_it_is_remembered_by_transformers_own_mixin(base: Path, tmp_path: Path) -> None:
    needs.transformers_mixin()
    trained(base, tmp_path)
    model = tiny.load(base, **NF4)
    model.load_adapter(str(tmp_path / "adapter"))
    model.save_pretrained(tmp_path / "mixin")
    assert said(tmp_path / "mixin") == "loftq"


def test_checkpoints_of_trainers_say_so_before_and_after_resuming(base: Path, tmp_path: Path) -> None:
    def trainer(model: PeftModel, steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=steps,
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in IDS])

    model = fresh(base)
    fourfold.loftq_init(model)
    trainer(model, 1).train()
    assert said(tmp_path / "run" / "checkpoint-1") == "loftq"
    resumed = fresh(base)  # (not begun: the checkpoint's factors take the place of these)
    trainer(resumed, 2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert said(tmp_path / "run" / "checkpoint-2") == "loftq"


def test_the_original_model_refuses_it(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    adapter = str(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"there twice; load the model packed, or .*dequantize"):
        PeftModel.from_pretrained(tiny.load(base), adapter)
    with pytest.raises(AdapterError, match="there twice"):
        tiny.load(base).load_adapter(adapter)
    fresh(base).save_pretrained(str(tmp_path / "ordinary"))
    assert PeftModel.from_pretrained(tiny.load(base), str(tmp_path / "ordinary"))
    assert load_adapter(tiny.load(base), adapter, any_base=True)


def test_merging_takes_the_dequantized_weights(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path)
    with pytest.raises(AdapterError, match=r"init: loftq.*--base-weights dequantized"):
        fourfold.merge(base, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(AdapterError, match="init: loftq"):
        fourfold.merge(base, tmp_path / "adapter", tmp_path / "merged", any_base=True)
    assert not (tmp_path / "merged").exists()
    fourfold.merge(base, tmp_path / "adapter", tmp_path / "merged", "dequantized")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(merged), logits(model)) < 1e-5


def test_the_command_says_it_too(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(base, tmp_path)
    paths = [str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert main(["merge", str(base), *paths]) == 2
    assert "--base-weights dequantized" in capsys.readouterr().err
    assert main(["export", *paths]) == 2
    assert "--initial" in capsys.readouterr().err
    assert main(["export", *paths, "--base-weights", "dequantized"]) == 0
    assert main(["export", *paths, "--initial", str(tmp_path / "initial"), "--force", "--json"]) == 0
    assert said(tmp_path / "out") is None


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_exporting_for_a_dequantized_base_changes_no_number(base: Path, tmp_path: Path, layout: str) -> None:
    model = trained(base, tmp_path)
    with pytest.raises(AdapterError, match="base_weights='dequantized'"):
        fourfold.export(tmp_path / "adapter", tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()
    fourfold.export(tmp_path / "adapter", tmp_path / "out", layout, base_weights="dequantized")
    assert said(tmp_path / "out") == "loftq"  # which it still is
    fourfold.export(tmp_path / "out", tmp_path / "fused", "fused", base_weights="dequantized")
    stock = PeftModel.from_pretrained(dequantized(base), str(tmp_path / "fused"))
    assert relative(logits(stock), logits(model)) < 1e-6


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"target_parameters": ["mlp.experts.down_proj"]}], ids=str
)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_what_it_began_with_is_taken_off(
    base: Path, tmp_path: Path, layout: str, changes: dict[str, object]
) -> None:
    """On the original weights the exported adapter adds what training added, and no more."""
    trained(base, tmp_path, **changes)
    wanted = tiny.load(base)
    before, after = (stock_sum(base, tmp_path / name) for name in ("initial", "adapter"))
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            parameter += after[name] - before[name]
    exported = fourfold.export(tmp_path / "adapter", tmp_path / "out", layout, initial=tmp_path / "initial")
    assert exported.rank == 2 * 5
    assert said(tmp_path / "out") is None
    if layout == "per-expert":
        fourfold.export(tmp_path / "out", tmp_path / "fused", "fused")
    folder = tmp_path / ("fused" if layout == "per-expert" else "out")
    served = PeftModel.from_pretrained(tiny.load(base), str(folder))
    assert relative(logits(served), logits(wanted)) < 1e-5
    fourfold.merge(base, folder, tmp_path / "merged")  # and so it merges into the original weights
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(merged), logits(wanted)) < 1e-5


def stock_sum(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The dequantized model's weights with an adapter merged by stock PEFT."""
    merged = PeftModel.from_pretrained(dequantized(base), str(adapter)).merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


def test_beginnings_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    fresh(base).save_pretrained(str(tmp_path / "ordinary"))
    adapter, initial = tmp_path / "adapter", tmp_path / "initial"

    def refused(match: str, adapter: Path = adapter, initial: Path = initial, **arguments: str) -> None:
        with pytest.raises(AdapterError, match=match):
            fourfold.export(adapter, tmp_path / "out", initial=initial, **arguments)
        assert not (tmp_path / "out").exists()

    refused("did not begin with loftq_init", adapter=tmp_path / "ordinary")
    refused("did not begin with loftq_init", initial=tmp_path / "ordinary")
    refused("pass one of", base_weights="dequantized")
    refused("is none of original, dequantized", base_weights="bf16")
    refused("was trained already", initial=adapter)
    for name, changes in {
        "rank": {"r": 2},
        "alpha": {"lora_alpha": 3},
        "one": {"target_parameters": ["mlp.experts.down_proj"]},
        "linears": {"target_modules": None},
    }.items():
        trained(base, tmp_path / name, **changes)
    refused("other shapes", initial=tmp_path / "rank" / "initial")
    refused("another scaling", initial=tmp_path / "alpha" / "initial")
    refused("other parameters", initial=tmp_path / "one" / "initial")
    refused("other modules", initial=tmp_path / "linears" / "initial")


def test_pefts_own_conversion_is_refused(base: Path, tmp_path: Path) -> None:
    """It joins the flat factors as those of one matrix, which mixes up experts."""
    model = trained(base, tmp_path)
    with pytest.raises(AdapterError, match=r"path_initial_model_for_weight_conversion.*--initial"):
        model.save_pretrained(
            str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )


@pytest.mark.parametrize("broken", ["[", '{"init": "pissa"}', "[1]"])
def test_a_file_that_says_nothing_known(base: Path, tmp_path: Path, broken: str) -> None:
    trained(base, tmp_path)
    (tmp_path / "adapter" / "fourfold.json").write_text(broken)
    with pytest.raises(AdapterError, match="cannot be understood"):
        fourfold.export(tmp_path / "adapter", tmp_path / "out")
